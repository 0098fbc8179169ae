"""Text of generated tokens, as it becomes known."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from sparsejax.data.tokenizers import Tokenizer
from sparsejax.errors import InputError

REPLACEMENT = "\ufffd"  # what decoders return for bytes that are not, or not yet, a UTF-8 character
CONTEXT = 8  # tokens of a prompt


class TextStream:
    """Decodes the tokens of one row as they arrive.

    Text is released once no later token can change it: the bytes of a character stay together, and a text that may be
    the beginning of a stop string waits for its end.

    Args:
      tokenizer: The tokenizer.
      stops: Texts that end the row, and are not part of its text.
      context: Tokens before the first, on which its text may depend.

    Attributes:
      text: The text that has been released.
      stopped: Whether a stop string was found; no text follows.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Collection[str] = (), context: Iterable[int] = ()):
        if isinstance(stops, str) or not all(stops):
            raise InputError("stop", f"{stops!r}: expected a list of texts that are not empty")
        self.text, self.stopped = "", False
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._tokens = [int(token) for token in context][-CONTEXT:]
        # Tokens are decoded from `_start`, since the text of a token may depend on the one before it. Up to `_known`,
        # their text is complete.
        self._start, self._known, self._taken = 0, len(self._tokens), 0
        self._pending = ""

    def push(self, tokens: Iterable[int]) -> str:
        """Adds tokens; returns the text that they release."""
        for token in tokens:
            self._tokens.append(int(token))
            self._decode(is_last=False)
        return self._release(is_last=False)

    def finish(self) -> str:
        """Returns the remaining text, in which incomplete characters are replaced."""
        self._decode(is_last=True)
        return self._release(is_last=True)

    def _decode(self, is_last: bool) -> None:
        text = self._tokenizer.decode(np.asarray(self._tokens[self._start :], np.int64))
        is_complete = is_last or not text.endswith(REPLACEMENT)
        # Of several replacements at the end, only the last can be an incomplete character.
        stable = text if is_complete else text[:-1]
        before = len(self._tokenizer.decode(np.asarray(self._tokens[self._start : self._known], np.int64)))
        self._pending += stable[before + self._taken :]
        self._taken = max(self._taken, len(stable) - before)
        if is_complete:
            self._start, self._known, self._taken = self._known, len(self._tokens), 0

    def _release(self, is_last: bool) -> str:
        if self.stopped:
            return ""
        ends = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if ends:
            self.stopped, size = True, min(ends)
        else:
            size = len(self._pending) - (0 if is_last else self._count_held())
        released, self._pending = self._pending[:size], self._pending[size:]
        self.text += released
        return released

    def _count_held(self) -> int:
        """Number of characters at the end that may be the beginning of a stop string."""
        starts = (stop[:size] for stop in self._stops for size in range(1, len(stop)))
        return max((len(start) for start in starts if self._pending.endswith(start)), default=0)
