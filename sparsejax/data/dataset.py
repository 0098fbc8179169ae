"""Data sets: the rows that the `data` section of a configuration describes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from sparsejax.data.batches import (
    Transform,
    fresh_batches,
    ordered_batches,
    require_window,
    shuffled_batches,
)
from sparsejax.data.config import DataConfig
from sparsejax.data.errors import DataError
from sparsejax.data.objectives import apply_objective
from sparsejax.data.probes import PROBES
from sparsejax.data.rows import Batch, Examples, Labelled, Packed, Rows, Windows
from sparsejax.data.text import Corpus, Side, build_corpus, load_corpus
from sparsejax.data.tokenizers import Tokenizer, vocabulary

if TYPE_CHECKING:
    import grain

HELD_OUT_EXAMPLES = 1024  # of a probe that generates its validation examples
ENDLESS = 1 << 48  # training examples of a probe
IMPLICIT = ("tokens", "rows", "row_length", "restored")  # counts that `describe` reports elsewhere
LABELS = {  # of counts whose names `describe` does not print
    "documents": "documents used",
    "repeated_documents": "of them in the training text",
}
MASK_SEED = 0  # for validation text, the same in every run


class Sharing(TypedDict):
    """Share of a process in every global batch."""

    process_index: int
    process_count: int


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Training and validation rows of a run.

    Attributes:
      config: The configuration.
      training: Training rows.
      held_out: Validation rows.
      vocab: Vocabulary size that a model needs.
      digest: Changes with any text, its split, and the tokenizer.
      tokenizer: The tokenizer; None for a probe.
      corpus: The text; None for a probe.
      counts: Numbers of documents and tokens, for the record.
    """

    config: DataConfig
    training: Rows
    held_out: Rows
    vocab: int
    digest: str
    tokenizer: Tokenizer | None
    corpus: Corpus | None
    counts: dict[str, Any]

    @property
    def scores_accuracy(self) -> bool:
        """Whether the task asks for particular tokens, so that accuracy is meaningful."""
        return self.corpus is None or self.config.objective in ("masked", "classify")

    @property
    def is_generative(self) -> bool:
        """Whether a model trained on it can continue a text."""
        return self.corpus is not None and self.config.objective in ("causal", "prefix")

    @property
    def tokens_per_byte(self) -> float | None:
        """Ratio that converts bits per token into bits per byte; None unless all tokens are predicted.

        Only bytes that decoding gives back count: those that a tokenizer loses cost no bits, and counting them would
        make its bits per byte too low.
        """
        if self.corpus is None or not self.is_generative:
            return None
        side = self.corpus.held_out
        return len(side.tokens) / (side.bytes * side.restored)

    @property
    def tokens_per_character(self) -> float | None:
        """Ratio that converts bits per token into bits per character; None unless all tokens are predicted."""
        if self.corpus is None or not self.is_generative:
            return None
        side = self.corpus.held_out
        return len(side.tokens) / (side.characters * side.restored_characters)

    @property
    def restored(self) -> float:
        """Fraction of the bytes of the validation text that decoding the tokens gives back; 1 for probes."""
        return 1.0 if self.corpus is None else self.corpus.held_out.restored

    def train_batches(
        self, batch: int, seed: int, *, process_index: int = 0, process_count: int = 1
    ) -> grain.DatasetIterator:
        """Iterates endlessly over training batches, a function of `seed` and step; see `shuffled_batches`."""
        sharing = Sharing(process_index=process_index, process_count=process_count)
        if isinstance(self.training, Examples):
            return fresh_batches(dataclasses.replace(self.training, seed=seed), batch, **sharing)
        return shuffled_batches(self.training, batch, seed, transform=self._transform(seed), **sharing)

    def validation_batches(
        self, batch: int, *, limit: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """Iterates over the validation rows in order; see `ordered_batches`."""
        sharing = Sharing(process_index=process_index, process_count=process_count)
        return ordered_batches(self.held_out, batch, limit=limit, transform=self._transform(MASK_SEED), **sharing)

    def describe(self) -> list[str]:
        """Describes the text and the rows made of it, one fact per line."""
        if self.corpus is None:
            held_out = f"{len(self.held_out):,} examples to validate"
            return [f"probe: {self.config.probe}, {held_out}, digest {self.digest}"]
        corpus, unit = self.corpus, "bytes" if self.config.tokenizer == "bytes" else "tokens"
        lines = [
            f"text: {len(corpus.train):,} {unit} to train on, {len(corpus.validation):,} to validate"
            f" ({corpus.train_files} and {corpus.validation_files} files), digest {self.digest}",
            *corpus.notes,
        ]
        for name in ("training", "validation"):
            counts = self.counts[name]
            shown = (key for key in counts if key not in IMPLICIT and counts[key])
            facts = (f"{counts[key]:,} {LABELS.get(key, key.replace('_', ' '))}" for key in shown)
            lines.append(f"{name}: {', '.join(facts)}; {counts['rows']:,} rows of {counts['row_length']:,}")
        for side, name in ((corpus.training, "training"), (corpus.held_out, "validation")):
            if side.restored < 1:
                lines.append(
                    f"warning: of the {name} text, tokenizer {self.config.tokenizer} gives back {side.restored:.4%} of"
                    " the bytes; bits per byte and per character count what it gives back"
                )
        return lines

    def require_vocabulary(self, vocab: int) -> None:
        """Checks that a model of `vocab` ids has an id for every token.

        Raises:
          DataError: It does not.
        """
        if vocab < self.vocab:
            source = self.config.task if self.corpus is None else f"data.tokenizer = {self.config.tokenizer!r}"
            objective = self.config.objective
            source += f" with data.objective = {objective!r}" if objective != "causal" else ""
            raise DataError("model.vocab", f"{vocab} is too small; {source} needs {self.vocab}")

    def _transform(self, seed: int) -> Transform | None:
        tokenizer = self.tokenizer
        if tokenizer is None or self.config.objective in ("causal", "classify"):
            return None
        return lambda batch, numbers: apply_objective(self.config, tokenizer, batch, seed, numbers)


def load_dataset(
    config: DataConfig,
    stride: int = 0,
    corpus: Corpus | None = None,
    *,
    recorded: bytes | None = None,
    split: bool = True,
) -> Dataset:
    """Reads, tokenizes and packs the data of a configuration.

    Args:
      config: The configuration.
      stride: Tokens between the starts of adjacent validation windows; 0 stands for `config.length`. See `Windows`.
      corpus: The text of `config` if it is loaded already, for instance for rows of another length.
      recorded: Content of the tokenizer's file in the workdir of a run, see `load_tokenizer`.
      split: Whether there is training text; otherwise all of `config.files` is validation text, however short.

    Raises:
      DataError: The data cannot be read, or are too small.
    """
    if config.task != "text":
        return _load_probe(config)
    return _cut_text(config, _read_text(config, recorded, split) if corpus is None else corpus, stride, split)


def _load_probe(config: DataConfig) -> Dataset:
    probe = PROBES[config.task]() if config.probe is None else config.probe
    digest = hashlib.sha256(repr(probe).encode()).hexdigest()[:16]
    count = HELD_OUT_EXAMPLES if probe.held_out is None else probe.held_out
    held_out = Examples(probe, 0, count, validation=True)
    training = Examples(probe, 0, ENDLESS)
    scored = float(held_out.take(np.zeros(1, np.int64))["weights"].sum())
    counts = {"probe": config.task, "length": probe.length, "vocab": probe.vocab, "validation_examples": count}
    return Dataset(config, training, held_out, probe.vocab, digest, None, None, counts | {"scored": scored})


def _read_text(config: DataConfig, recorded: bytes | None, split: bool) -> Corpus:
    if config.tfds:
        from sparsejax.data.tfds import TfdsSource  # TFDS takes seconds to import

        return build_corpus(TfdsSource(config), config.tokenizer, config.cache, recorded)
    return load_corpus(
        config.files,
        validation=config.validation,
        field=config.field,
        separator=config.separator,
        label=config.label,
        read_as=config.read_as,
        tokenizer=config.tokenizer,
        cache=config.cache,
        recorded=recorded,
        split=split,
    )


def _cut_text(config: DataConfig, corpus: Corpus, stride: int, split: bool) -> Dataset:
    if split and config.objective != "classify" and config.packing == "none":
        require_window(corpus.train, config.length, "training")
        require_window(corpus.validation, config.length, "validation")
    training = _rows(config, corpus, corpus.training, drop_last=True)
    held_out = _rows(config, corpus, corpus.held_out, stride, drop_last=False)
    for rows, side in ((training, "training"), (held_out, "validation")):
        if not len(rows) and (split or rows is held_out):
            missing = f"the {side} text has no documents" if split else "there is no token to predict"
            raise DataError("data.files", missing)
    vocab = vocabulary(corpus.tokenizer, config.objective == "masked")
    if config.objective == "classify":
        vocab = max(vocab, int(max(side.labels.max(initial=-1) for side in (corpus.training, corpus.held_out))) + 1)
    sides = {"training": (corpus.training, training), "validation": (corpus.held_out, held_out)}
    counts: dict[str, Any] = {name: _count(side, rows) for name, (side, rows) in sides.items()}
    counts |= {"digest": corpus.digest, "files": corpus.files, "tokenizer": config.tokenizer}
    counts |= {"tokenizer_digest": corpus.tokenizer.digest, "vocab": vocab}
    return Dataset(config, training, held_out, vocab, corpus.digest, corpus.tokenizer, corpus, counts)


def _rows(config: DataConfig, corpus: Corpus, side: Side, stride: int = 0, *, drop_last: bool) -> Rows:
    if config.objective == "classify":
        return Labelled(side.tokens, side.documents, side.labels, config.length)
    if config.packing == "packed":
        return Packed(side.tokens, side.documents, corpus.tokenizer.separator, config.length, stride)
    return Windows(side.tokens, config.length, stride, drop_last)


def _count(side: Side, rows: Rows) -> dict[str, int | float]:
    counts = {
        "documents_read": side.read,
        "empty_documents": side.empty,
        "documents": len(side.documents),
        "repeated_documents": side.repeated,
        "bytes": side.bytes,
        "characters": side.characters,
        "restored": side.restored,
        "tokens": len(side.tokens),
        "rows": len(rows),
        "row_length": rows.length,
    }
    return counts | rows.counts()
