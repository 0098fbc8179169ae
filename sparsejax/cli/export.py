"""`sparsejax export`."""

from __future__ import annotations

import argparse

from rich.console import Console

from sparsejax.cli.arguments import add_checkpoint
from sparsejax.errors import InputError
from sparsejax.paths import local_path

EXAMPLE = "sparsejax export runs/mistral exported/mistral --step=best"
OVERRIDES = ()
EXIT_CODES: dict[type[Exception], int] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    add_checkpoint(parser)
    parser.add_argument("folder", metavar="FOLDER", help="folder to write, which must not exist")
    parser.add_argument(
        "--family",
        metavar="NAME",
        help="model_type of the folder, such as mistral; defaults to that of the folder from which the run started, or"
        " to the first family that expresses the model",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the tensors; defaults to float32"
    )
    parser.add_argument("--ema", action="store_true", help="export the average of the parameters (optimizer.ema)")


def run(options: argparse.Namespace, console: Console) -> None:
    """Writes the folder."""
    if local_path(options.folder, "folder").exists():  # before the model is loaded
        raise InputError("folder", f"{options.folder}: exists already")
    from sparsejax.interop.huggingface import export  # needs safetensors
    from sparsejax.loading import load  # imports grain and Orbax

    model = load(options.model, step=options.step, tokenizer=options.tokenizer, ema=options.ema)
    written = export(model, options.folder, family=options.family, dtype=options.dtype)
    step = "" if model.step is None else f"step {model.step}: "
    files = ", ".join(("config.json", *written.files))
    console.print(
        f"{step}{written.folder}: {written.family}, {written.parameters:,} parameters in {options.dtype},"
        f" {written.tensors} tensors, {files}",
        highlight=False,
    )
