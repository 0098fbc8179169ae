"""Tokenizers: bytes, the 27 characters of text8, byte-pair encodings, and those of files."""

from __future__ import annotations

import hashlib
import os
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from sparsejax.data.errors import DataError
from sparsejax.data.formats import Document, require

PART = 1 << 22  # bytes that are encoded at once; a longer document is cut at the end of a line
END_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
MASK_NAMES = ("[MASK]", "<mask>")
CHARACTERS = " " + string.ascii_lowercase


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
      name: As in `data.tokenizer`.
      size: Ids are below it.
      separator: The id that stands between documents, None if the vocabulary has none for it.
      spelled: Whether the separator is itself a byte of text, and counts as one.
      mask: The id that hides a token; `size` if the vocabulary has none, so that a model needs one id more.
      digest: 16 hex digits that change with the vocabulary.
    """

    name: str
    size: int
    separator: int | None
    spelled: bool
    mask: int
    digest: str

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of a text: integers [n]."""

    def decode(self, tokens: np.ndarray) -> str:
        """The text of ids [n], for people to read."""

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """Where a word starts: bool [n]. Every byte between words is a word of its own."""


def vocabulary(tokenizer: Tokenizer, masked: bool) -> int:
    """How many ids a model needs."""
    return max(tokenizer.size, tokenizer.mask + 1) if masked else tokenizer.size


class Bytes:
    """Every byte is a token; takes any file."""

    name, size, separator, spelled, mask, digest = "bytes", 256, 0, True, 256, "bytes"

    def encode(self, text: bytes) -> np.ndarray:
        """The bytes themselves, uint8 [n]."""
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: np.ndarray) -> str:
        """The text of ids [n]; the mask is shown as a box."""
        parts = np.split(tokens, np.flatnonzero(np.diff(tokens == self.mask)) + 1)
        return "".join(
            "▢" * len(part) if part.size and part[0] == self.mask else bytes(part.tolist()).decode(errors="replace")
            for part in parts
        )

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """True [n] but within a run of letters, digits and bytes above 127."""
        letter = _LETTERS[np.minimum(tokens, 255)]
        return ~(letter & np.concatenate([[False], letter[:-1]]))


_LETTERS = np.array([chr(byte).isalnum() if byte < 128 else True for byte in range(256)])


class Characters:
    """The 27 characters of text8: a space and the letters from a to z. A space stands between documents."""

    name, size, separator, spelled, mask, digest = "chars", 27, 0, True, 27, "chars"

    def encode(self, text: bytes) -> np.ndarray:
        """uint8 [n], a space being 0."""
        codes = _CODES[np.frombuffer(text, np.uint8)]
        if (codes == 255).any():
            other = bytes(text[np.argmax(codes == 255) :][:1])
            raise DataError(f"{other!r} is not one of the 27 characters of text8, a space and a to z")
        return codes

    def decode(self, tokens: np.ndarray) -> str:
        """The text of ids [n]; the mask is shown as a box."""
        return "".join((CHARACTERS + "▢")[token] for token in tokens)

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """True [n] but within a run of letters."""
        return ~((tokens > 0) & np.concatenate([[False], tokens[:-1] > 0]))


_CODES = np.full(256, 255, np.uint8)
_CODES[np.frombuffer(CHARACTERS.encode(), np.uint8)] = np.arange(27)


class _Subwords:
    """What tokenizers of subwords have in common: text must be UTF-8, and long texts are encoded in parts."""

    spelled = False

    def __init__(self, name: str, pieces: list[str], data: bytes):
        self.name, self.size = name, len(pieces)
        ids = {piece: number for number, piece in enumerate(pieces)}
        self.separator = next((ids[end] for end in END_NAMES if end in ids), None)
        self.mask = next((ids[mask] for mask in MASK_NAMES if mask in ids), self.size)
        self.digest = hashlib.sha256(data).hexdigest()[:16]
        continues = any(piece.startswith("##") for piece in pieces)
        self._starts = np.array(
            [not piece.startswith("##") if continues else piece[:1] in ("▁", "Ġ", "Ċ", "<", "[") for piece in pieces]
        )

    def encode(self, text: bytes) -> np.ndarray:
        try:
            whole = text.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"byte {error.start} is not UTF-8; data.tokenizer = 'bytes' takes any bytes") from None
        dtype = np.min_scalar_type(self.size - 1)
        parts = [np.asarray(self._encode(part), dtype) for part in _cut(whole)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype)

    def decode(self, tokens: np.ndarray) -> str:
        runs, text = np.split(tokens, np.flatnonzero(np.diff(tokens >= self.size)) + 1), ""
        for run in runs:
            text += "▢" * len(run) if run.size and run[0] >= self.size else self._decode(run.tolist())
        return text

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        return self._starts[np.minimum(tokens, self.size - 1)]

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _decode(self, tokens: list[int]) -> str:
        raise NotImplementedError


