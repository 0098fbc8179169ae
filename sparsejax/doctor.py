"""Checks the attention implementations of this machine against the float64 reference."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool
from rich.console import Console
from rich.table import Table

from sparsejax import patterns
from sparsejax.ops import IMPLEMENTATIONS, Implementation, Selection, verification
from sparsejax.ops.blocks import make_blocks
from sparsejax.ops.call import AttentionCall
from sparsejax.ops.reference import TOLERANCE, Attention, attend_reference, relative_error
from sparsejax.ops.selection import selection_of


class VerificationError(Exception):
    """An implementation disagrees with the reference."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of `attend`: one sequence length, no tile divides it."""

    pattern: str
    dtype: str
    heads: tuple[int, int] = (4, 2)  # of queries, of keys and values
    softcap: float | None = None
    sink: bool = False
    segments: bool = False
    block: int = 0  # keys per block of a selection per key/value head; 0 for no selection
    length: int = 391
    width: int = 64

    @property
    def title(self) -> str:
        """One line that names the case."""
        extras = [name for name in ("softcap", "sink", "segments") if getattr(self, name)]
        extras += [f"selected blocks of {self.block}"] * (self.block > 0)
        return ", ".join([self.pattern, self.dtype, *extras])


CASES = (
    Case("full", "bfloat16"),
    Case("causal", "bfloat16"),
    Case("causal & window(100)", "float16", heads=(2, 2)),
    Case("causal & (window(100) | sink(4))", "bfloat16", softcap=20.0, sink=True),
    Case("window(40, 40) | globals(2)", "float32", sink=True, segments=True),
    Case("causal & window(200)", "bfloat16", sink=True, block=16),
    Case("causal", "float32", segments=True, block=1),
    Case("per_head(causal, window(9, 70), causal & dilated(9, stride=5), full)", "float32"),
)


