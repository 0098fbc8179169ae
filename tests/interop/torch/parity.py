"""Compares the Hugging Face importer with transformers on random configurations of every family.

    python -m tests.interop.torch.parity --torch=TORCH_PYTHON [--family NAME ...] [--cases N] [--seed S] [--only NUMBER]

TORCH_PYTHON is a Python interpreter with torch and transformers. It writes models and their outputs; this process loads
a model, runs and differentiates it, saves it and loads it again. The exit code is 1 if an error exceeds its tolerance.
`tests/interop/torch/test_parity.py` runs the first cases of every family.
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

from benchmarks.harness import OtherProcess, pin_cores, print_rows
from sparsejax.interop import huggingface
from sparsejax.interop.huggingface import parity
from sparsejax.interop.huggingface.checkpoint import Checkpoint
from sparsejax.loaded import LoadedModel
from tests.interop.torch.random_models import FAMILIES, Case, draw_case

WORKER = "tests.interop.torch.reference"


@dataclasses.dataclass
class Result:
    """Errors of a case; `problem` is empty if it passes."""

    number: int
    logits: float = 0.0
    loss: float = 0.0
    gradients: float = 0.0
    tensor: str = ""  # with the largest gradient error
    noise: float = 0.0
    gain: float = 1.0
    problem: str = ""


def check(torch: OtherProcess, family: str, seed: int, number: int) -> Result:
    """Runs a case in a temporary folder."""
    case = draw_case(family, seed, number)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        response = torch.request(do="make", family=family, seed=seed, number=number, folder=str(folder))
        if "error" in response:
            return Result(number, problem=f"transformers: {response['error']}")
        result = Result(number, noise=response["noise"], gain=response["gain"])
        try:
            compare(case, folder, result)
        except Exception as error:  # a failure is reported like a difference
            result.problem = f"{type(error).__name__}: {error}".splitlines()[0]
    return result


def compare(case: Case, folder: Path, result: Result) -> None:
    """Compares a model with its recorded outputs, and sets the fields of the result."""
    expected = dict(np.load(folder / "outputs.npz"))
    options = read_options(case, expected)
    model = huggingface.load(folder, **options)
    logits, loss, gradients = parity.measure(model, **case.inputs)
    valid = case.inputs["attention_mask"].astype(bool)
    result.logits = parity.max_difference(logits[valid], expected["logits"][valid])
    result.loss = parity.max_difference(loss, expected["loss"])
    if case.traits.gradients:
        recorded = Checkpoint(folder / "gradients")
        errors = parity.compare_gradients(gradients, {name: recorded.read(name) for name in gradients})
        result.tensor, result.gradients = max(errors.items(), key=lambda item: item[1])
    tolerance = parity.TOLERANCES[case.family]
    if max(result.logits, result.loss) > tolerance:
        result.problem = f"logits differ, {find_stream(case, model, expected, tolerance)}"
    elif result.gradients > parity.GRADIENTS:
        result.problem = f"the gradient of {result.tensor} differs"
    else:
        result.problem = check_saving(model, folder, options)


def read_options(case: Case, expected: dict[str, np.ndarray]) -> dict[str, object]:
    """Random numbers of the recorded forward pass, as options of `load`."""
    drawn = [expected[f"drawn_{i}"] for i in range(sum(key.startswith("drawn_") for key in expected))]
    if case.traits.plans:
        return {"random_plans": [plan.astype(int) for plan in drawn]}
    return {"lsh_rotations": drawn[0]} if drawn else {}


def find_stream(case: Case, model: LoadedModel, expected: dict[str, np.ndarray], tolerance: float) -> str:
    """Describes the first residual stream that differs."""
    valid = case.inputs["attention_mask"].astype(bool)
    masks = {key: value for key, value in case.inputs.items() if key != "labels"}
    *streams, _, normed = model.streams(**masks)  # transformers returns the last stream after the norm only
    for number, stream in enumerate([*streams, normed]):
        recorded = expected.get(f"stream_{number}")
        if recorded is None or recorded.shape != stream.shape:  # transformers returns one of Reformer's two streams
            continue
        if parity.max_difference(stream[valid], recorded[valid]) > tolerance:
            return f"from stream {number}"
    return "but not the streams"


def check_saving(model: LoadedModel, folder: Path, options: dict[str, object]) -> str:
    """Describes the difference between a model and its saved copy; empty if there is none."""
    copy = folder.with_name("copy")
    huggingface.save(model, copy, shard_bytes=10_000)
    loaded = huggingface.load(copy, **options)
    equal = jax.tree.map(np.array_equal, model.parameters, loaded.parameters)
    if loaded.source.hf_config != model.source.hf_config or not all(jax.tree.leaves(equal)):
        return "the saved model differs when it is loaded"
    saved, original = Checkpoint(copy), Checkpoint(folder)
    if sorted(saved.names) != sorted(original.names):
        return f"a tensor is missing or new in the saved model: {min(set(saved.names) ^ set(original.names))}"
    for name in saved.names:
        a, b = saved.read(name), original.read(name)
        if (a.dtype, a.shape, a.tobytes()) != (b.dtype, b.shape, b.tobytes()):
            return f"the saved tensor differs: {name}"
    return ""


def print_result(case: Case, result: Result, seconds: float) -> None:
    """Prints a line per case, and the configuration of a case that failed."""
    state = "ok  " if not result.problem else "FAIL"
    print(
        f"{state} {case.family} {result.number}: logits {result.logits:.1e}, loss {result.loss:.1e}, "
        f"gradients {result.gradients:.1e}; noise {result.noise:.1e}, gain {result.gain:.2f}, "
        f"{case.traits.length} tokens, {seconds:.1f} s {result.problem}",
        flush=True,
    )
    if result.problem:
        print(f"     {'old' if case.legacy else 'new'} config.json, {case.traits}", flush=True)
        print(f"     {json.dumps(case.config)}", flush=True)


def print_summary(results: dict[str, list[Result]]) -> None:
    """Prints the largest errors per family."""
    rows = []
    for family, cases in results.items():
        largest = {
            name: max(getattr(case, name) for case in cases) for name in ("logits", "loss", "gradients", "noise")
        }
        counts = {"cases": len(cases), "failed": sum(bool(case.problem) for case in cases)}
        rows.append({"family": family} | counts | largest | {"smallest gain": min(case.gain for case in cases)})
    print_rows(rows)


def main() -> int:
    """Checks the families of the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", required=True, help="a Python interpreter with torch and transformers")
    parser.add_argument("--family", nargs="+", choices=sorted(FAMILIES), default=sorted(FAMILIES))
    parser.add_argument("--cases", type=int, default=20, help="cases per family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the cases to run; all by default")
    options = parser.parse_args()
    pin_cores()
    results: dict[str, list[Result]] = {}
    with OtherProcess(options.torch, WORKER) as torch:
        print({"jax": jax.__version__} | torch.request(do="versions"))
        for family in options.family:
            for number in options.only or range(options.cases):
                start = time.perf_counter()
                result = check(torch, family, options.seed, number)
                case = draw_case(family, options.seed, number)
                print_result(case, result, time.perf_counter() - start)
                results.setdefault(family, []).append(result)
            jax.clear_caches()
    print_summary(results)
    return int(any(case.problem for cases in results.values() for case in cases))


if __name__ == "__main__":
    sys.exit(main())
