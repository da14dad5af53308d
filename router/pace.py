"""How long a dispatch should take, learnt from those that were answered: what deadlines and slowness are judged by.

Model: seconds = fixed + experts × per_expert + pairs × per_pair, one for all servers (a fit that forgets),
times a ratio of each server's own. What a server owed us before counts with it. The ratios are kept as a decaying
histogram for the deadline (a quantile) and as a mean over a short window for slowness (a server that stands still every
other moment has a fine median). Pure: no clock; times are told.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import numpy as np

WINDOW_S = 0.25
"""Samples are looked at so often."""
MIN_SAMPLES = 50
"""Fewer say nothing about a p99."""
MIN_WINDOW_SAMPLES = 8
"""Fewer wait for the next window."""
PATIENCE, FLOOR_S = 3.0, 0.05
"""A dispatch is late when it is older than PATIENCE times the p99 and than FLOOR_S."""
UNKNOWN_S = 1.0
"""Patience with a server of which too little is known."""
OWN_ALLOWANCE = 2.0
"""A server's own p99 counts up to so many times its peers': one that has become slow must not excuse itself."""
SLOW, SLOW_WINDOWS = 3.0, 4
"""Slow is: a window's mean above SLOW times the peers' median, so many times running."""

_PER_OCTAVE, _BUCKETS = 4, 128
_EDGES = 2.0 ** ((np.arange(_BUCKETS) - _BUCKETS // 2 + 1) / _PER_OCTAVE)  # upper edge of each bucket
_UNKNOWN = float("inf")
_MEMORY = 1000  # samples
_PRIOR = np.array([2e-4, 1e-4, 2e-5])  # seconds; only until there are samples


class ServerPace:
    """What is known of one server. `samples` is appended to by the dispatcher, for speed."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float, int, int]] = []
        """(seconds, expected seconds of the work before it, distinct experts, pairs) of answered dispatches."""
        self.patience = _UNKNOWN  # × expected seconds, for a deadline
        self.mean = 0.0  # ratio of the last window; 0: none yet
        self.slow_windows = 0  # running
        self._counts = np.zeros(_BUCKETS)

    def allowed_s(self, expected_s: float) -> float:
        """How long to wait for what should take `expected_s`."""
        wait_s = self.patience * expected_s
        return UNKNOWN_S if wait_s == _UNKNOWN else wait_s if wait_s > FLOOR_S else FLOOR_S

    def restart(self) -> None:
        """Judge its mean anew."""
        self.mean, self.slow_windows = 0.0, 0

    def learn(self, ratios: np.ndarray) -> None:
        """Take in what these dispatches took over what was expected."""
        index = np.ceil(np.log2(np.maximum(ratios, 1e-9)) * _PER_OCTAVE).astype(int) + _BUCKETS // 2 - 1
        self._counts *= (1 - 1 / _MEMORY) ** len(ratios)
        self._counts += np.bincount(index.clip(0, _BUCKETS - 1), minlength=_BUCKETS)

    def quantile(self, q: float) -> float | None:
        """The upper edge of the bucket with this quantile of the ratios; None while there are too few."""
        total = self._counts.sum()
        if total < MIN_SAMPLES:
            return None
        return float(_EDGES[self._counts.cumsum().searchsorted(q * total)])


