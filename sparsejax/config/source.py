"""Addresses of trained models in a configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from sparsejax.errors import InputError
from sparsejax.paths import local_path

FORMS = "hf:FOLDER, run:WORKDIR, run:WORKDIR@STEP or run:WORKDIR@best"


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A trained model: a Hugging Face folder, or a checkpoint of a run.

    Attributes:
      kind: "hf" or "run".
      path: The folder, or the workdir.
      step: Step of the checkpoint, "last" or "best"; "last" for a Hugging Face folder.
    """

    kind: Literal["hf", "run"]
    path: str
    step: int | Literal["last", "best"] = "last"

    @classmethod
    def parse(cls, text: str) -> ModelSource:
        """Parses `hf:FOLDER`, `run:WORKDIR`, `run:WORKDIR@STEP` or `run:WORKDIR@best`.

        Raises:
          InputError: The text has another form; the argument is "source".
        """
        kind, colon, path = text.partition(":")
        if not colon or kind not in ("hf", "run") or not path:
            raise InputError("source", f"{text!r}: expected {FORMS}")
        if kind == "hf":
            return cls("hf", path)
        folder, at, step = path.rpartition("@")
        if not at:
            return cls("run", path)
        if step in ("last", "best"):
            return cls("run", folder, "best" if step == "best" else "last")
        if not step.isdigit() or not folder:
            raise InputError("source", f"{text!r}: {step!r} is no step; expected {FORMS}")
        return cls("run", folder, int(step))

    def resolve(self) -> ModelSource:
        """Returns the source with the absolute path of its folder."""
        return dataclasses.replace(self, path=str(Path(local_path(self.path, "source")).resolve()))

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}" + ("" if self.step == "last" else f"@{self.step}")
