"""Loading of data sets."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from sparsejax.data.batches import require_window
from sparsejax.data.config import DataConfig, SourceConfig
from sparsejax.data.dataset import Dataset, Mixture
from sparsejax.data.errors import DataError
from sparsejax.data.files import Files
from sparsejax.data.mixture import Joined
from sparsejax.data.probes import PROBES
from sparsejax.data.rows import Examples, Labelled, Packed, Rows, Windows
from sparsejax.data.stream import Stream
from sparsejax.data.text import Corpus, Side, Source, build_corpus, build_tokenizer
from sparsejax.data.tokenizers import Tokenizer, vocabulary

HELD_OUT_EXAMPLES = 1024  # of a probe that generates its validation examples
ENDLESS = 1 << 48  # training examples of a probe


def load_dataset(
    config: DataConfig,
    stride: int = 0,
    loaded: Dataset | None = None,
    *,
    recorded: bytes | None = None,
    split: bool = True,
) -> Dataset:
    """Reads, tokenizes and packs the data of a configuration.

    Args:
      config: The configuration.
      stride: Tokens between the starts of adjacent validation windows; 0 stands for `config.length`. See `Windows`.
      loaded: A data set of the same text, whose tokens are used again, for instance for rows of another length.
      recorded: Content of the tokenizer's file in the workdir of a run, see `load_tokenizer`.
      split: Whether there is training text; otherwise all of `config.files` is validation text, however short.

    Raises:
      DataError: The data cannot be read, or are too small.
    """
    if config.sources:
        return _load_mixture(config, stride, loaded, recorded, split)
    if config.task != "text":
        return _load_probe(config)
    if config.stream:
        return _load_stream(config, stride, loaded, recorded)
    corpus = None if loaded is None else loaded.corpus
    if corpus is None:
        corpus = build_corpus(_open_source(config, split), config.tokenizer, config.cache, recorded)
    return _cut_text(config, corpus, stride, split)


def _load_stream(
    config: DataConfig,
    stride: int,
    loaded: Dataset | None,
    recorded: bytes | None = None,
    tokenizer: Tokenizer | None = None,
) -> Dataset:
    """Loads a data set whose validation text is a corpus, and whose training text is read later."""
    if loaded is not None and loaded.corpus is not None and isinstance(loaded.training, Stream):
        corpus, text = loaded.corpus, loaded.training.text
    else:
        text = _open_text(config, split=True)
        validation = dataclasses.replace(config, files=config.validation, stream=False, readers=1)
        held_out = _open_text(validation, split=False)
        both = {file.path.resolve() for file in text.files} & held_out.paths
        if both:
            raise DataError("data.validation", f"{min(both)} is training text too, see data.files")
        if len(text.files) < config.readers:
            raise DataError("data.readers", f"{config.readers} readers need as many files, not {len(text.files)}")
        corpus = build_corpus(held_out, config.tokenizer, config.cache, recorded, tokenizer)
    cut = _cut_text(config, corpus, stride, split=False)
    digest = hashlib.sha256(f"{text.digest} {corpus.digest}".encode()).hexdigest()[:16]
    counts = {"files": text.train_files, "bytes": text.bytes, "read": text.record, "buffer": config.buffer}
    training = Stream(config, text, corpus.tokenizer)
    return dataclasses.replace(
        cut, training=training, digest=digest, counts=cut.counts | {"training": counts, "digest": digest}
    )


def _load_mixture(
    config: DataConfig, stride: int, loaded: Dataset | None, recorded: bytes | None, split: bool
) -> Mixture:
    configs = {name: config.source(name) for name in sorted(config.sources)}
    if loaded is None:
        texts: dict[str, Source] = {}
        for name, source in configs.items():
            if source.task == "text" and not source.stream:
                with _naming(name):
                    texts[name] = _open_source(source, split)
        is_text = any(source.task == "text" for source in configs.values())
        tokenizer = build_tokenizer(list(texts.values()), config.tokenizer, config.cache, recorded) if is_text else None
    else:
        tokenizer = loaded.tokenizer
    sources: dict[str, Dataset] = {}
    for name, source in configs.items():
        with _naming(name):
            if source.task != "text":
                sources[name] = _load_probe(source)
                continue
            previous = None if loaded is None else loaded.sources[name]
            if source.stream:
                sources[name] = _load_stream(source, stride, previous, tokenizer=tokenizer)
                continue
            corpus = None if previous is None else previous.corpus
            if corpus is None:
                corpus = build_corpus(texts[name], config.tokenizer, config.cache, coder=tokenizer)
            sources[name] = _cut_text(source, corpus, stride, split)
    digest = hashlib.sha256(repr([(name, source.digest) for name, source in sources.items()]).encode()).hexdigest()[:16]
    vocab = max(source.vocab for source in sources.values())
    counts: dict[str, Any] = {"sources": {name: source.counts for name, source in sources.items()}}
    counts |= {"digest": digest, "vocab": vocab}
    if tokenizer is not None:
        counts |= {"tokenizer": config.tokenizer, "tokenizer_digest": tokenizer.digest}
    held_out = Joined([source.held_out for source in sources.values()])
    return Mixture(config, None, held_out, vocab, digest, tokenizer, None, counts, sources)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts the name of a source into the key of a DataError that is raised inside."""
    keys = {f"data.{field.name}" for field in dataclasses.fields(SourceConfig)}
    try:
        yield
    except DataError as error:
        if error.argument not in keys:
            raise
        raise DataError(error.argument.replace("data.", f"data.sources.{name}."), error.problem) from error


def _load_probe(config: DataConfig) -> Dataset:
    probe = PROBES[config.task]() if config.probe is None else config.probe
    digest = hashlib.sha256(repr(probe).encode()).hexdigest()[:16]
    count = HELD_OUT_EXAMPLES if probe.held_out is None else probe.held_out
    held_out = Examples(probe, 0, count, validation=True)
    training = Examples(probe, 0, ENDLESS)
    scored = float(held_out.take(np.zeros(1, np.int64))["weights"].sum())
    counts = {"probe": config.task, "length": probe.length, "vocab": probe.vocab, "validation_examples": count}
    return Dataset(config, training, held_out, probe.vocab, digest, None, None, counts | {"scored": scored})


def _open_source(config: DataConfig, split: bool) -> Source:
    if config.tfds:
        from sparsejax.data.tfds import TfdsSource  # TFDS takes seconds to import

        return TfdsSource(config)
    return _open_text(config, split)


def _open_text(config: DataConfig, split: bool) -> Files:
    return Files(
        config.files,
        "" if config.stream or not split else config.validation,
        config.field,
        config.separator,
        config.label,
        config.read_as,
        characters=config.tokenizer != "bytes",
        split=split,
        stream=config.stream,
        splits=(config.train_split, config.validation_split),
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
