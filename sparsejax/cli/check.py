"""`sparsejax check`."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from sparsejax.check import CheckFailed, Finding, check_model
from sparsejax.cli.arguments import add_config
from sparsejax.cli.exit_codes import VERIFICATION_FAILED
from sparsejax.config import ModelConfig
from sparsejax.errors import InputError

EXAMPLE = "sparsejax check --config=preset:jamba"
OVERRIDES = ("config",)
EXIT_CODES: dict[type[Exception], int] = {CheckFailed: VERIFICATION_FAILED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    subject = parser.add_mutually_exclusive_group(required=True)
    add_config(parser, subject)
    subject.add_argument("--hf", metavar="PATH", help="a Hugging Face model: its folder or its config.json")
    subject.add_argument("workdir", nargs="?", metavar="WORKDIR", help="the folder of a run")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="KEY",
        help="with --hf: a key of config.json to leave out; can be repeated",
    )
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="most tokens per sequence; by default a length that crosses every edge of the patterns",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the parameters and the tokens")
    parser.add_argument("--json", action="store_true", help="print the certificate as JSON")


def run(options: argparse.Namespace, console: Console) -> None:
    """Checks a model."""
    if options.length is not None and options.length < 1:
        raise InputError("length", f"{options.length} is below 1")
    if options.ignore and not options.hf:
        raise InputError("ignore", "needs --hf")
    config, length = _read_subject(options)

    def show_progress(finding: Finding) -> None:
        status.update(f"checked {finding.name}")

    with console.status("compiling") as status:
        certificate = check_model(config, options.length or length, seed=options.seed, report=show_progress)
    if options.json:
        print(json.dumps(certificate.to_dict(), indent=2))
    else:
        certificate.print(console)
    certificate.require()


def _read_subject(options: argparse.Namespace) -> tuple[ModelConfig, int | None]:
    """The model, and the length for which it is configured."""
    if options.hf:
        from sparsejax.interop import huggingface

        return huggingface.describe(options.hf, None, options.ignore)[0], None
    from sparsejax import config as configs

    if options.workdir:
        from sparsejax.loading import read_run

        run = read_run(options.workdir)
    else:
        run = configs.check(configs.load(options.config, options.overrides["config"]))
    return run.model, run.data.length