class Failure(NamedTuple):
    """A case that an implementation computes wrongly or not at all."""

    case: Case
    problem: str


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The check of one implementation.

    Attributes:
      cases: Number of cases that it supports.
      error: Largest error, relative to the tolerance of its dtype.
      unsupported: Why it does not run here; None if it does.
    """

    name: str
    cases: int = 0
    error: float = 0.0
    failures: tuple[Failure, ...] = ()
    unsupported: str | None = None


def run_doctor(console: Console, implementations: Sequence[Implementation] = IMPLEMENTATIONS) -> None:
    """Checks the kernels of this machine, or plain JAX on CPU, prints the result and records what is verified.

    Raises:
      VerificationError: An implementation fails.
    """
    device = jax.local_devices()[0]
    console.print(
        f"{device.device_kind} ({device.platform}), devices: {jax.device_count()}, {_versions()}", markup=False
    )
    kernels = [impl.name for impl in implementations if impl.verified_on is not None]
    recorded = {impl.name for impl in implementations if device.device_kind in (impl.verified_on or ())}
    table, diagnoses = Table("implementation", "cases", "largest error / tolerance", "result"), []
    for impl in implementations:
        if device.platform != "cpu" and impl.name not in kernels:
            table.add_row(impl.name, "", "", "plain JAX, which needs no verification")
            continue
        diagnoses.append(diagnosis := diagnose(impl))
        table.add_row(*_row(diagnosis, impl.name in recorded))
    console.print(table)
    for diagnosis in diagnoses:
        for failure in diagnosis.failures:
            console.print(f"{diagnosis.name}: {failure.case.title}: {failure.problem}", markup=False)
    runs_here = [diagnosis for diagnosis in diagnoses if diagnosis.name in kernels and diagnosis.unsupported is None]
    if runs_here:
        verified = [diagnosis.name for diagnosis in runs_here if not diagnosis.failures]
        path = verification.write_record(device.device_kind, verified)
        console.print(f"verified: {', '.join(verified) or 'none'}; recorded in {path}", markup=False)
    else:
        console.print("no kernel runs here; auto uses plain JAX", markup=False)
    if failed := [diagnosis.name for diagnosis in diagnoses if diagnosis.failures]:
        raise VerificationError(f"{', '.join(failed)}: results differ from the float64 reference")


def diagnose(impl: Implementation) -> Diagnosis:
    """Runs every case that the implementation supports, forward and backward."""
    cases, largest, failures = 0, 0.0, []
    for case in CASES:
        inputs = _draw(case)
        call = _supported_call(impl, case, inputs)
        if call is None:
            continue
        cases += 1
        try:
            actual = _differentiate(impl, call, inputs)
        except Exception as error:  # whatever a compiler or driver raises is a failure of the kernel
            failures.append(Failure(case, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
            continue
        for name, ratio in _error_ratios(case, inputs, actual):
            largest = max(largest, ratio)
            if not ratio <= 1:
                failures.append(Failure(case, f"error of {name} is {ratio:.3g} times the tolerance"))
    reason = None if cases else impl.unsupported_reason(_call(CASES[0], _draw(CASES[0]), return_lse=False))
    return Diagnosis(impl.name, cases, largest, tuple(failures), reason)


class _Inputs(NamedTuple):
    q: Array
    k: Array
    v: Array
    sink: Array | None
    segments: Array | None
    selection: Selection | None
    d_out: Array
    d_lse: Array


def _draw(case: Case) -> _Inputs:
    random, (h, g) = np.random.default_rng(0), case.heads

    def normal(*shape: int, dtype: str = case.dtype) -> Array:
        return jnp.asarray(random.standard_normal(shape), dtype)

    q, k, v, d_out = (normal(1, case.length, heads, case.width) for heads in (h, g, g, h))
    sink = normal(h, dtype="float32") if case.sink else None
    segments = jnp.asarray(np.sort(random.integers(0, 3, (1, case.length)))) if case.segments else None
    d_lse = normal(1, case.length, h, dtype="float32")
    return _Inputs(q, k, v, sink, segments, _choose(case, random) if case.block else None, d_out, d_lse)


def _choose(case: Case, random: np.random.Generator) -> Selection:
    """A sixth of all blocks per query, and the block of the query."""
    blocks = make_blocks(case.length, case.block)
    chosen = random.random((1, case.heads[1], case.length, blocks.count)) < 1 / 6
    chosen |= np.arange(blocks.count) == np.arange(case.length)[:, None] // case.block
    return selection_of(jnp.asarray(chosen), blocks)


def _call(case: Case, inputs: _Inputs, return_lse: bool) -> AttentionCall:
    q, k, v, sink, ids, selection, _, _ = inputs
    pattern, segments = patterns.parse(case.pattern), None if ids is None else (ids, ids)
    options = {"scale": case.width**-0.5, "softcap": case.softcap, "interpret": False, "return_lse": return_lse}
    options |= {"selection": selection}
    return AttentionCall(q, k, v, pattern, sink_logits=sink, segments=segments, **options)


def _supported_call(impl: Implementation, case: Case, inputs: _Inputs) -> AttentionCall | None:
    """The call with the log-sum-exp, or else without it, or None."""
    calls = (_call(case, inputs, return_lse) for return_lse in (True, False))
    return next((call for call in calls if impl.unsupported_reason(call) is None), None)


def _differentiate(impl: Implementation, call: AttentionCall, inputs: _Inputs) -> Attention:
    def forward(q, k, v, sink):
        out, lse = impl.run(dataclasses.replace(call, q=q, k=k, v=v, sink_logits=sink))
        return out, lse if call.return_lse else None

    def differentiate(q, k, v, sink, d_out, d_lse):
        results, vjp = jax.vjp(forward, q, k, v, sink)
        return Attention(*results, *vjp((d_out, d_lse if call.return_lse else None)))

    return jax.jit(differentiate)(*inputs[:4], inputs.d_out, inputs.d_lse)


def _error_ratios(case: Case, inputs: _Inputs, actual: Attention) -> Iterator[tuple[str, float]]:
    """The error of each array, relative to the tolerance of its dtype."""
    q, k, v, d_out, d_lse = map(np.asarray, (inputs.q, inputs.k, inputs.v, inputs.d_out, inputs.d_lse))
    d_lse = d_lse if actual.lse is not None else np.zeros_like(d_lse)
    sink = None if inputs.sink is None else np.asarray(inputs.sink)
    counts = np.broadcast_to(_mask(case, inputs), (1, case.heads[0], case.length, case.length))
    expected = attend_reference(q, k, v, counts, d_out, d_lse, softcap=case.softcap, sink_logits=sink)
    for name, array, wanted in zip(Attention._fields, actual, expected, strict=True):
        if array is not None and wanted is not None:
            label = name if name in ("out", "lse") else f"the gradient of {name}"
            tolerance = TOLERANCE["float32" if name == "lse" else case.dtype]
            yield label, relative_error(np.asarray(array), wanted) / tolerance


def _mask(case: Case, inputs: _Inputs) -> Bool[np.ndarray, "*batch t s"]:
    mask = patterns.parse(case.pattern).dense(case.length)
    if inputs.selection is not None:
        mask = mask & np.repeat(inputs.selection.mask, case.heads[0] // case.heads[1], axis=1)
    if inputs.segments is None:
        return mask
    ids = np.asarray(inputs.segments)
    return mask & (ids[:, :, None] == ids[:, None, :])[:, None]


def _row(diagnosis: Diagnosis, recorded: bool) -> tuple[str, ...]:
    if diagnosis.unsupported is not None:
        return diagnosis.name, "", "", f"does not run here: {diagnosis.unsupported}"
    result = f"{len(diagnosis.failures)} failures" if diagnosis.failures else "passed"
    result = f"{result}; verified by a recorded benchmark" if recorded else result
    return diagnosis.name, str(diagnosis.cases), f"{diagnosis.error:.2g}", result


def _versions() -> str:
    packages = ("sparsejax", "jax", "jaxlib", "numpy")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([*versions, f"Python {platform.python_version()}"])
