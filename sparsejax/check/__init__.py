"""The certificate of a model: that it does what its schedule declares, on the program that runs.

`check_model` takes random parameters and compares the interface of its mixers, causality, receptive fields, documents
and padding, decoding, scanned layers, implementations and the account with what the config states.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from sparsejax.check.account import check_account
from sparsejax.check.agreement import check_agreement
from sparsejax.check.certificate import Certificate, CheckFailed, Finding
from sparsejax.check.contract import check_contract
from sparsejax.check.influence import check_causality, check_documents, check_receptive_fields, trace
from sparsejax.check.reduce import choose_length, reduce
from sparsejax.check.subject import Subject
from sparsejax.config import ModelConfig
from sparsejax.layers import LayerConfig, MixerConfig, NormConfig

__all__ = ["Certificate", "CheckFailed", "Finding", "check_mixer", "check_model"]


def check_model(
    config: ModelConfig, length: int | None = None, *, seed: int = 0, report: Callable[[Finding], None] | None = None
) -> Certificate:
    """Checks a model with random parameters.

    Args:
      config: The model. A large one is checked in a copy of smaller widths, see `Certificate.reduced`.
      length: Largest number of tokens per sequence; by default a length that crosses every edge of the patterns.
      seed: Seed of parameters and tokens.
      report: Called with each finding as it is made.
    """
    start = time.perf_counter()
    copy, reduced = reduce(config)
    subject = Subject(copy, choose_length(copy, length), seed)
    findings = []
    for finding in _find(subject):
        findings.append(finding)
        if report is not None:
            report(finding)
    return Certificate(tuple(findings), subject.length, reduced, time.perf_counter() - start)


def check_mixer(config: MixerConfig, length: int | None = None, *, width: int = 8, seed: int = 0) -> Certificate:
    """Checks a mixer by `check_model`, in a model of two scanned layers of it in float32.

    Args:
      config: The config of the mixer. The model is causal if `config.connectivity` is.
      length: Largest number of tokens per sequence; by default a length that crosses every edge of the pattern.
      width: Width of the stream.
      seed: Seed of parameters and tokens.

    Returns:
      The certificate, which has passed.

    Raises:
      CheckFailed: The mixer does not do what its config states, or violates the contract of `layers.Mixer`.
      InputError: The mixer cannot run on `length` tokens.
    """
    norm = NormConfig(kind="rms", eps=1e-6)
    layer = LayerConfig(mixer=config, mlp=None, norm=norm, norm_position="pre", remat="none")
    model = ModelConfig(
        vocab=64,
        width=width,
        schedule="2x(mixer)",
        layers={"mixer": layer},
        norm=norm,
        tied=True,
        dtype="float32",
        scan=True,
        causal=config.connectivity.lookahead() <= 0,
        allow_leaks=bool(config.leaks),
    )
    if length is not None:
        config.check(length)
    certificate = check_model(model, length, seed=seed)
    certificate.require()
    return certificate


def _find(subject: Subject) -> Iterator[Finding]:
    """The findings in order. Those after the contract need a model that runs."""
    contract = list(check_contract(subject))
    yield from contract
    if all(finding.passed for finding in contract):
        traced = trace(subject)
        yield check_causality(subject, traced)
        yield from check_receptive_fields(subject, traced)
        yield check_documents(subject)
        yield from check_agreement(subject, traced)
        yield from check_account(subject)
