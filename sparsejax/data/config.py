"""The schema of the data section: sources, tokens, windows and the objective."""

from __future__ import annotations

import dataclasses

from sparsejax.data.kinds import READ_AS
from sparsejax.data.probes import PROBES, Probe
from sparsejax.errors import InputError, argument_path, require_at_least, require_choice

OBJECTIVES = ("causal", "masked", "prefix", "classify")
PACKINGS = ("none", "packed")
MAX_LENGTH = 2**24  # tokens per window
UNITS = ("token", "word", "span")


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """Tokens that a masked language model predicts (BERT, arXiv:1810.04805), and what replaces them in its input."""

    share: float = 0.15  # fraction of a row's tokens that are predicted
    # unit of masking: "token", "word" (whole words) or "span" (geometric lengths, SpanBERT, arXiv:1907.10529)
    unit: str = "token"
    masked: float = 0.8  # fraction of the predicted tokens that the mask token replaces
    random: float = 0.1  # fraction of the predicted tokens that a random token replaces; the others stay
    span: float = 3.8  # mean length of a span in tokens, before clipping
    longest: int = 10  # maximal length of a span in tokens

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError("share", f"{self.share} is not in (0, 1]")
        require_choice(self, "unit", UNITS)
        require_at_least(self, 0, "masked", "random")
        if self.masked + self.random > 1:
            raise InputError("masked", f"{self.masked} and random = {self.random} add up to more than 1")
        require_at_least(self, 1, "span", "longest")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """A source of a mixture. Keys that are not here, such as `tokenizer` and `length`, are those of the mixture."""

    weight: float  # rows of the source per row of the mixture, up to a common factor; 0 for validation only
    task: str = "text"  # as `data.task`
    files: str = dataclasses.field(default="", metadata={"resume": "none"})  # as `data.files`
    validation: str = dataclasses.field(default="", metadata={"resume": "none"})  # as `data.validation`
    tfds: str = ""  # as `data.tfds`
    tfds_dir: str = dataclasses.field(default="", metadata={"resume": "none"})  # as `data.tfds_dir`
    train_split: str = "train"  # as `data.train_split`
    validation_split: str = "validation"  # as `data.validation_split`
    read_as: str = "auto"  # as `data.read_as`
    field: str = "text"  # as `data.field`
    label: str = ""  # as `data.label`
    separator: str = ""  # as `data.separator`
    stream: bool = False  # as `data.stream`
    probe: Probe | None = dataclasses.field(default=None, metadata={"kind": "task"})  # as `data.probe`

    def __post_init__(self) -> None:
        require_at_least(self, 0, "weight")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Source of the tokens, tokenizer, windows and objective.

    `sources` mixes several sources by weight, instead of `files` and the other keys of one source:

        config.data.sources = dict(books=dict(files="books/*.txt", weight=0.7), code=dict(files="src", weight=0.3))

    Phases can set the weights.
    """

    task: str  # "text", or a probe, whose keys are then the section `probe`
    # a file, a folder or a glob of text, or several joined by commas, with double quotes around a path that has commas;
    # a folder of Hugging Face datasets; empty for the text that CPython ships
    files: str = dataclasses.field(metadata={"resume": "none"})
    length: int  # tokens per window
    # files of validation text; empty to hold out some of `files`, see `load_corpus`
    validation: str = dataclasses.field(default="", metadata={"resume": "none"})
    tfds: str = ""  # "name:version" of a TFDS data set, an alternative to `files`
    # folder of TFDS data sets; empty for the default of TFDS
    tfds_dir: str = dataclasses.field(default="", metadata={"resume": "none"})
    # training split of a data set with splits: of TFDS, with slices such as "train[:90%]", or of a folder that
    # `save_to_disk` of Hugging Face datasets wrote
    train_split: str = "train"
    validation_split: str = "validation"  # validation split of such a data set
    # "auto" recognizes every file by its content; "text" reads records as text; "bytes" reads files as they are stored
    read_as: str = "auto"
    field: str = "text"  # field of JSON, parquet, Arrow and TFDS records that holds the text
    label: str = ""  # field that holds the class, for the objective "classify"
    # separator of the documents of a text file, with escapes such as \n; empty: a file is a document
    separator: str = ""
    tokenizer: str = "bytes"  # "bytes", "chars", "bpe:SIZE", or a tokenizers JSON file or SentencePiece model
    # folder of tokenized corpora; empty for ~/.cache/sparsejax, which bytes that fit in memory skip
    cache: str = dataclasses.field(default="", metadata={"resume": "none"})
    packing: str = "none"  # "none" cuts windows from one stream; "packed" packs whole documents, split by segment ids
    objective: str = "causal"  # prediction of the next token, of masked tokens, of tokens after a prefix, or of a class
    # read and tokenize `files` during training, in bounded memory and without a cache; needs `validation`
    stream: bool = False
    buffer: int = 1024  # rows of a stream that are shuffled at once
    # readers of a stream, each with its own files and its own range of the rows of a batch; several processes read only
    # the files of their rows if it is a multiple of their number
    readers: int = 1
    mask: MaskConfig = MaskConfig()  # masking, for the objective "masked"
    prefix: int = 0  # tokens at the start of a window that are not predicted, for the objective "prefix"
    # keys of the probe that `task` names; none for text
    probe: Probe | None = dataclasses.field(default=None, metadata={"kind": "task"})
    sources: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)  # sources of a mixture by name

    def __post_init__(self) -> None:
        require_at_least(self, 1, "length", "buffer", "readers")
        if self.length > MAX_LENGTH:
            raise InputError("length", f"{self.length} is above {MAX_LENGTH}")
        require_choice(self, "task", ("text", *PROBES))
        if self.task != "text":
            self._set_up_probe()
        require_choice(self, "objective", OBJECTIVES)
        require_choice(self, "packing", PACKINGS)
        require_choice(self, "read_as", READ_AS)
        if self.read_as == "bytes" and self.tokenizer != "bytes":
            raise InputError("read_as", f"'bytes' needs tokenizer = 'bytes', which is {self.tokenizer!r}")
        if self.tfds and (self.files or self.validation):
            raise InputError("tfds", "cannot be combined with files or validation")
        if self.objective == "prefix" and not 1 <= self.prefix < self.length:
            raise InputError("prefix", f"{self.prefix} is not in [1, {self.length}), as length = {self.length}")
        if self.objective == "prefix" and self.packing == "packed":
            raise InputError("packing", "a packed window has several documents, but the prefix is that of the window")
        if self.objective == "classify" and self.packing == "packed":
            raise InputError("packing", "must be 'none' for the objective 'classify'")
        if self.stream:
            self._check_stream()
        elif self.readers > 1 and not any(source.stream for source in self.sources.values()):
            raise InputError("readers", f"{self.readers}: there is no stream; set stream = true")
        if self.sources:
            self._check_sources()
        elif self.objective == "classify" and not self.label:
            raise InputError("label", "is empty, but the objective 'classify' reads the class from this field")

    def _check_stream(self) -> None:
        if self.task != "text" or self.tfds:
            raise InputError("stream", "requires files, not a probe or a TFDS data set")
        if not (self.files and self.validation):
            name = "validation" if self.files else "files"
            raise InputError(name, "is empty; a stream is not split, so both files and validation are required")
        if self.objective == "classify":
            raise InputError("stream", "is true, but the objective 'classify' counts the classes of all text first")
        if self.tokenizer.startswith("bpe:"):
            raise InputError(
                "tokenizer",
                f"{self.tokenizer} is trained on all of the text, which a stream does not read; name a file",
            )

    def _check_sources(self) -> None:
        for field in dataclasses.fields(SourceConfig)[1:]:
            if getattr(self, field.name) != field.default:
                value = getattr(self, field.name)
                raise InputError(field.name, f"{value!r} cannot be combined with sources; set it per source")
        if not any(source.weight for source in self.sources.values()):
            raise InputError("sources", "every weight is 0")
        for name in self.sources:
            if not name or "/" in name:  # a metric has it as a suffix behind a slash
                raise InputError("sources", f"the name {name!r} is empty or contains '/'")
            with argument_path(f"sources.{name}"):
                self.source(name)

    def source(self, name: str) -> DataConfig:
        """Returns the configuration of a source alone; a probe is not packed."""
        source = self.sources[name]
        keys = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)[1:]}
        packing = self.packing if source.task == "text" else "none"
        readers = self.readers if source.stream else 1
        return dataclasses.replace(self, **keys, sources={}, packing=packing, readers=readers)

    def _set_up_probe(self) -> None:
        for name, default in (("objective", "causal"), ("packing", "none")):
            if getattr(self, name) != default:
                raise InputError(name, f"{getattr(self, name)!r} does not apply to the probe {self.task}")
        if self.probe is None:
            object.__setattr__(self, "probe", PROBES[self.task]())
