"""What a configuration says of the data: sources, tokens, windows and the objective."""

from __future__ import annotations

import dataclasses
from typing import Any

from sparsejax.data.probes import PROBES

OBJECTIVES = ("causal", "masked", "prefix", "classify")
PACKINGS = ("none", "packed")
UNITS = ("token", "word", "span")


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """Which tokens a masked model must find again (BERT, arXiv:1810.04805), and what stands in their place.

    `unit`: "token", "word" (whole words) or "span" (runs of geometric length, SpanBERT, arXiv:1907.10529).
    """

    share: float = 0.15  # of the tokens of a row
    unit: str = "token"
    masked: float = 0.8  # of the chosen tokens: the mask token stands there
    random: float = 0.1  # of the chosen tokens: a random token; the others stay as they are
    span: float = 3.8  # tokens of a span on average, before spans are clipped
    longest: int = 10  # tokens of a span at most

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {self.share}")
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {self.unit!r}")
        if self.masked < 0 or self.random < 0 or self.masked + self.random > 1:
            raise ValueError(f"masked = {self.masked} and random = {self.random} must be shares of 1")
        if self.span < 1 or self.longest < 1:
            raise ValueError(f"span = {self.span} and longest = {self.longest} must be at least 1")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from, and what is to be predicted.

    `task` is "text" or the name of a probe of `data.probes.PROBES`, whose own keys are the section `probe`.
    """

    task: str
    files: str  # a file, folder, glob, several by commas; empty: CPython's own text
    length: int  # tokens of a window
    validation: str = ""  # files that are held out; empty: some of `files`, see `load_corpus`
    tfds: str = ""  # instead of files: "name:version" of a TFDS set
    tfds_dir: str = ""  # where TFDS sets are; empty: TFDS's own default
    train_split: str = "train"  # of the TFDS set, with its slices, such as "train[:90%]"
    validation_split: str = "validation"
    field: str = "text"  # of jsonl, parquet and TFDS: which field is the text
    label: str = ""  # and which is the class, for the objective "classify"
    separator: str = ""  # what separates documents in a text file, with escapes like \n; empty: a file is a document
    tokenizer: str = "bytes"  # "bytes", "chars", "bpe:SIZE", or a file: tokenizers JSON or SentencePiece model
    cache: str = ""  # folder of tokenised corpora; empty: ~/.cache/sparsejax, and none for bytes that fit in memory
    packing: str = "none"  # "none": windows of one stream; "packed": whole documents, kept apart by segments
    objective: str = "causal"  # "causal", "masked", "prefix" or "classify"
    mask: MaskConfig = MaskConfig()  # for "masked"
    prefix: int = 0  # for "prefix": tokens of a window that are given
    probe: Any = None

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")
        if self.task not in ("text", *PROBES):
            raise ValueError(f"task must be one of text, {', '.join(PROBES)}, got {self.task!r}")
        if self.task != "text" and (self.objective, self.packing) != ("causal", "none"):
            raise ValueError(f"objective and packing: the probe {self.task} has its own")
        if self.task != "text" and self.probe is None:
            object.__setattr__(self, "probe", PROBES[self.task]())
        for name, options in (("objective", OBJECTIVES), ("packing", PACKINGS)):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, got {getattr(self, name)!r}")
        if self.tfds and (self.files or self.validation):
            raise ValueError("files and tfds: one of them must be empty")
        if self.objective == "prefix" and not 1 <= self.prefix < self.length:
            raise ValueError(f"prefix = {self.prefix} must leave some of length = {self.length} to predict")
        if self.objective == "prefix" and self.packing == "packed":
            raise ValueError("packing: a prefix is the start of a window, and packed windows hold several documents")
        if self.objective == "classify" and (self.packing == "packed" or not self.label):
            raise ValueError("objective: classify needs label, the field of the class, and packing = 'none'")
