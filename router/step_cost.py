"""How long a step takes, learnt from steps that ran, so that prefill does not hold up the streams that decode."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 15  # samples kept of each kind: an order statistic of them shrugs off pauses and follows drift within seconds
MIN_PREFILL_TOKENS = 4  # progress of prefill in a mixed step, whatever it costs
MIN_SAMPLE_TOKENS = 16  # a shorter prefill-only step says more about fixed costs than about tokens
MAX_MIXED_RUN = 50  # then one step without prefill, or the decode time that all is compared with would be stale


class StepCost:
    """Bounds the prefill tokens of a step: with decodes present it should last at most `max_slowdown` × without.

    Model: seconds = decode(rows) + prefill tokens × per_token, where decode(rows) is the median of recent steps without
    prefill and per_token is the upper quartile of what recent mixed steps took beyond that. Measured in mixed steps,
    per_token includes what grows with the prompt's length. Pure: no clock; `record` is told the times.
    """

    def __init__(self, max_slowdown: float = 1.7) -> None:
        self._headroom = max_slowdown - 1
        self._decode: dict[int, deque[float]] = {}  # seconds of steps without prefill, by decode rows
        self._mixed: deque[float] = deque(maxlen=WINDOW)  # seconds per prefill token beyond the decode time
        self._mixed_tokens: deque[int] = deque(maxlen=WINDOW)
        self._prefill: deque[float] = deque(maxlen=WINDOW)  # seconds per token of steps without decodes
        self._mixed_run = 0

    def record(self, decode_rows: int, prefill_tokens: int, seconds: float) -> None:
        """A step of this shape took `seconds`."""
        if prefill_tokens == 0:
            self._decode.setdefault(decode_rows, deque(maxlen=WINDOW)).append(seconds)
            self._mixed_run = 0
        elif decode_rows == 0:
            if prefill_tokens >= MIN_SAMPLE_TOKENS:
                self._prefill.append(seconds / prefill_tokens)
        else:
            self._mixed_run += 1
            decode = self.decode_seconds(decode_rows)
            if decode is not None:
                self._mixed.append((seconds - decode) / prefill_tokens)
                self._mixed_tokens.append(prefill_tokens)

    def prefill_tokens(self, decode_rows: int, limit: int) -> int:
        """How many prompt tokens may join a step of `decode_rows`: `limit` when none decode, else
        MIN_PREFILL_TOKENS ≤ n ≤ limit, and now and then 0 to measure the decode time again.
        """
        if decode_rows == 0:
            return limit
        if self._mixed_run >= MAX_MIXED_RUN:
            return 0
        decode = self.decode_seconds(decode_rows)
        if decode is None:  # before any data: a row is a row
            affordable = self._headroom * decode_rows
        else:
            affordable = self._headroom * decode / self._token_seconds(decode / decode_rows)
        if self._mixed_tokens:  # one step that happened to run fast must not open the gate
            affordable = min(affordable, 2 * max(self._mixed_tokens))
        return min(max(int(affordable), MIN_PREFILL_TOKENS), limit)

    def decode_seconds(self, rows: int) -> float | None:
        """Expected seconds of a step of `rows` decodes alone; None before any such step.

        Between measured row counts: interpolated. Outside them: the lower estimate, which allows less prefill.
        """
        if not self._decode:
            return None
        below = max((n for n in self._decode if n <= rows), default=None)
        above = min((n for n in self._decode if n >= rows), default=None)
        if below is None:
            assert above is not None
            return self._median(above) * rows / above
        if above is None or above == below:
            return self._median(below)
        low, high = self._median(below), self._median(above)
        return low + (high - low) * (rows - below) / (above - below)

    def _median(self, rows: int) -> float:
        return statistics.median(self._decode[rows])

    def _token_seconds(self, decode_row_seconds: float) -> float:
        """Seconds that one more prefill token adds to a step. Until mixed steps have run: what it takes alone."""
        alone = statistics.median(self._prefill) if self._prefill else decode_row_seconds
        if not self._mixed:
            return alone
        upper_quartile = sorted(self._mixed)[len(self._mixed) * 3 // 4]
        return max(upper_quartile, alone / 1000)  # noise can make the difference negative