class HuggingFace(_Subwords):
    """A tokenizer of the library `tokenizers`, from its JSON."""

    def __init__(self, name: str, data: bytes):
        tokenizers = require("tokenizers", f"data.tokenizer = {name!r} is a tokenizer of Hugging Face")
        try:
            self._model = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises nothing more particular
            raise DataError(f"data.tokenizer: {name} is no JSON of the library tokenizers: {error}") from error
        self._model.no_truncation()
        self._model.no_padding()
        size = self._model.get_vocab_size(with_added_tokens=True)
        super().__init__(name, [self._model.id_to_token(number) or "" for number in range(size)], data)

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def _decode(self, tokens: list[int]) -> str:
        return self._model.decode(tokens, skip_special_tokens=False)


class SentencePiece(_Subwords):
    """A SentencePiece model, from its file."""

    def __init__(self, name: str, data: bytes):
        sentencepiece = require("sentencepiece", f"data.tokenizer = {name!r} is a SentencePiece model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except Exception as error:  # the library raises nothing more particular
            raise DataError(f"data.tokenizer: {name} is no SentencePiece model: {error}") from error
        pieces = [self._model.id_to_piece(number) for number in range(self._model.get_piece_size())]
        super().__init__(name, pieces, data)

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _decode(self, tokens: list[int]) -> str:
        return self._model.decode(tokens)


def load_tokenizer(name: str, training: Iterable[Document], digest: str, cache: Path) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Args:
      name: "bytes", "chars", "bpe:SIZE", or a file: JSON of the library `tokenizers`, or a SentencePiece model.
      training: What "bpe:SIZE" is trained on, unless the cache has it.
      digest: Of that text.
      cache: The folder that trained tokenizers are kept in.

    Raises:
      DataError: No such tokenizer, or a package is not installed.
    """
    if name in ("bytes", "chars"):
        return Bytes() if name == "bytes" else Characters()
    kind, _, size = name.partition(":")
    if kind == "bpe" and size:
        if not size.isdecimal() or int(size) < 258:
            raise DataError(f"data.tokenizer: {name}: a size of at least 258, for 256 bytes and two special tokens")
        place = cache / f"bpe-{size}-{digest}.json"
        if not place.exists():
            _train(place, int(size), training)
        return HuggingFace(name, place.read_bytes())
    try:
        data = Path(name).expanduser().read_bytes()
    except OSError as error:
        kinds = "bytes, chars, bpe:SIZE or a file"
        raise DataError(f"data.tokenizer: {name}: {error.strerror} (known: {kinds})") from error
    return (HuggingFace if data.lstrip()[:1] == b"{" else SentencePiece)(name, data)


def _train(place: Path, size: int, training: Iterable[Document]) -> None:
    """Trains a byte-level byte-pair encoding (arXiv:1508.07909) and keeps it."""
    require("tokenizers", f"data.tokenizer = 'bpe:{size}' is trained by tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_NAMES[0], MASK_NAMES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(_texts(training), trainer)
    write_whole(place, model.to_str().encode())


def _texts(documents: Iterable[Document]) -> Iterator[str]:
    for document in documents:
        try:
            yield from _cut(bytes(document.text).decode())
        except UnicodeDecodeError as error:
            raise DataError(f"data.files: {document.name}: byte {error.start} is not UTF-8") from None


def _cut(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = start + PART
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def write_whole(place: Path, data: bytes) -> None:
    """Writes a file in one step: a reader sees all of it or nothing."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f"{place.name}.{os.getpid()}.part")
    part.write_bytes(data)
    part.replace(place)
