"""Token ids to text, one at a time. What comes out, joined, is the text of the whole.

Bytes are held back until a code point is complete. Byte-level vocabularies (GPT-2's alphabet: SmolLM2, Qwen) are
decoded here, from a table: exact for any bytes and about a microsecond a token. Others go through `tokenizers` over a
sliding window.
"""

from __future__ import annotations

import codecs
from typing import Protocol

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
WINDOW_TOKENS = 16
"""More tokens than any code point has: text still broken after these is broken for good."""


class Detokenizer(Protocol):
    """Turns the tokens of one choice into text."""

    def push(self, token_id: int) -> str:
        """The text that is complete after this token; often empty."""

    def finish(self) -> str:
        """What is left at the end: incomplete bytes become U+FFFD."""


class ByteLevelDetokenizer:
    """For byte-level vocabularies: `pieces` maps a token id to its bytes."""

    def __init__(self, pieces: list[bytes], skipped: frozenset[int]) -> None:
        self._pieces = pieces
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        if token_id in self._skipped or token_id >= len(self._pieces):
            return ""
        return self._decoder.decode(self._pieces[token_id])

    def finish(self) -> str:
        """See `Detokenizer`."""
        return self._decoder.decode(b"", True)


class WindowDetokenizer:
    """For any other vocabulary: decodes the last tokens with and without the new ones and takes the difference."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._ids: list[int] = []
        self._done = 0  # ids[:done] are out already; they stay as context, since a first token loses its space
        self._context = ""  # text of ids[:done]

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) and len(self._ids) - self._done < WINDOW_TOKENS:
            return ""
        return self._take(text)

    def finish(self) -> str:
        """See `Detokenizer`."""
        return self._take(self._decode(self._ids)) if len(self._ids) > self._done else ""

    def _take(self, text: str) -> str:
        new = text[len(self._context) :]
        if new:  # a token without text must not become the only context
            self._ids = self._ids[self._done :]
            self._context = self._decode(self._ids)
        self._done = len(self._ids)
        return new

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def byte_pieces(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each token of a byte-level vocabulary, as its decoder joins them."""
    alphabet = byte_alphabet()
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, token_id in vocab.items():
        known = all(c in alphabet for c in token)  # added tokens with other characters stand for themselves
        pieces[token_id] = bytes(alphabet[c] for c in token) if known else token.encode()
    return pieces
