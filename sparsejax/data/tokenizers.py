"""Tokenizers: bytes, the 27 characters of text8, trained byte-pair encodings, and tokenizer files."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from sparsejax.data.errors import DataError
from sparsejax.data.formats import Document, import_package
from sparsejax.workdir import replace_file

PART = 1 << 22  # bytes per call of a tokenizer; a longer document is cut at the end of a line
END_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
MASK_NAMES = ("[MASK]", "<mask>")
CHARACTERS = " " + string.ascii_lowercase


class Tokenizer(Protocol):
    """A mapping between text and token ids.

    Attributes:
      name: The value of `data.tokenizer`.
      size: Vocabulary size.
      separator: Id between documents; None if the vocabulary has no such token.
      spelled: Whether the separator is itself a byte of text and counts as one.
      mask: Id of the mask token; `size` if the vocabulary has none, in which case a model needs one more id.
      digest: 16 hex digits that change with the vocabulary.
    """

    name: str
    size: int
    separator: int | None
    spelled: bool
    mask: int
    digest: str

    def encode(self, text: bytes) -> np.ndarray:
        """Token ids of a text, integers [n]."""
        ...

    def decode(self, tokens: np.ndarray) -> str:
        """Readable text of ids [n]."""
        ...

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """Whether each token starts a word, bool [n]. A byte between words is a word."""
        ...


def vocabulary(tokenizer: Tokenizer, masked: bool) -> int:
    """Vocabulary size that a model needs."""
    return max(tokenizer.size, tokenizer.mask + 1) if masked else tokenizer.size


class Bytes:
    """The identity: every byte is a token."""

    separator: int | None = 0
    name, size, spelled, mask, digest = "bytes", 256, True, 256, "bytes"

    def encode(self, text: bytes) -> np.ndarray:
        """The bytes as uint8 [n]."""
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: np.ndarray) -> str:
        """Text of ids [n]; the mask token is shown as a box."""
        parts = np.split(tokens, np.flatnonzero(np.diff(tokens == self.mask)) + 1)
        return "".join(
            "▢" * len(part) if part.size and part[0] == self.mask else bytes(part.tolist()).decode(errors="replace")
            for part in parts
        )

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """False inside a run of letters, digits and bytes above 127, else True; bool [n]."""
        letter = _LETTERS[np.minimum(tokens, 255)]
        return ~(letter & np.concatenate([[False], letter[:-1]]))


_LETTERS = np.array([chr(byte).isalnum() if byte < 128 else True for byte in range(256)])


class Characters:
    """The 27 characters of text8, a space and the letters a to z; the separator is a space."""

    separator: int | None = 0
    name, size, spelled, mask, digest = "chars", 27, True, 27, "chars"

    def encode(self, text: bytes) -> np.ndarray:
        """Ids uint8 [n]; a space is 0."""
        codes = _CODES[np.frombuffer(text, np.uint8)]
        if (codes == 255).any():
            other = bytes(text[np.argmax(codes == 255) :][:1])
            raise DataError(None, f"{other!r} is not one of the 27 characters of text8, a space and a to z")
        return codes

    def decode(self, tokens: np.ndarray) -> str:
        """Text of ids [n]; the mask token is shown as a box."""
        return "".join((CHARACTERS + "▢")[token] for token in tokens)

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """False inside a run of letters, else True; bool [n]."""
        return ~((tokens > 0) & np.concatenate([[False], tokens[:-1] > 0]))


_CODES = np.full(256, 255, np.uint8)
_CODES[np.frombuffer(CHARACTERS.encode(), np.uint8)] = np.arange(27)


class _Subwords:
    """Base of subword tokenizers: the text must be UTF-8, and long texts are encoded in parts."""

    spelled = False

    def __init__(self, name: str, subwords: list[str], data: bytes):
        self.name, self.size = name, len(subwords)
        ids = {subword: number for number, subword in enumerate(subwords)}
        self.separator = next((ids[end] for end in END_NAMES if end in ids), None)
        self.mask = next((ids[mask] for mask in MASK_NAMES if mask in ids), self.size)
        self.digest = hashlib.sha256(data).hexdigest()[:16]
        if any(subword.startswith("##") for subword in subwords):  # WordPiece marks continuations
            self._starts = np.array([not subword.startswith("##") for subword in subwords])
        else:  # byte-level BPE and SentencePiece mark starts
            self._starts = np.array([subword[:1] in ("▁", "Ġ", "Ċ", "<", "[") for subword in subwords])

    def encode(self, text: bytes) -> np.ndarray:
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                None, f"byte {error.start} is not UTF-8; data.tokenizer = 'bytes' accepts any bytes"
            ) from None
        dtype = np.min_scalar_type(self.size - 1)
        parts = [np.asarray(self._encode(part), dtype) for part in _split_lines(decoded)]
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
    """A tokenizer of the library `tokenizers`, from the content of its JSON file."""

    def __init__(self, name: str, data: bytes):
        tokenizers = import_package("tokenizers", "data.tokenizer", f"{name} is a Hugging Face tokenizer")
        try:
            self._model = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises nothing more specific
            raise DataError("data.tokenizer", f"{name} is not a JSON file of the library tokenizers") from error
        self._model.no_truncation()
        self._model.no_padding()
        size = self._model.get_vocab_size(with_added_tokens=True)
        super().__init__(name, [self._model.id_to_token(number) or "" for number in range(size)], data)

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def _decode(self, tokens: list[int]) -> str:
        return self._model.decode(tokens, skip_special_tokens=False)


class SentencePiece(_Subwords):
    """A SentencePiece model, from the content of its file."""

    def __init__(self, name: str, data: bytes):
        sentencepiece = import_package("sentencepiece", "data.tokenizer", f"{name} is a SentencePiece model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except Exception as error:  # the library raises nothing more specific
            raise DataError("data.tokenizer", f"{name} is not a SentencePiece model") from error
        subwords = [self._model.id_to_piece(number) for number in range(self._model.get_piece_size())]
        super().__init__(name, subwords, data)

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _decode(self, tokens: list[int]) -> str:
        return self._model.decode(tokens)


def load_tokenizer(name: str, training: Iterable[Document], digest: str, cache: Path) -> Tokenizer:
    """Loads or trains the tokenizer that `data.tokenizer` names.

    Args:
      name: "bytes", "chars", "bpe:SIZE", or a file: JSON of the library `tokenizers`, or a SentencePiece model.
      training: Text on which "bpe:SIZE" is trained unless it is in the cache.
      digest: Digest of that text.
      cache: Folder of trained tokenizers.

    Raises:
      DataError: The tokenizer does not exist, or its package is not installed.
    """
    if name in ("bytes", "chars"):
        return Bytes() if name == "bytes" else Characters()
    kind, _, size = name.partition(":")
    if kind == "bpe" and size:
        if not size.isdecimal() or int(size) < 258:
            raise DataError(
                "data.tokenizer", f"{name}: the size must be at least 258, for 256 bytes and two special tokens"
            )
        path = cache / f"bpe-{size}-{digest}.json"
        if not path.exists():
            _train(path, int(size), training)
        return HuggingFace(name, path.read_bytes())
    try:
        data = Path(name).expanduser().read_bytes()
    except OSError as error:
        raise DataError("data.tokenizer", f"{name}: {error.strerror}; give bytes, chars, bpe:SIZE or a file") from error
    return (HuggingFace if data.lstrip()[:1] == b"{" else SentencePiece)(name, data)


def _train(path: Path, size: int, training: Iterable[Document]) -> None:
    """Trains a byte-level byte-pair encoding (arXiv:1508.07909) and writes it."""
    import_package("tokenizers", "data.tokenizer", f"bpe:{size} is trained with Hugging Face tokenizers")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, model.to_str().encode())


def _texts(documents: Iterable[Document]) -> Iterator[str]:
    for document in documents:
        try:
            yield from _split_lines(bytes(document.text).decode())
        except UnicodeDecodeError as error:
            raise DataError("data.files", f"{document.name}: byte {error.start} is not UTF-8") from None


def _split_lines(text: str) -> Iterator[str]:
    """Parts of at most `PART` characters that end at the end of a line if possible."""
    start = 0
    while start < len(text):
        stop = start + PART
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop
