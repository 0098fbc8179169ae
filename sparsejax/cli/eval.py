"""`sparsejax eval`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsejax.cli.arguments import add_model, add_overrides, load_model
from sparsejax.cli.exit_codes import INTERRUPTED
from sparsejax.cli.progress import WorkProgress
from sparsejax.errors import InputError
from sparsejax.metrics import finite_or_none
from sparsejax.paths import local_path
from sparsejax.signals import Interrupted, StopSignals
from sparsejax.workdir import write_json

EXAMPLE = "sparsejax eval runs/quickstart --data.files='books/*.txt' --data.length=1024 --stride=512"
OVERRIDES = ("data",)
EXIT_CODES = {Interrupted: INTERRUPTED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    add_model(parser)
    add_overrides(
        parser,
        "data",
        "a key of the section data, such as --data.files=FILES, all of which is evaluated, --data.length=N or"
        " --data.task=passkey; by default the validation text of the run",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens between the starts of windows, each of which scores its last N tokens; defaults to eval.stride of"
        " the run, or to data.length for another text",
    )
    parser.add_argument("--batch", type=int, metavar="N", help="rows per call of the model; defaults to eval.batch")
    parser.add_argument(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="largest number of batches, spread evenly over the rows; 0 for all",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--out", metavar="FILE", help="write the result as JSON to this file, in one step")


def run(options: argparse.Namespace, console: Console) -> None:
    """Evaluates a model."""
    for name in ("limit", "stride"):
        if (getattr(options, name) or 0) < 0:
            raise InputError(name, f"{getattr(options, name)} is below 0")
    out = None if options.out is None else _check_out(options.out)
    model = load_model(options)
    with WorkProgress("eval", "batch") as report, StopSignals() as signals, signals.raising("in the evaluation"):
        assessment = model.evaluate(
            options.overrides["data"],
            stride=options.stride,
            batch=options.batch,
            limit=options.limit,
            progress=report.advance,
        )
    result = _describe(model, assessment)
    if out is not None:
        write_json(out, result)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        _print(assessment, result, console)


def _check_out(path: str) -> Path:
    """Returns the path of the result, after a check that it can be written."""
    out = local_path(path, "out")
    if out.is_dir() or not out.parent.is_dir():
        raise InputError("out", f"{out}: {'is a folder' if out.is_dir() else f'no folder {out.parent}'}")
    if not os.access(out.parent, os.W_OK):
        raise InputError("out", f"{out.parent} is not writable")
    return out


def _describe(model: Any, assessment: Any) -> dict[str, Any]:
    evaluation, dataset = assessment.evaluation, assessment.dataset
    result = {
        "step": model.step,
        "data": {
            "task": dataset.config.task,
            "files": dataset.config.files,
            "length": dataset.held_out.length,
            "digest": dataset.digest,
        },
        "tokens": evaluation.tokens,
        "metrics": finite_or_none(assessment.metrics),
        "bits_by_position": [list(entry) for entry in evaluation.position_bins()],
    }
    if evaluation.accuracy is not None:
        result["accuracy_by_distance"] = [list(entry) for entry in evaluation.accuracy.distance_bins()]
    return result


def _print(assessment: Any, result: dict[str, Any], console: Console) -> None:
    from sparsejax.train.display import print_evaluation  # imports grain

    print_evaluation(assessment.evaluation, assessment.dataset, console)
    loss, perplexity = assessment.evaluation.loss, assessment.evaluation.perplexity
    step = "" if result["step"] is None else f"step {result['step']}: "
    console.print(f"{step}loss {loss:.4f} nats/token, perplexity {perplexity:.4f}", highlight=False)
