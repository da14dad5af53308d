"""Finds stop strings in text that arrives in pieces, and holds back what may be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Streamed text never holds a stop string, nor anything after it."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """The text that may be sent now. After a match `hit` holds the stop string and nothing more comes out."""
        if self.hit is not None:
            return ""
        if not self._strings:
            return text
        pending = self._held + text
        found = [(i, -len(s), s) for s in self._strings if (i := pending.find(s)) >= 0]
        if found:  # the earliest; of two that start there, the longer
            start, _, self.hit = min(found)
            self._held = ""
            return pending[:start]
        keep = max(_overlap(pending, s) for s in self._strings)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def skip(self, text: str) -> str:
        """Text that must not be searched (before `min_tokens`), with what was held before it."""
        held, self._held = self._held, ""
        return held + text

    def finish(self) -> str:
        """What was held back, once it is sure that no stop string follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