class Pace:
    """The model, and what is known of each server."""

    def __init__(self) -> None:
        self.servers: dict[str, ServerPace] = {}
        self.next_look_s = 0.0
        self.fixed_s, self.expert_s, self.pair_s = _PRIOR.tolist()
        self._moments, self._target = np.zeros((3, 3)), np.zeros(3)

    def of(self, server: str) -> ServerPace:
        """That server's."""
        return self.servers.setdefault(server, ServerPace())

    def expected_s(self, experts: int, pairs: int) -> float:
        """Seconds that a dispatch takes an average server which has nothing else to do."""
        return self.fixed_s + experts * self.expert_s + pairs * self.pair_s

    def look(self, trusted: Iterable[str], now_s: float) -> list[str]:
        """Learn from the samples since the last look; returns the servers that turned out slow.

        `trusted` are those in normal use: they are each other's peers, and the model is learnt from them.
        """
        self.next_look_s = now_s + WINDOW_S
        peers = [s for s in trusted if s in self.servers]
        fresh = {}
        for server, pace in self.servers.items():
            if len(pace.samples) >= MIN_WINDOW_SAMPLES:
                fresh[server] = np.array(pace.samples)
                pace.samples.clear()
                took = self._split(fresh[server])
                pace.learn(took[0] / took[1])
                pace.mean = float(took[0].sum() / took[1].sum())
        self._fit([fresh[s] for s in peers if s in fresh])
        self._set_patience(peers)
        return [s for s in peers if s in fresh and self._is_slow(s, peers)]

    def peers_mean(self, server: str, trusted: Iterable[str]) -> float | None:
        """The (lower) median of the other servers' last mean ratios."""
        means = [self.servers[s].mean for s in trusted if s != server and s in self.servers and self.servers[s].mean]
        return statistics.median_low(means) if means else None

    def _is_slow(self, server: str, peers: list[str]) -> bool:
        pace, usual = self.servers[server], self.peers_mean(server, peers)
        slow = usual is not None and pace.mean > SLOW * usual
        pace.slow_windows = pace.slow_windows + 1 if slow else 0
        if pace.slow_windows < SLOW_WINDOWS:
            return False
        pace.restart()
        return True

    def _set_patience(self, peers: list[str]) -> None:
        p99 = {s: pace.quantile(0.99) for s, pace in self.servers.items()}
        for server, pace in self.servers.items():
            known = [q for s in peers if s != server and (q := p99[s]) is not None]
            usual = statistics.median_low(known) if known else None
            mine = p99[server]
            if mine is None:
                pace.patience = _UNKNOWN if usual is None else PATIENCE * OWN_ALLOWANCE * usual
            else:
                pace.patience = PATIENCE * (mine if usual is None else min(mine, OWN_ALLOWANCE * usual))

    def _split(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(seconds, expected seconds) of samples."""
        took, before, experts, pairs = samples.T
        expected = before + self.fixed_s + experts * self.expert_s + pairs * self.pair_s
        return took, np.maximum(expected, 1e-9)

    def _fit(self, samples: list[np.ndarray]) -> None:
        """Relative errors count: a prefill must not outweigh a hundred decodes. Samples with work before them: not."""
        if not samples:
            return
        took, before, experts, pairs = np.concatenate(samples).T
        took = np.maximum(took, 1e-6)
        alone = before == 0
        took, rows = took[alone], np.stack([np.ones(alone.sum()), experts[alone], pairs[alone]], 1)
        weighted = rows / took[:, None]
        keep = (1 - 1 / _MEMORY) ** len(took)
        self._moments = keep * self._moments + weighted.T @ weighted
        self._target = keep * self._target + weighted.sum(0)
        self.fixed_s, self.expert_s, self.pair_s = _positive_solution(self._moments, self._target).tolist()


def _positive_solution(moments: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The least-squares solution whose coefficients are not negative, by leaving out what would be; never all zero.

    A little ridge towards the prior's proportions decides what the samples leave open: decodes alone do not tell
    experts from pairs.
    """
    scale = target.sum() / max(1e-12, float((moments @ _PRIOR).sum()))
    prior = _PRIOR * scale
    ridge = 1e-3 * np.diag(np.maximum(np.diag(moments), 1e-12))
    free = np.ones(3, bool)
    solution = prior
    while free.any():
        solution = np.zeros(3)
        left = np.ix_(free, free)
        solution[free] = np.linalg.solve((moments + ridge)[left], (target + ridge @ prior)[free])
        if (solution >= 0).all():
            return solution
        free &= solution > 0
    return prior
