"""Addresses of trained models in a configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from sparsejax.errors import InputError
from sparsejax.paths import local_path
from sparsejax.workdir import Workdir, read_json

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

    def exists(self) -> bool:
        """Whether the folder exists on this machine."""
        try:
            return local_path(self.path, "source").is_dir()
        except InputError:  # in a bucket
            return False

    def find_tokenizer(self) -> str | None:
        """Returns the value of `data.tokenizer` for the tokenizer of the model; None if the folder has none."""
        folder = local_path(self.path, "source").resolve()
        workdir = Workdir(folder)
        for path in (workdir.tokenizer, workdir.sentencepiece):  # named as in a Hugging Face folder
            if path.is_file():
                return str(path)
        recorded = read_json(workdir.config) if self.kind == "run" and workdir.exists() else {}
        return recorded.get("data", {}).get("tokenizer")

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}" + ("" if self.step == "last" else f"@{self.step}")
