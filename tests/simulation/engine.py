"""A model of the router's engine: continuous batching, layers, parking of rows whose experts have no replica.

It does with cheap numbers what `router.engine` does with tensors. A sequence's `values` stand for its KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moering.protocol import Failed, Submit, Token, Tokens
from tests.simulation.arithmetic import TOP_K, combine, embed, gate, next_token
from tests.simulation.network import End

if TYPE_CHECKING:
    from tests.simulation.router import Router

FLIGHTS, CHUNK, MAX_SEQUENCES = 2, 4, 16
MISSING_TIMEOUT_S = 30.0
NOTHING = np.empty(0, np.int64)


@dataclass(eq=False, slots=True)
class Sequence:
    """One attempt of a request."""

    end: End
    request_id: str
    attempt: int
    tokens: list[int]
    emitted: int
    max_tokens: int
    values: list[int] = field(default_factory=list)
    in_flight: bool = False
    finished: bool = False


@dataclass(eq=False, slots=True)
class Flight:
    """Rows of some sequences on their way through the layers."""

    items: list[tuple[Sequence, int, int]]  # sequence, first position, rows
    x: np.ndarray  # int64 [rows]
    layer: int
    topk_ids: np.ndarray  # int64 [rows, k]
    outputs: np.ndarray  # int64 [rows × k]
    prefill: bool
    missing: np.ndarray = field(default_factory=lambda: NOTHING)
    parked_s: float = 0.0

    def add(self, slots: np.ndarray, tensor: np.ndarray) -> None:
        """Rows of a reply. They are added up, so that any that comes twice shows in the tokens."""
        self.outputs[slots] += tensor[:, 0].astype(np.int64)

    @property
    def owners(self) -> np.ndarray:
        """The number of the item that each row belongs to."""
        return np.repeat(np.arange(len(self.items)), [n for _, _, n in self.items])


class Engine:
    """Sequences and flights of one router."""

    def __init__(self, router: Router) -> None:
        self._router, self._world, self._size = router, router.world, router.cluster.size
        self.sequences: dict[tuple[str, int], Sequence] = {}
        self._flights = 0
        self._parked: list[Flight] = []
        self._retry = False

    # --- requests ---

    def submitted(self, end: End, submit: Submit) -> None:
        """A gateway asks."""
        tokens = [*submit.prompt, *submit.emitted]
        sequence = Sequence(
            end, submit.request_id, submit.attempt, tokens, len(submit.emitted), submit.sampling.max_tokens
        )  # fmt: skip
        self.sequences[submit.request_id, submit.attempt] = sequence
        self._start()

    def abort(self, request_id: str, attempt: int) -> None:
        """A gateway waits no more."""
        sequence = self.sequences.pop((request_id, attempt), None)
        if sequence is not None:
            sequence.finished = True

    def gateway_gone(self, end: End) -> None:
        """All requests of a gateway are void."""
        for s in [s for s in self.sequences.values() if s.end is end]:
            self.abort(s.request_id, s.attempt)

    def _fail(self, sequence: Sequence, code: str) -> None:
        if not sequence.finished:
            self.abort(sequence.request_id, sequence.attempt)
            sequence.end.send(Failed(sequence.request_id, sequence.attempt, code, code))

    # --- the loop ---

    def look(self) -> None:
        """What time alone brings about."""
        for flight in list(self._parked):
            if self._world.now_s - flight.parked_s > MISSING_TIMEOUT_S:
                for sequence, _, _ in flight.items:
                    self._fail(sequence, "no_replica")
            self._drop_if_dead(flight)
        self._start()

    def routes_changed(self) -> None:
        """Held slots may be tried again."""
        if not self._retry:
            self._retry = True
            self._router.after(0.0, self._retry_parked)

    def _start(self) -> None:
        while self._flights < FLIGHTS:
            ready = [s for s in self.sequences.values() if not s.in_flight][:MAX_SEQUENCES]
            if not ready:
                return
            items, x = [], []
            for s in ready:
                s.in_flight = True
                start = len(s.values)
                chunk = s.tokens[start : start + CHUNK]
                items.append((s, start, len(chunk)))
                x += [embed(token, start + i) for i, token in enumerate(chunk)]
            self._flights += 1
            rows = np.array(x, np.int64)
            self._to_experts(Flight(items, rows, -1, NOTHING, NOTHING, len(x) > len(items)))

    def _to_experts(self, flight: Flight) -> None:
        flight.layer += 1
        flight.topk_ids = gate(flight.x, self._size.experts)
        flight.outputs = np.zeros(len(flight.x) * TOP_K, np.int64)
        self._router.submit(flight)

    def advance(self, flight: Flight, missing: np.ndarray, poisoned: np.ndarray) -> None:
        """All that can be computed now of a flight's layer is."""
        if len(poisoned):
            for number in np.unique(flight.owners[poisoned]).tolist():
                self._fail(flight.items[number][0], "poison")
        if len(missing):
            self._park(flight, missing)
            return
        flight.x = combine(flight.x, flight.outputs.reshape(-1, TOP_K))
        if flight.layer + 1 < self._size.layers:
            self._to_experts(flight)
        else:
            self._land(flight)

    def _land(self, flight: Flight) -> None:
        self._flights -= 1
        emitted: dict[End, list[Token]] = {}
        values = flight.x.tolist()
        for s, _, rows in flight.items:
            mine, values = values[:rows], values[rows:]
            s.in_flight = False
            if s.finished:
                continue
            s.values += mine
            if len(s.values) == len(s.tokens):
                emitted.setdefault(s.end, []).append(self._sample(s))
        for end, tokens in emitted.items():
            end.send(Tokens(tokens))
        self._start()

    def _sample(self, s: Sequence) -> Token:
        token_id, position = next_token(s.values), s.emitted
        s.tokens.append(token_id)
        s.emitted += 1
        reason = "length" if s.emitted >= s.max_tokens else None
        if reason is not None:
            self.abort(s.request_id, s.attempt)
        return Token(s.request_id, s.attempt, position, token_id, reason)

    # --- experts without a replica ---

    def _park(self, flight: Flight, missing: np.ndarray) -> None:
        self._flights -= 1
        waiting = np.unique(flight.owners[missing // TOP_K])
        parked = self._split(flight, waiting)
        rows = np.flatnonzero(np.isin(flight.owners, waiting))
        parked.missing = np.searchsorted(rows, missing // TOP_K) * TOP_K + missing % TOP_K
        parked.parked_s = self._world.now_s
        self._parked.append(parked)
        if self._router.routable(flight.layer, flight.topk_ids.reshape(-1)[missing]):
            self.routes_changed()
        rest = np.setdiff1d(np.arange(len(flight.items)), waiting)
        if len(rest):
            self._flights += 1
            self.advance(self._split(flight, rest), NOTHING, NOTHING)

    def _split(self, flight: Flight, chosen: np.ndarray) -> Flight:
        rows = np.isin(flight.owners, chosen)
        items = [flight.items[n] for n in chosen.tolist()]
        outputs = flight.outputs.reshape(-1, TOP_K)[rows].reshape(-1)
        return Flight(items, flight.x[rows], flight.layer, flight.topk_ids[rows], outputs, flight.prefill)

    def _retry_parked(self) -> None:
        self._retry = False
        for flight in list(self._parked):
            self._drop_if_dead(flight)
        parked, self._parked = self._parked, []
        for flight in parked:
            self._flights += 1
            self._router.submit(flight, flight.missing)

    def _drop_if_dead(self, flight: Flight) -> None:
        if all(s.finished for s, _, _ in flight.items):
            self._parked.remove(flight)
