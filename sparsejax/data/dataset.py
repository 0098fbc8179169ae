"""Data sets: the rows that the `data` section of a configuration describes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypedDict

import numpy as np

from sparsejax.data.batches import Transform, draw_shuffled, numbered_batches, ordered_batches
from sparsejax.data.config import DataConfig
from sparsejax.data.errors import DataError
from sparsejax.data.files import hash_name
from sparsejax.data.mixture import Joined, MixedReader, MixtureOrder
from sparsejax.data.objectives import apply_objective
from sparsejax.data.rows import Batch, BatchIterator, Examples, RowReader, Rows
from sparsejax.data.stream import Stream, StreamBatches, StreamReader
from sparsejax.data.text import Corpus
from sparsejax.data.tokenizers import Tokenizer

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
      training: Training rows; None for a mixture.
      held_out: Validation rows.
      vocab: Vocabulary size that a model needs.
      digest: Changes with any text, its split, and the tokenizer.
      tokenizer: The tokenizer; None for a probe.
      corpus: The text; None for a probe.
      counts: Numbers of documents and tokens, for the record.
      sources: The sources of a mixture by name; empty for other data sets.
    """

    config: DataConfig
    training: Rows | Stream | None
    held_out: Rows
    vocab: int
    digest: str
    tokenizer: Tokenizer | None
    corpus: Corpus | None
    counts: dict[str, Any]
    sources: Mapping[str, Dataset] = dataclasses.field(default_factory=dict)

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

    def train_batches(self, batch: int, seed: int, *, process_index: int = 0, process_count: int = 1) -> BatchIterator:
        """Iterates endlessly over training batches, a function of `seed` and step; see `shuffled_batches`."""
        sharing = Sharing(process_index=process_index, process_count=process_count)
        readers = self.config.readers
        if self.is_stream:
            return StreamBatches([self.open_reader(seed, i, readers) for i in range(readers)], batch, **sharing)
        return numbered_batches(self.open_reader(seed).draw, batch, **sharing)

    @property
    def is_stream(self) -> bool:
        """Whether text is read during training."""
        return isinstance(self.training, Stream)

    def open_reader(self, seed: int, reader: int = 0, readers: int = 1) -> RowReader:
        """Returns a reader of every `readers`-th training row; readers of a stream share its files instead."""
        if isinstance(self.training, Stream):
            return StreamReader(self.training, seed, self._transform(seed), reader, readers)
        return _Drawer(lambda numbers: self.draw(numbers * readers + reader, seed))

    def draw(self, numbers: np.ndarray, seed: int) -> Batch:
        """Returns the training rows of a run with these numbers, int64 [b], counted from 0 over all epochs."""
        if isinstance(self.training, Examples):
            return dataclasses.replace(self.training, seed=seed).take(numbers)
        assert self.training is not None
        assert not isinstance(self.training, Stream)
        return draw_shuffled(self.training, numbers, seed, self._transform(seed))

    def validation_batches(
        self, batch: int, *, limit: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """Iterates over the validation rows in order; see `ordered_batches`."""
        sharing = Sharing(process_index=process_index, process_count=process_count)
        return ordered_batches(self.held_out, batch, limit=limit, transform=self._transform(MASK_SEED), **sharing)

    @property
    def prompt(self) -> np.ndarray | None:
        """Validation tokens that a model trained on the data can continue, [n]; None if it cannot continue a text."""
        return self.corpus.validation if self.corpus is not None and self.is_generative else None

    def describe(self) -> list[str]:
        """Describes the text and the rows made of it, one fact per line."""
        if self.corpus is None:
            held_out = f"{len(self.held_out):,} examples to validate"
            return [f"probe: {self.config.probe}, {held_out}, digest {self.digest}"]
        if isinstance(self.training, Stream):
            return self._describe_stream(self.training, self.corpus)
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

    def _describe_stream(self, stream: Stream, corpus: Corpus) -> list[str]:
        text, count = stream.text, self.counts["validation"]
        return [
            f"stream: {text.bytes:,} bytes in {text.train_files:,} files to train on, {self.config.buffer:,} rows are"
            f" shuffled at once; {len(corpus.validation):,} tokens to validate, digest {self.digest}",
            *text.notes,
            *corpus.notes,
            f"validation: {count['documents']:,} documents used; {count['rows']:,} rows of {count['row_length']:,}",
        ]

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


@dataclasses.dataclass(frozen=True)
class _Drawer:
    """A reader of rows that are a function of their numbers."""

    draw: Callable[[np.ndarray], Batch]

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        pass


class Mixture(Dataset):
    """Rows of several data sets by weight; `held_out` has those of all of them.

    Losses and ratios of the whole are those of a text in which the sources have tokens by weight.
    """

    @functools.cached_property
    def shares(self) -> dict[str, float]:
        """Fraction of the training rows per source."""
        weights = {name: self.config.sources[name].weight for name in self.sources}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    @property
    def scores_accuracy(self) -> bool:
        """Whether accuracy is meaningful in every source."""
        return all(source.scores_accuracy for source in self.sources.values())

    @property
    def is_generative(self) -> bool:
        """Whether a source has a text that the model can continue."""
        return any(source.is_generative for source in self.sources.values())

    @property
    def prompt(self) -> np.ndarray | None:
        """That of the first source that has one."""
        return next((source.prompt for source in self.sources.values() if source.prompt is not None), None)

    @property
    def tokens_per_byte(self) -> float | None:
        """Ratio of the whole; None unless all tokens of every source are predicted."""
        return self._mix_ratios(lambda source: source.tokens_per_byte)

    @property
    def tokens_per_character(self) -> float | None:
        """Ratio of the whole; None unless all tokens of every source are predicted."""
        return self._mix_ratios(lambda source: source.tokens_per_character)

    @property
    def restored(self) -> float:
        """Mean over the sources by weight."""
        return sum(share * self.sources[name].restored for name, share in self.shares.items())

    def validation_batches(
        self, batch: int, *, limit: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """Iterates over the validation rows of one source after another, `limit` batches of each."""
        sharing = Sharing(process_index=process_index, process_count=process_count)
        for source in self.sources.values():
            yield from source.validation_batches(batch, limit=limit, **sharing)

    @property
    def is_stream(self) -> bool:
        """Whether text of a source is read during training."""
        return any(source.is_stream for source in self.sources.values())

    def open_reader(self, seed: int, reader: int = 0, readers: int = 1) -> RowReader:
        """Returns a reader of a mixture of the rows of its own readers of the sources."""
        opened = {
            name: source.open_reader(source_seed(seed, name), reader, readers) for name, source in self.sources.items()
        }
        assert isinstance(self.held_out, Joined)
        order = MixtureOrder([self.config.sources[name].weight for name in self.sources])
        return MixedReader(opened, order, self.held_out.fields, self.held_out.length)

    def describe(self) -> list[str]:
        """Describes the sources, one fact per line."""
        lines = [f"mixture: {len(self.sources)} sources, digest {self.digest}"]
        for name, source in self.sources.items():
            lines += [f"source {name} ({self.shares[name]:.2%} of the rows): {line}" for line in source.describe()]
        return lines

    def _mix_ratios(self, ratio: Callable[[Dataset], float | None]) -> float | None:
        """Tokens of the whole per unit of which each source has `ratio` tokens."""
        units = 0.0
        for name, share in self.shares.items():
            tokens = ratio(self.sources[name])
            if share and tokens is None:
                return None
            units += share / tokens if tokens else 0.0
        return 1 / units


def source_seed(seed: int, name: str) -> int:
    """Returns the seed of a source of a mixture, which does not depend on the other sources."""
    return int(np.random.SeedSequence([seed, hash_name(name)]).generate_state(1)[0])
