"""The check of a run's models beside its first steps.

The coordinator checks in a thread: a check is nearly all compilation, which runs beside the compilation of the training
step and the first steps. The certificates are written to the workdir, and to the cache of this machine, so that
neither a resume nor another run of the same model repeats a check that passed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console

from sparsejax import extensions, sharding
from sparsejax.check import Certificate, CheckFailed, Finding, check_model
from sparsejax.check.certificate import SCHEMA
from sparsejax.config import Config
from sparsejax.errors import InputError
from sparsejax.ops import verification
from sparsejax.registry import file_digest
from sparsejax.runs.phases import Phase
from sparsejax.train.display import print_lines
from sparsejax.workdir import Workdir, read_json, write_json

NICE = 10  # priority of the thread, from -20, the highest, to 19
KEY = "key"  # of a certificate in a file: the digest of what it depends on; None if that is unknown


class _Abandoned(Exception):
    """Ends a check whose run has stopped."""


class ModelCheck:
    """The check of the distinct models of a run; a context manager, which abandons a check that is not done.

    Args:
      workdir: The files of the run.
      phases: The phases that remain.
      console: Where the verdict is printed.

    Attributes:
      pending: Whether `conclude` has not been called. It is the same in all processes that train together.
    """

    def __init__(self, workdir: Workdir, phases: Sequence[Phase], console: Console):
        self._workdir, self._console = workdir, console
        self._phases = _select(phases)
        self._keys = [_identify(phase.config) for phase in self._phases]
        self._certificates: list[Certificate] = []
        self._error: BaseException | None = None
        self._done, self._abandoned = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="check")
        self.pending = bool(self._phases)

    def __enter__(self) -> ModelCheck:
        if self.pending and sharding.is_coordinator():
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._abandoned.set()
        if self._thread.ident is not None:
            self._thread.join()  # a thread in native code that returns while Python exits aborts the process

    @property
    def done(self) -> bool:
        """Whether `conclude` is due; False in all processes but the coordinator."""
        return self.pending and self._done.is_set()

    def wait(self, timeout: float) -> None:
        """Waits for the end of the check, in the coordinator only."""
        if sharding.is_coordinator():
            self._done.wait(timeout)

    def conclude(self) -> None:
        """Records and prints the certificates of a check that is done; all processes call it together.

        Raises:
          CheckFailed: A model failed.
        """
        self.pending = False
        if sharding.is_coordinator() and self._certificates:
            records = zip(self._keys, self._certificates, strict=False)  # the first that fails is the last
            write_json(self._workdir.certificate, [{KEY: key} | certificate.to_dict() for key, certificate in records])
            for phase, certificate in zip(self._phases, self._certificates, strict=False):
                if certificate.passed:
                    print_lines(self._console, _describe(phase, certificate))
        problem = sharding.from_coordinator(self._error and f"{self._error}")
        if self._error is not None:
            raise self._error
        if problem is not None:
            raise CheckFailed(problem)

    def _run(self) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own: training goes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            for phase, key in zip(self._phases, self._keys, strict=True):
                certificate = _find(self._workdir, key)
                if certificate is None:
                    certificate = check_model(phase.config.model, phase.config.data.length, report=self._report)
                    _store(key, certificate)
                self._certificates.append(certificate)
                certificate.require()
        except _Abandoned:
            pass
        except CheckFailed as error:
            self._error = CheckFailed(f"{error}; train.check=false trains the model without a check")
        except BaseException as error:  # raised again by `conclude`
            self._error = error
        finally:
            self._done.set()

    def _report(self, finding: Finding) -> None:
        if self._abandoned.is_set():
            raise _Abandoned


def _select(phases: Sequence[Phase]) -> list[Phase]:
    """The first phase of each model among those with its longest sequences; none if the run is not to be checked."""
    longest: dict[str, Phase] = {}
    for phase in phases:
        other = longest.setdefault(repr(phase.config.model), phase)
        if phase.config.data.length > other.config.data.length:
            longest[repr(phase.config.model)] = phase
    return [phase for phase in longest.values() if phase.config.train.check]


def _describe(phase: Phase, certificate: Certificate) -> str:
    count = sum(finding.passed is not None for finding in certificate.findings)
    name = "" if phase.name is None else f"phase {phase.name}: "
    copy = f", in a copy: {certificate.reduced}" if certificate.reduced else ""
    leaks = ", but may read the future: model.allow_leaks is true" if phase.config.model.allow_leaks else ""
    result = f"passed {count} checks at {certificate.length} tokens in {certificate.seconds:.1f} s"
    return f"check: {name}{result}{leaks}{copy}"


def _identify(config: Config) -> str | None:
    """Digest of what a certificate depends on; None if a registered mixer or pattern has no source file."""
    sources = extensions.digest_sources()
    if sources is None:
        return None
    device = jax.local_devices()[0]
    kernels = sorted(verification.verified_here(device.device_kind))
    software = [_digest_package(), sources, jax.__version__, device.platform, device.device_kind, kernels]
    return hashlib.sha256(json.dumps([repr(config.model), config.data.length, *software]).encode()).hexdigest()


@functools.cache
def _digest_package() -> str:
    """Digest of the sources of this package."""
    folder = Path(__file__).parents[1]
    digests = [(str(file.relative_to(folder)), file_digest(file)) for file in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _cache(key: str) -> Path:
    return verification.record_path().with_name("certificates") / f"{key}.json"


def _find(workdir: Workdir, key: str | None) -> Certificate | None:
    """The certificate of an earlier check that passed, in the workdir or in the cache."""
    if key is None:
        return None
    for file in (workdir.certificate, _cache(key)):
        with contextlib.suppress(InputError, OSError):  # damaged or not there: the check is repeated
            for record in read_json(file, [{KEY: (str, None), **SCHEMA}]):
                if record[KEY] == key and record["passed"]:
                    return Certificate.from_dict(record)
    return None


def _store(key: str | None, certificate: Certificate) -> None:
    """Writes a certificate that passed to the cache."""
    if key is not None and certificate.passed:
        with contextlib.suppress(OSError):  # a home folder may be read-only; the next run then checks again
            _cache(key).parent.mkdir(parents=True, exist_ok=True)
            write_json(_cache(key), [{KEY: key} | certificate.to_dict()])
