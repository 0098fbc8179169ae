"""A data set: what `data` in a configuration stands for, as rows to train on and rows to hold out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from sparsejax.data.batches import fresh_batches, ordered_batches, require_window, shuffled_batches
from sparsejax.data.config import DataConfig
from sparsejax.data.errors import DataError
from sparsejax.data.objectives import apply_objective
from sparsejax.data.probes import PROBES
from sparsejax.data.rows import Batch, Examples, Labelled, Packed, Rows, Windows
from sparsejax.data.text import Corpus, Side, build_corpus, load_corpus
from sparsejax.data.tokenizers import Tokenizer, vocabulary

EXAMPLES = 1024  # of a probe that are held out, if it does not say how many there are
ENDLESS = 1 << 48  # examples of a probe to train on
SHOWN = ("tokens", "rows", "row_length")  # counts that `describe` shows in another way
MASKS = 0  # the seed of the masks of validation text, the same in every run


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """What a run trains on and is measured by.

    Attributes:
      config: What it was made of.
      training: Rows to train on.
      held_out: Rows to hold out.
      vocab: Number of ids that a model needs.
      digest: Changes with any text or side and with the tokenizer.
      tokenizer: What the tokens mean; None of a probe.
      corpus: The text; None of a probe.
      counts: How many documents and tokens went in and came out, for the record.
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
    def answers(self) -> bool:
        """Whether single tokens are asked for, so that it counts how many are right."""
        return self.corpus is None or self.config.objective in ("masked", "classify")

    @property
    def generates(self) -> bool:
        """Whether a model of it can go on with a text."""
        return self.corpus is not None and self.config.objective in ("causal", "prefix")

    @property
    def tokens_per_byte(self) -> float | None:
        """Of the text held out, to tell bits per byte from bits per token; None where not all tokens are predicted."""
        return len(self.corpus.validation) / self.corpus.held_out.bytes if self.generates else None

    @property
    def tokens_per_character(self) -> float | None:
        """The same by characters."""
        return len(self.corpus.validation) / self.corpus.held_out.characters if self.generates else None

    def train_batches(
        self, batch: int, seed: int, *, process_index: int = 0, process_count: int = 1
    ) -> grain.DatasetIterator:
        """Endless batches to train on, a function of `seed` and the step alone; see `shuffled_batches`."""
        share = {"process_index": process_index, "process_count": process_count}
        if self.corpus is None:
            return fresh_batches(dataclasses.replace(self.training, seed=seed), batch, **share)
        return shuffled_batches(self.training, batch, seed, transform=self._transform(seed), **share)

    def validation_batches(
        self, batch: int, *, limit: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """The rows held out, in order; see `ordered_batches`."""
        share = {"process_index": process_index, "process_count": process_count}
        return ordered_batches(self.held_out, batch, limit=limit, transform=self._transform(MASKS), **share)

    def describe(self) -> list[str]:
        """What went in and what comes out, in lines."""
        if self.corpus is None:
            held_out = f"{len(self.held_out):,} examples to validate"
            return [f"probe: {self.config.probe}, {held_out}, digest {self.digest}"]
        corpus, unit = self.corpus, "bytes" if self.config.tokenizer == "bytes" else "tokens"
        lines = [
            f"text: {len(corpus.train):,} {unit} to train on, {len(corpus.validation):,} to validate"
            f" ({corpus.train_files} and {corpus.validation_files} files), digest {self.digest}"
        ]
        for name in ("training", "validation"):
            counts = self.counts[name]
            facts = (f"{counts[key]:,} {key.replace('_', ' ')}" for key in counts if key not in SHOWN and counts[key])
            lines.append(f"{name}: {', '.join(facts)}; {counts['rows']:,} rows of {counts['row_length']:,}")
        return lines

    def _transform(self, seed: int):
        if self.tokenizer is None or self.config.objective in ("causal", "classify"):
            return None
        return lambda batch, numbers: apply_objective(self.config, self.tokenizer, batch, seed, numbers)


def load_dataset(config: DataConfig, stride: int = 0, corpus: Corpus | None = None) -> Dataset:
    """Reads, tokenises and packs what a configuration names.

    Args:
      config: What to read.
      stride: Tokens from one window of validation text to the next; 0 is `config.length`. See `Windows`.
      corpus: The text that it names, if it was read before, for rows of another length.

    Raises:
      DataError: It cannot be read, or holds too little.
    """
    if config.task != "text":
        return _load_probe(config)
    return _cut_text(config, _read_text(config) if corpus is None else corpus, stride)


def _load_probe(config: DataConfig) -> Dataset:
    probe = PROBES[config.task]() if config.probe is None else config.probe
    digest = hashlib.sha256(repr(probe).encode()).hexdigest()[:16]
    count = EXAMPLES if probe.held_out is None else probe.held_out
    held_out = Examples(probe, 0, count, validation=True)
    training = Examples(probe, 0, ENDLESS)
    scored = float(held_out.take(np.zeros(1, np.int64))["weights"].sum())
    counts = {"probe": config.task, "length": probe.length, "vocab": probe.vocab, "validation_examples": count}
    return Dataset(config, training, held_out, probe.vocab, digest, None, None, counts | {"scored": scored})


def _read_text(config: DataConfig) -> Corpus:
    if config.tfds:
        from sparsejax.data.tfds import TfdsSource  # TFDS takes seconds to import

        return build_corpus(TfdsSource(config), config.tokenizer, config.cache)
    return load_corpus(
        config.files,
        validation=config.validation,
        field=config.field,
        separator=config.separator,
        label=config.label,
        tokenizer=config.tokenizer,
        cache=config.cache,
    )


def _cut_text(config: DataConfig, corpus: Corpus, stride: int) -> Dataset:
    if config.objective != "classify" and config.packing == "none":
        require_window(corpus.train, config.length, "training")
        require_window(corpus.validation, config.length, "validation")
    training = _rows(config, corpus, corpus.training, whole=True)
    held_out = _rows(config, corpus, corpus.held_out, stride, whole=False)
    for rows, side in ((training, "training"), (held_out, "validation")):
        if not len(rows):
            raise DataError(f"data.files: no documents on the {side} side")
    vocab = vocabulary(corpus.tokenizer, config.objective == "masked")
    if config.objective == "classify":
        vocab = max(vocab, int(max(corpus.training.labels.max(), corpus.held_out.labels.max())) + 1)
    sides = {"training": (corpus.training, training), "validation": (corpus.held_out, held_out)}
    counts = {name: _count(side, rows) for name, (side, rows) in sides.items()}
    counts |= {"digest": corpus.digest, "tokenizer": config.tokenizer, "vocab": vocab}
    return Dataset(config, training, held_out, vocab, corpus.digest, corpus.tokenizer, corpus, counts)


def _rows(config: DataConfig, corpus: Corpus, side: Side, stride: int = 0, *, whole: bool) -> Rows:
    if config.objective == "classify":
        return Labelled(side.tokens, side.documents, side.labels, config.length)
    if config.packing == "packed":
        return Packed(side.tokens, side.documents, corpus.tokenizer.separator, config.length, stride)
    return Windows(side.tokens, config.length, stride, whole)


def _count(side: Side, rows: Rows) -> dict[str, Any]:
    """What went in and what came out. Tokens that no row scores: the first, and what is left after the last window."""
    counts = {
        "documents_read": side.read,
        "empty_documents": side.empty,
        "documents": len(side.documents),
        "bytes": side.bytes,
        "characters": side.characters,
        "tokens": len(side.tokens),
        "rows": len(rows),
        "row_length": rows.length,
    }
    return counts | rows.counts()
