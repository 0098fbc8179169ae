"""Holds the Hugging Face importer against transformers itself, on random configurations of every family.

    python scripts/check_huggingface.py --torch TORCH_PYTHON [--family NAME ...] [--cases N] [--seed S] [--only NUMBER]

TORCH_PYTHON is a Python that has torch and transformers. It writes each model and what it computes; here the folder is
loaded, run, differentiated, saved and loaded again. Exit code 1 if anything is beyond the tolerance.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from contest import OtherProcess, keep_to_cores
from random_models import FAMILIES, Case, draw_case
from rich.console import Console
from rich.table import Table

from sparsejax.interop import huggingface
from sparsejax.interop.huggingface import parity
from sparsejax.interop.huggingface.checkpoint import Checkpoint


@dataclasses.dataclass
class Result:
    """How far apart both sides are; `problem` says what went wrong, if anything did."""

    number: int
    logits: float = 0.0
    loss: float = 0.0
    gradients: float = 0.0
    tensor: str = ""  # whose gradient is the worst
    noise: float = 0.0
    gain: float = 1.0
    problem: str = ""


def check(torch: OtherProcess, family: str, seed: int, number: int) -> Result:
    """One case, in a folder that is gone afterwards."""
    case = draw_case(family, seed, number)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        answer = torch.ask(do="make", family=family, seed=seed, number=number, folder=str(folder))
        if "error" in answer:
            return Result(number, problem=f"transformers: {answer['error']}")
        result = Result(number, noise=answer["noise"], gain=answer["gain"])
        try:
            compare(case, folder, result)
        except Exception as error:  # a case that fails is reported like one that differs
            result.problem = f"{type(error).__name__}: {error}".splitlines()[0]
    return result


def compare(case: Case, folder: Path, result: Result) -> None:
    """Fills in the result."""
    expected = dict(np.load(folder / "outputs.npz"))
    options = read_options(case, expected)
    model = huggingface.load(folder, **options)
    logits, loss, gradients = parity.measure(model, **case.inputs)
    shown = case.inputs["attention_mask"].astype(bool)
    result.logits = parity.largest_difference(logits[shown], expected["logits"][shown])
    result.loss = parity.largest_difference(loss, expected["loss"])
    if case.traits.gradients:
        held = Checkpoint(folder / "gradients")
        errors = parity.compare_gradients(gradients, {name: held.read(name) for name in gradients})
        result.tensor, result.gradients = max(errors.items(), key=lambda item: item[1])
    tolerance = parity.TOLERANCES[case.family]
    if max(result.logits, result.loss) > tolerance:
        result.problem = f"logits are apart {find_stream(case, model, expected, tolerance)}"
    elif result.gradients > parity.GRADIENTS:
        result.problem = f"the gradient of {result.tensor} is another"
    else:
        result.problem = check_saving(model, folder, options)


def read_options(case: Case, expected: dict[str, np.ndarray]) -> dict[str, object]:
    """What the forward pass drew, as `load` takes it."""
    drawn = [expected[f"drawn_{i}"] for i in range(sum(key.startswith("drawn_") for key in expected))]
    if case.traits.plans:
        return {"random_plans": [plan.astype(int) for plan in drawn]}
    return {"lsh_rotations": drawn[0]} if drawn else {}


def find_stream(case: Case, model: huggingface.Pretrained, expected: dict[str, np.ndarray], tolerance: float) -> str:
    """Where the stream begins to differ."""
    shown = case.inputs["attention_mask"].astype(bool)
    masks = {key: value for key, value in case.inputs.items() if key != "labels"}
    *before, _, normed = model.streams(**masks)  # theirs have the norm in the place of the last layer
    for number, stream in enumerate([*before, normed]):
        there = expected.get(f"stream_{number}")
        if there is not None and parity.largest_difference(stream[shown], there[shown]) > tolerance:
            return f"from stream {number} on"
    return "though the streams are not"


def check_saving(model: huggingface.Pretrained, folder: Path, options: dict[str, object]) -> str:
    """What is wrong with the folder that the model is saved in, if anything is."""
    copy = folder.with_name("copy")
    huggingface.save(model, copy, shard_bytes=10_000)
    again = huggingface.load(copy, **options)
    alike = jax.tree.map(np.array_equal, model.parameters, again.parameters)
    if again.source != model.source or not all(jax.tree.leaves(alike)):
        return "loaded, saved and loaded again it is another model"
    ours, theirs = Checkpoint(copy), Checkpoint(folder)
    if sorted(ours.names) != sorted(theirs.names):
        return f"saved with other tensors: {sorted(set(ours.names) ^ set(theirs.names))[0]}"
    for name in ours.names:
        a, b = ours.read(name), theirs.read(name)
        if (a.dtype, a.shape, a.tobytes()) != (b.dtype, b.shape, b.tobytes()):
            return f"saved with other numbers: {name}"
    return ""


def print_result(case: Case, result: Result, seconds: float) -> None:
    """One line; of a case that failed also what it was."""
    state = "ok  " if not result.problem else "FAIL"
    print(
        f"{state} {case.family} {result.number}: logits {result.logits:.1e}, loss {result.loss:.1e}, "
        f"gradients {result.gradients:.1e}; noise {result.noise:.1e}, gain {result.gain:.2f}, "
        f"{case.traits.length} tokens, {seconds:.1f} s {result.problem}",
        flush=True,
    )
    if result.problem:
        print(f"     {'old' if case.old else 'new'} config.json, {case.traits}", flush=True)
        print(f"     {json.dumps(case.config)}", flush=True)


def print_summary(results: dict[str, list[Result]]) -> None:
    """The largest errors of each family."""
    table = Table("family", "cases", "failed", "logits", "loss", "gradients", "float32 noise", "smallest gain")
    for family, found in results.items():
        largest = (max(getattr(one, field) for one in found) for field in ("logits", "loss", "gradients", "noise"))
        failed, gain = sum(bool(one.problem) for one in found), min(one.gain for one in found)
        table.add_row(family, str(len(found)), str(failed), *(f"{x:.1e}" for x in largest), f"{gain:.2f}")
    Console(width=120).print(table)


def main() -> None:
    """Checks all families, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", required=True, help="a Python that has torch and transformers")
    parser.add_argument("--family", nargs="+", choices=sorted(FAMILIES), default=sorted(FAMILIES))
    parser.add_argument("--cases", type=int, default=20, help="for each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="the cases of these numbers")
    options = parser.parse_args()
    keep_to_cores()
    results: dict[str, list[Result]] = {}
    with OtherProcess(options.torch, "torch_checkpoints.py") as torch:
        versions = torch.ask(do="versions")
        print(", ".join(f"{name} {version}" for name, version in versions.items()), f"jax {jax.__version__}", sep=", ")
        for family in options.family:
            for number in options.only or range(options.cases):
                start = time.perf_counter()
                result = check(torch, family, options.seed, number)
                case = draw_case(family, options.seed, number)
                print_result(case, result, time.perf_counter() - start)
                results.setdefault(family, []).append(result)
            jax.clear_caches()
    print_summary(results)
    sys.exit(any(one.problem for found in results.values() for one in found))


if __name__ == "__main__":
    main()
