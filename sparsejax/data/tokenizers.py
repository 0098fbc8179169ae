"""Tokenizers: bytes, the 27 characters of text8, trained byte-pair encodings, and tokenizer files."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from sparsejax.data.errors import DataError
from sparsejax.data.formats import Document
from sparsejax.data.kinds import import_package
from sparsejax.errors import InputError
from sparsejax.paths import local_path
from sparsejax.signals import call_interruptibly
from sparsejax.workdir import Workdir, read_json, replace_file

PART = 1 << 22  # bytes per call of a tokenizer; a longer document is cut at the end of a line
MAX_SIZE = 1 << 24  # ids of a vocabulary
UNKNOWN_ID = "▢"  # stands for an id that a tokenizer does not have
END_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
MASK_NAMES = ("[MASK]", "<mask>")
CHARACTERS = " " + string.ascii_lowercase


class Tokenizer(Protocol):
    """A mapping between text and token ids.

    Attributes:
      name: The value of `data.tokenizer`.
      size: Largest id plus one.
      separator: Id between documents; None if the vocabulary has no such token.
      spelled: Whether the separator is itself a byte of text and counts as one.
      mask: Id of the mask token; `size` if the vocabulary has none, in which case a model needs one more id.
      digest: 16 hex digits that change with the vocabulary.
      data: Content of the tokenizer's file; None if it has no file.
    """

    name: str
    size: int
    separator: int | None
    spelled: bool
    mask: int
    digest: str
    data: bytes | None

    def encode(self, text: bytes) -> np.ndarray:
        """Token ids of a text, integers [n]."""
        ...

    def decode(self, tokens: np.ndarray) -> str:
        """Readable text of ids [n]; the mask token and ids that the tokenizer does not have are shown as boxes."""
        ...

    def restore(self, tokens: np.ndarray) -> bytes | None:
        """The text that ids [n] represent, without unknown tokens; None if it is the encoded text by construction."""
        ...

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """Whether each token starts a word, bool [n]. A byte between words is a word."""
        ...


def vocabulary(tokenizer: Tokenizer, masked: bool) -> int:
    """Vocabulary size that a model needs."""
    return max(tokenizer.size, tokenizer.mask + 1) if masked else tokenizer.size


def count_restored(text: bytes, restored: bytes) -> tuple[int, int]:
    """Counts the bytes and the characters of `text` that `restored` has as well, in any order.

    Bytes that are missing and bytes that are there instead count once.
    """
    counts = np.stack([np.bincount(np.frombuffer(part, np.uint8), minlength=256) for part in (text, restored)])
    starts = counts[:, (np.arange(256) & 0xC0) != 0x80]  # of characters
    lost = []
    for before, after in (counts, starts):
        missing, added = np.maximum(before - after, 0).sum(), np.maximum(after - before, 0).sum()
        lost.append(max(int(missing), int(added), int(text != restored)))
    return max(0, len(text) - lost[0]), max(0, int(starts[0].sum()) - lost[1])


def _decode_known(tokens: np.ndarray, known: np.ndarray, decode: Callable[[np.ndarray], str]) -> str:
    runs = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(known)) + 1)
    return "".join(decode(tokens[run]) if known[run[0]] else UNKNOWN_ID * len(run) for run in runs if len(run))


class Bytes:
    """The identity: every byte is a token."""

    separator: int | None = 0
    name, size, spelled, mask, digest, data = "bytes", 256, True, 256, "bytes", None

    def encode(self, text: bytes) -> np.ndarray:
        """The bytes as uint8 [n]."""
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: np.ndarray) -> str:
        """Text of ids [n]; ids above 255 are shown as boxes."""
        return _decode_known(tokens, tokens < 256, lambda part: bytes(part.tolist()).decode(errors="replace"))

    def restore(self, tokens: np.ndarray) -> None:
        """Returns None."""

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """False inside a run of letters, digits and bytes above 127, else True; bool [n]."""
        letter = _LETTERS[np.minimum(tokens, 255)]
        return ~(letter & np.concatenate([[False], letter[:-1]]))


_LETTERS = np.array([chr(byte).isalnum() if byte < 128 else True for byte in range(256)])


class Characters:
    """The 27 characters of text8, a space and the letters a to z; the separator is a space."""

    separator: int | None = 0
    name, size, spelled, mask, digest, data = "chars", 27, True, 27, "chars", None

    def encode(self, text: bytes) -> np.ndarray:
        """Ids uint8 [n]; a space is 0."""
        codes = _CODES[np.frombuffer(text, np.uint8)]
        if (codes == 255).any():
            offset = int(np.argmax(codes == 255))
            other = text[offset : offset + 1]
            raise DataError(
                None, f"byte {offset:,}, {other!r}, is not one of the 27 characters of text8, a space and a to z"
            )
        return codes

    def decode(self, tokens: np.ndarray) -> str:
        """Text of ids [n]; ids above 26 are shown as boxes."""
        return "".join(CHARACTERS[token] if token < 27 else UNKNOWN_ID for token in tokens)

    def restore(self, tokens: np.ndarray) -> None:
        """Returns None."""

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """False inside a run of letters, else True; bool [n]."""
        return ~((tokens > 0) & np.concatenate([[False], tokens[:-1] > 0]))


_CODES = np.full(256, 255, np.uint8)
_CODES[np.frombuffer(CHARACTERS.encode(), np.uint8)] = np.arange(27)


class _Subwords:
    """Base of subword tokenizers: the text must be UTF-8, and long texts are encoded in parts.

    Args:
      name: The value of `data.tokenizer`.
      ids: Id of each subword.
      unknown: Id of the token that stands for text without a token; None if there is none.
      data: Content of the file.
    """

    spelled = False

    def __init__(self, name: str, ids: dict[str, int], unknown: int | None, data: bytes):
        self.name, self.data, self._unknown = name, data, unknown
        self.size = max(ids.values(), default=-1) + 1
        if not 0 < self.size <= MAX_SIZE:
            raise DataError("data.tokenizer", f"{name} has ids up to {self.size - 1}; expected 1 to {MAX_SIZE:,} ids")
        self.separator = next((ids[end] for end in END_NAMES if end in ids), None)
        self.mask = next((ids[mask] for mask in MASK_NAMES if mask in ids), self.size)
        self.digest = hashlib.sha256(data).hexdigest()[:16]
        subwords = [""] * self.size
        for subword, number in ids.items():
            subwords[number] = subword
        self._known = np.array([bool(subword) for subword in subwords])  # ids may have holes
        if any(subword.startswith("##") for subword in subwords):  # WordPiece marks continuations
            self._starts = np.array([not subword.startswith("##") for subword in subwords])
        else:  # byte-level BPE and SentencePiece mark starts
            self._starts = np.array([subword[:1] in ("▁", "Ġ", "Ċ", "<", "[") for subword in subwords])

    def encode(self, text: bytes) -> np.ndarray:
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                None,
                f"byte {error.start} is not UTF-8; data.read_as = 'bytes' with the tokenizer bytes accepts any bytes",
            ) from None
        dtype = np.min_scalar_type(self.size - 1)
        parts = [np.asarray(self._encode(part), dtype) for part in _split_lines(decoded)]
        tokens = np.concatenate(parts) if parts else np.zeros(0, dtype)
        for special in (self.separator, self.mask):
            if special is not None and (tokens == special).any():
                spelled = self.decode(np.array([special]))
                raise DataError(
                    None,
                    f"the text spells {spelled!r}, which the tokenizer takes for its special token; remove it, or"
                    " name it in data.separator if it separates documents",
                )
        return tokens

    def decode(self, tokens: np.ndarray) -> str:
        known = (tokens < self.size) & self._known[np.minimum(tokens, self.size - 1)]
        return _decode_known(tokens, known, lambda part: self._decode(part.tolist()))

    def restore(self, tokens: np.ndarray) -> bytes:
        known = tokens if self._unknown is None else tokens[tokens != self._unknown]
        return self._decode(known.tolist()).encode(errors="replace")

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        return self._starts[np.minimum(tokens, self.size - 1)]

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _decode(self, tokens: list[int]) -> str:
        raise NotImplementedError


class HuggingFace(_Subwords):
    """A tokenizer of the library `tokenizers`, from the content of its JSON file.

    Text that spells a special token, such as <|endoftext|>, is text: only a separator between documents becomes one.
    """

    def __init__(self, name: str, data: bytes):
        tokenizers = import_package("tokenizers", "data.tokenizer", f"{name} is a Hugging Face tokenizer")
        try:
            settings = json.loads(data)
            for token in settings.get("added_tokens") or ():
                token["special"] = token.get("special") or token["content"] in (*END_NAMES, *MASK_NAMES)
            self._model = tokenizers.Tokenizer.from_str(json.dumps(settings))
        except Exception as error:  # the library raises nothing more specific
            raise DataError("data.tokenizer", f"{name} is not a JSON file of the library tokenizers") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        model = settings["model"]
        unknown = model.get("unk_id")
        if isinstance(model.get("unk_token"), str):
            unknown = self._model.token_to_id(model["unk_token"])
        super().__init__(name, self._model.get_vocab(with_added_tokens=True), unknown, data)

    def find_prefix(self) -> tuple[int, ...]:
        """Ids that the library adds before a text, such as <s>; `encode` does not add them."""
        plain = self._model.encode("a", add_special_tokens=False).ids
        whole = self._model.encode("a").ids
        return tuple(whole[: max(0, next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain))])

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def _decode(self, tokens: list[int]) -> str:
        return self._model.decode(tokens, skip_special_tokens=False)


class SentencePiece(_Subwords):
    """A SentencePiece model, from the content of its file."""

    def __init__(self, name: str, data: bytes):
        sentencepiece = import_package("sentencepiece", "data.tokenizer", f"{name} is a SentencePiece model")
        try:
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.LoadFromSerializedProto(data)  # the constructor accepts an empty file
        except Exception as error:  # the library raises nothing more specific
            raise DataError("data.tokenizer", f"{name} is not a SentencePiece model") from error
        ids = {self._model.id_to_piece(number): number for number in range(self._model.get_piece_size())}
        super().__init__(name, ids, self._model.unk_id(), data)

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _decode(self, tokens: list[int]) -> str:
        return self._model.decode(tokens)


def load_tokenizer(
    name: str, training: Iterable[Document], digest: str, cache: Path, recorded: bytes | None = None
) -> Tokenizer:
    """Loads or trains the tokenizer that `data.tokenizer` names.

    Args:
      name: "bytes", "chars", "bpe:SIZE", or a file: JSON of the library `tokenizers`, or a SentencePiece model.
      training: Text on which "bpe:SIZE" is trained unless it is recorded or in the cache.
      digest: Digest of that text.
      cache: Folder of trained tokenizers.
      recorded: Content of the tokenizer's file in the workdir of a run, see `read_tokenizer`.

    Raises:
      DataError: The tokenizer does not exist, is not the recorded one, or its package is not installed.
    """
    kind, _, size = name.partition(":")
    if kind == "bpe" and size and (not size.isdecimal() or int(size) < 258):
        problem = f"{name}: the size must be at least 258, for 256 bytes and two special tokens"
        raise DataError("data.tokenizer", problem)
    if name in ("bytes", "chars"):
        return Bytes() if name == "bytes" else Characters()
    if kind == "bpe" and size:
        path = cache / f"bpe-{size}-{digest}.json"
        if recorded is None and not path.exists():
            _train(path, int(size), training)
        return HuggingFace(name, path.read_bytes() if recorded is None else recorded)
    try:
        data = local_path(name, "data.tokenizer").read_bytes()
    except OSError as error:
        if recorded is None:
            problem = f"{name}: {error.strerror}; give bytes, chars, bpe:SIZE or a file"
            raise DataError("data.tokenizer", problem) from error
        data = recorded
    if recorded is not None and data != recorded:
        raise DataError("data.tokenizer", f"{name} has changed since the run started; its tokenizer is in the workdir")
    return _parse_tokenizer(name, data)


def _parse_tokenizer(name: str, data: bytes) -> Tokenizer:
    return (HuggingFace if data.lstrip()[:1] == b"{" else SentencePiece)(name, data)


def write_tokenizer(workdir: Workdir, tokenizer: Tokenizer | None) -> None:
    """Writes the file of a tokenizer into a workdir, if it has one."""
    if tokenizer is not None and tokenizer.data is not None:
        path = workdir.tokenizer if isinstance(tokenizer, HuggingFace) else workdir.sentencepiece
        replace_file(path, tokenizer.data)


def read_tokenizer(workdir: Workdir) -> bytes | None:
    """Reads the file of the tokenizer of a workdir; None if it has none.

    Raises:
      InputError: The file has changed since the run started.
    """
    for path in (workdir.tokenizer, workdir.sentencepiece):
        if path.exists():
            data = path.read_bytes()
            recorded = read_json(workdir.data).get("tokenizer_digest") if workdir.data.exists() else None
            if recorded not in (None, digest := hashlib.sha256(data).hexdigest()[:16]):
                raise InputError(path, f"damaged: its digest is {digest}, but the run started with {recorded}")
            return data
    return None


def recorded_tokenizer(workdir: Workdir, name: str) -> Tokenizer:
    """Loads the tokenizer `data.tokenizer = name` of a run from its workdir alone.

    Raises:
      InputError: The workdir does not hold it, or it has changed.
    """
    if name in ("bytes", "chars"):
        return Bytes() if name == "bytes" else Characters()
    data = read_tokenizer(workdir)
    if data is None:
        raise InputError(workdir.path, f"the tokenizer {name} is missing; resume the run to write it")
    return _parse_tokenizer(name, data)


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
    call_interruptibly(lambda texts: model.train_from_iterator(texts, trainer), _texts(training))
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
