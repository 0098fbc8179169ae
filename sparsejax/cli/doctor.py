"""`sparsejax doctor`."""

from __future__ import annotations

import argparse

from rich.console import Console

from sparsejax import doctor
from sparsejax.cli.exit_codes import VERIFICATION_FAILED

EXAMPLE = "sparsejax doctor"
OVERRIDES = ()
EXIT_CODES: dict[type[Exception], int] = {doctor.VerificationError: VERIFICATION_FAILED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no options."""


def run(options: argparse.Namespace, console: Console) -> None:
    """Checks the attention implementations of this machine."""
    doctor.run_doctor(console)
