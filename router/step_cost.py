"""How long a step takes, learnt from steps that ran, so that prefill does not hold up the streams that decode."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 15  # samples kept of each kind: an order statistic of them shrugs off pauses and follows drift within seconds
MIN_PREFILL_TOKENS = 4  # progress of prefill in a mixed step, whatever it costs
MIN_SAMPLE_TOKENS = 16  # a shorter prefill-only step says more about fixed costs than about tokens
MAX_MIXED_RUN = 25  # then two steps measure again what all others are compared with
WORTH = 1.25
"""A step of so many times one with the least prefill is worth it: few tokens cost nearly as much as some more."""
MOST_FOR_LEAST = 2.0
"""A step with the least is taken to last no longer than so many times one without. Else a pause would open the gate."""
CHEAPER, DEARER = 0.96, 1.4
"""What a mixed step does to the price of a prefill token. They balance when one step in nine is too long."""

_Seconds = dict[int, deque[float]]
"""By decode rows."""


class StepCost:
    """Bounds the prefill tokens of a step: beside decodes most steps last at most `max_slowdown` × without it.

    Any prefill costs something, as its rows touch further experts: where the least (`MIN_PREFILL_TOKENS`) nearly takes
    up that bound, it is `WORTH` × such a step instead. The price of a token beyond the least is found by trying, as TCP
    finds its window: a step within the bound makes tokens a bit cheaper, one beyond much dearer. Time divided by tokens
    would count noise as theirs. Pure: no clock; `record` is told the times.
    """

    def __init__(self, max_slowdown: float = 1.7) -> None:
        self._max_slowdown = max_slowdown
        self._decode: _Seconds = {}  # of steps without prefill
        self._least: _Seconds = {}  # of steps with the least of it
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
            if prefill_tokens > self._allowed:  # streams that catch up are not paced
                return
            if self._allowed == MIN_PREFILL_TOKENS:
                self._least.setdefault(decode_rows, deque(maxlen=WINDOW)).append(seconds)
            elif self._least and 2 * prefill_tokens >= self._allowed:  # the end of a prompt tells little
                self._learn(decode_rows, seconds)

    def prefill_tokens(self, decode_rows: int, limit: int) -> int:
        """How many prompt tokens may join a step of `decode_rows`: `limit` when none decode, else
        MIN_PREFILL_TOKENS ≤ n ≤ limit; at first and now and then 0, then the least, to measure what these take.
        """
        if decode_rows == 0:
            return limit
        if not self._decode or self._mixed_run >= MAX_MIXED_RUN:
            return 0
        allowed = MIN_PREFILL_TOKENS
        if self._least and self._mixed_run:
            allowed += int(self._room(decode_rows) / self._price(decode_rows))
        self._allowed, self._limit = min(allowed, limit), limit
        return self._allowed

    def decode_seconds(self, rows: int) -> float:
        """Seconds that a slow step of `rows` decodes alone takes; there must have been one."""
        return _expected(self._decode, rows)

    def _base(self, rows: int) -> float:
        """Seconds that a slow step with the least prefill takes."""
        decode = self.decode_seconds(rows)
        return min(max(_expected(self._least, rows), decode), MOST_FOR_LEAST * decode)

    def _bound(self, rows: int) -> float:
        """Seconds that a step may last."""
        return max(self._max_slowdown * self.decode_seconds(rows), WORTH * self._base(rows))

    def _room(self, rows: int) -> float:
        """Seconds that tokens beyond the least may add."""
        return self._bound(rows) - self._base(rows)

    def _price(self, rows: int) -> float:
        """Seconds that such a token is taken to cost. Until there were any: what it takes alone."""
        if self._price_s is not None:
            return self._price_s
        return statistics.median(self._prefill) if self._prefill else self.decode_seconds(rows) / rows

    def _learn(self, rows: int, seconds: float) -> None:
        price = self._price(rows)
        if seconds > self._bound(rows):
            self._price_s = min(DEARER * price, self._room(rows) / MIN_PREFILL_TOKENS)
        elif self._allowed < self._limit:
            self._price_s = CHEAPER * price


def _expected(measured: _Seconds, rows: int) -> float:
    """Between measured row counts: interpolated. Outside them: the lower estimate, which allows less prefill."""
    below = max((n for n in measured if n <= rows), default=None)
    above = min((n for n in measured if n >= rows), default=None)
    if below is None:
        assert above is not None
        return _slow(measured[above]) * rows / above
    if above is None or above == below:
        return _slow(measured[below])
    low, high = _slow(measured[below]), _slow(measured[above])
    return low + (high - low) * (rows - below) / (above - below)


def _slow(seconds: deque[float]) -> float:
    """The upper quartile."""
    return sorted(seconds)[len(seconds) * 3 // 4]
