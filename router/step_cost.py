"""How long a step takes, learnt from steps that ran, so that prefill does not hold up the streams that decode."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 15  # samples kept of each kind: an order statistic of them shrugs off pauses and follows drift within seconds
MIN_PREFILL_TOKENS = 4  # progress of prefill in a mixed step, whatever it costs
MIN_SAMPLE_TOKENS = 16  # a shorter prefill-only step says more about fixed costs than about tokens
MAX_MIXED_RUN = 25  # then one step without prefill, or the decode time that all is compared with would be stale
CHEAPER, DEARER = 0.96, 1.4
"""What a mixed step does to the price of a prefill token. They balance when one step in nine is too long."""


class StepCost:
    """Bounds the prefill tokens of a step: beside decodes most steps last at most `max_slowdown` × without it.

    The price of a token is found by trying, as TCP finds its window: a mixed step within the bound makes tokens a bit
    cheaper, one beyond makes them much dearer. Time divided by tokens would count noise, and what any mixed step costs,
    as theirs: with few tokens it shows little else, so that few would stay few. Pure: no clock; `record` is told the
    times.
    """

    def __init__(self, max_slowdown: float = 1.7) -> None:
        self._max_slowdown = max_slowdown
        self._decode: dict[int, deque[float]] = {}  # seconds of steps without prefill, by decode rows
        self._prefill: deque[float] = deque(maxlen=WINDOW)  # seconds per token of steps without decodes
        self._price_s: float | None = None  # of a token in a mixed step, once there was one
        self._allowed = self._limit = 0  # of the last mixed step
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
            if decode is not None and 2 * prefill_tokens >= self._allowed:  # the end of a prompt tells nothing
                self._learn(decode, decode_rows, seconds > self._max_slowdown * decode)

    def prefill_tokens(self, decode_rows: int, limit: int) -> int:
        """How many prompt tokens may join a step of `decode_rows`: `limit` when none decode, else
        MIN_PREFILL_TOKENS ≤ n ≤ limit, and at first and now and then 0 to measure the decode time.
        """
        if decode_rows == 0:
            return limit
        decode = self.decode_seconds(decode_rows)
        if decode is None or self._mixed_run >= MAX_MIXED_RUN:
            return 0
        affordable = self._room(decode) / self._price(decode, decode_rows)
        self._allowed, self._limit = min(max(int(affordable), MIN_PREFILL_TOKENS), limit), limit
        return self._allowed

    def _room(self, decode_s: float) -> float:
        """Seconds that prefill may add to a step."""
        return (self._max_slowdown - 1) * decode_s

    def _price(self, decode_s: float, decode_rows: int) -> float:
        """Seconds that a token is taken to cost. Until mixed steps have run: what it takes alone."""
        if self._price_s is not None:
            return self._price_s
        return statistics.median(self._prefill) if self._prefill else decode_s / decode_rows

    def _learn(self, decode_s: float, decode_rows: int, too_long: bool) -> None:
        price = self._price(decode_s, decode_rows)
        if too_long:
            self._price_s = min(DEARER * price, self._room(decode_s) / MIN_PREFILL_TOKENS)
        elif self._allowed < self._limit:
            self._price_s = CHEAPER * price

    def decode_seconds(self, rows: int) -> float | None:
        """Seconds that a slow step of `rows` decodes alone takes; None before any such step.

        Between measured row counts: interpolated. Outside them: the lower estimate, which allows less prefill.
        """
        if not self._decode:
            return None
        below = max((n for n in self._decode if n <= rows), default=None)
        above = min((n for n in self._decode if n >= rows), default=None)
        if below is None:
            assert above is not None
            return self._slow(above) * rows / above
        if above is None or above == below:
            return self._slow(below)
        low, high = self._slow(below), self._slow(above)
        return low + (high - low) * (rows - below) / (above - below)

    def _slow(self, rows: int) -> float:
        """The upper quartile."""
        return sorted(self._decode[rows])[len(self._decode[rows]) * 3 // 4]
