"""Continuous batching with chunked prefill: which tokens the next step computes. Policy only; no clock, no tensors.

A step holds one token of every sequence that decodes, then pieces of prompts within the budget that `StepCost` allows.
First come, first served, except that a long prompt shares with the next one instead of holding it up, and that streams
which were interrupted (their router died, or they gave their blocks back) go first and in full steps: their clients
wait in the middle of an answer. When blocks run out the newest sequence gives its own back and later computes its
tokens again; since a row's bits depend on its sequence alone, nobody can tell.

The engine's loop: `schedule()`, run the forward, `complete()`, sample, `update()`. Several batches may be in flight.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from router.prefix_cache import PrefixCache
from router.sequence import Refusal, Sequence, Status, check
from router.step_cost import MIN_PREFILL_TOKENS, StepCost

logger = logging.getLogger(__name__)

MIN_MICRO_BATCH = 8  # decodes; fewer are not split, as every step has a price of its own
RESUMED = 1 << 62  # subtracted from the arrival of streams that began on another router: they have waited before
PREFILL_LANES = 2  # prompts that share the budget when they do not all fit in it


class BlockManager(Protocol):
    """The blocks of the KV cache."""

    @property
    def free_blocks(self) -> int:
        """How many can be allocated now."""

    def allocate(self, n: int, after: int | None = None) -> list[int]:
        """`n` blocks, only called with n ≤ free_blocks; `after`: the last block of the sequence they extend."""

    def free(self, blocks: list[int]) -> None:
        """Give blocks back."""


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Positions [start, start + length) of a sequence. `samples`: its last row's logits yield the next token."""

    sequence: Sequence
    start: int
    length: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes: decodes first, then pieces of prompts."""

    items: list[ScheduledChunk]

    @property
    def decode_rows(self) -> int:
        """Rows that come from chunks of one token."""
        return sum(item.length == 1 for item in self.items)

    @property
    def prefill_tokens(self) -> int:
        """Rows that come from longer chunks."""
        return sum(item.length for item in self.items if item.length > 1)


class Scheduler:
    """Owns the queue, the running sequences and their blocks. All blocks must be free when it is built."""

    def __init__(
        self,
        block_manager: BlockManager,
        prefixes: PrefixCache,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        block_size: int,
        max_model_len: int,
        cost: StepCost,
        vocab_size: int,
        micro_batches: int = 1,
    ) -> None:
        self.waiting: list[Sequence] = []  # both by arrival
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.tokens_recomputed = 0  # after a preemption, and of requests that began on another router
        self.cost = cost
        self.prefixes, self._blocks = prefixes, block_manager
        self._num_blocks = block_manager.free_blocks
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._block_size = block_size
        # One sequence may have the whole cache, so the oldest can always go on: no deadlock.
        self._max_model_len = min(max_model_len, self._num_blocks * block_size)
        self._vocab_size, self._micro_batches = vocab_size, micro_batches
        self._alive: dict[tuple[str, int], Sequence] = {}
        self._arrivals = 0

    def add(self, sequence: Sequence) -> Refusal | None:
        """Queue `sequence`, or say why it can never be served."""
        key = (sequence.request_id, sequence.attempt)
        if key in self._alive:
            return Refusal("bad_request", "this request and attempt is already being served")
        refusal = check(sequence, self._vocab_size, self._max_model_len)
        if refusal is None:
            self._arrivals += 1
            sequence.arrival = self._arrivals - (RESUMED if sequence.output else 0)
            self._alive[key] = sequence
            bisect.insort(self.waiting, sequence, key=_arrival)
            self.tokens_recomputed += sequence.num_tokens if sequence.output else 0
        return refusal

    @property
    def blocks_in_use(self) -> int:
        """KV blocks that sequences hold."""
        return self._num_blocks - self._blocks.free_blocks

    @property
    def catching_up(self) -> bool:
        """Whether a stream that began on another router has to be caught up with; those are the first that wait."""
        return any(s.interrupted and s.arrival < 0 for s in (*self.running, *self.waiting[:1]))

    def abort(self, request_id: str, attempt: int) -> Sequence | None:
        """Cancel the sequence of this request and attempt and return it; None where there is none (any more)."""
        sequence = self._alive.get((request_id, attempt))
        if sequence is not None:
            self.cancel(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """End `sequence` without a finish reason. In flight, it keeps its blocks until its step is completed."""
        self._end(sequence, None)

    def expired(self, now: float) -> list[Sequence]:
        """Sequences past their deadline, for the caller to fail and cancel."""
        return [s for s in self._alive.values() if s.deadline <= now]

    def schedule(self) -> Batch | None:
        """The next step, its sequences now in flight; None when nothing can run."""
        items = self._decodes()
        # Streams in flight count: what runs meanwhile holds them up just as well.
        decoding = sum(s.decodes for s in self.running)
        limit = max(self._max_num_batched_tokens - len(items), MIN_PREFILL_TOKENS)
        budget = limit if self._catches_up() else self.cost.prefill_tokens(decoding, limit)
        items += self._prefills(budget if items else max(budget, MIN_PREFILL_TOKENS))
        return Batch(items) if items else None

    def complete(self, items: Iterable[ScheduledChunk]) -> list[ScheduledChunk]:
        """The forward of `items` has ended. Returns those to sample from: sampling and not cancelled meanwhile."""
        to_sample = []
        for item in items:
            sequence = item.sequence
            sequence.in_flight = False
            if sequence.status is Status.FINISHED:
                self._release(sequence)
                continue
            sequence.num_computed += item.length
            if sequence.num_computed // self._block_size > item.start // self._block_size:
                self.prefixes.offer(sequence)
            if item.samples:
                to_sample.append(item)
        return to_sample

    def update(self, sequence: Sequence, token_id: int) -> str | None:
        """Append a sampled token. Returns the finish reason ("stop" | "length") if it is the last one."""
        sequence.output.append(token_id)
        limits, generated = sequence.sampling, len(sequence.output)
        reason = None
        if token_id in limits.stop_token_ids and generated > limits.min_tokens:
            reason = "stop"
        elif generated >= limits.max_tokens or sequence.num_tokens >= self._max_model_len:
            reason = "length"
        if reason is not None:
            self._end(sequence, reason)
        return reason

    def _decodes(self) -> list[ScheduledChunk]:
        items: list[ScheduledChunk] = []
        # An equal share for each micro-batch: the first one would take all, and the others find nothing to do.
        most = max(-(-sum(s.decodes for s in self.running) // self._micro_batches), MIN_MICRO_BATCH)
        for sequence in list(self.running):  # a copy: making room for one may preempt later ones
            if len(items) == most:
                break
            ready = sequence.status is Status.RUNNING and not sequence.in_flight and sequence.decodes
            if ready and self._make_room(sequence):
                items.append(_chunk(sequence, 1))
        return items

    def _make_room(self, sequence: Sequence) -> bool:
        """Blocks for all known tokens, taken from newer sequences if need be. False: it has to wait for a step in
        flight, or for an older sequence to end; it keeps what it has, because whoever is older may take that.
        """
        while self._missing_blocks(sequence) > self._blocks.free_blocks:
            newer = (s for s in reversed(self.running) if s.arrival > sequence.arrival and not s.in_flight)
            victim = next(newer, None)
            if victim is None:
                return False
            self._preempt(victim)
        return self._reserve(sequence)

    def _missing_blocks(self, sequence: Sequence) -> int:
        return -(-sequence.num_tokens // self._block_size) - len(sequence.block_table)

    def _reserve(self, sequence: Sequence) -> bool:
        """Allocate the blocks of all known tokens of `sequence`, if there are enough free ones."""
        missing = self._missing_blocks(sequence)
        if missing > self._blocks.free_blocks:
            return False
        if missing:
            table = sequence.block_table
            table += self._blocks.allocate(missing, after=table[-1] if table else None)
        return True

    def _catches_up(self) -> bool:
        """Whether a stream that was interrupted can be computed now."""
        if any(s.interrupted and not s.in_flight for s in self.running):
            return True
        following = self.waiting[0] if self.waiting and len(self.running) < self._max_num_seqs else None
        return bool(following and following.interrupted and self._missing_blocks(following) <= self._blocks.free_blocks)

    def _prefills(self, budget: int) -> list[ScheduledChunk]:
        """Short prompts first, whole where they fit; a long one leaves half of the budget to the other lane.

        Interrupted streams one after the other, the shortest first: all would be as late as the last if they shared.
        """
        lanes = self._lanes(budget)
        if lanes and lanes[0].interrupted:
            lanes.sort(key=lambda s: s.remaining)
            most = budget
        else:
            most = -(-budget // 2)
            lanes.sort(key=lambda s: s.remaining > most)
        items = []
        for sequence in lanes:
            share = budget if sequence is lanes[-1] else min(most, budget)
            length = min(sequence.remaining, share)
            if length:
                items.append(_chunk(sequence, length))
                budget -= length
        return items

    def _lanes(self, budget: int) -> list[Sequence]:
        """The sequences that prefill in a step of `budget` tokens, admitted from the queue as far as blocks allow:
        interrupted ones, or else all.
        """
        if budget == 0:
            return []
        lanes = [s for s in self.running if not s.decodes and not s.in_flight]
        while self.waiting and len(self.running) < self._max_num_seqs:
            sequence = self.waiting[0]
            rivals = [s for s in lanes if s.interrupted >= sequence.interrupted]
            filled = sum(s.remaining for s in rivals) >= budget
            self.prefixes.find(sequence)  # of use from now on: its new blocks are not to be those
            if (filled and len(rivals) >= PREFILL_LANES) or not self._reserve(sequence):
                break
            sequence.status = Status.RUNNING
            if not sequence.scores_prompt:  # what is not computed has no logits
                self.prefixes.fetch(sequence)
            bisect.insort(self.running, sequence, key=_arrival)
            self.waiting.pop(0)  # last: other threads count both queues, and must not miss it
            lanes.append(sequence)
        return [s for s in lanes if s.interrupted] or lanes

    def _preempt(self, sequence: Sequence) -> None:
        logger.info(
            "out of KV blocks: request %s will compute %d tokens again", sequence.request_id, sequence.num_computed
        )
        self.num_preemptions += 1
        self.tokens_recomputed += sequence.num_computed
        self._release(sequence)
        sequence.num_computed = 0
        sequence.status = Status.WAITING
        bisect.insort(self.waiting, sequence, key=_arrival)

    def _end(self, sequence: Sequence, reason: str | None) -> None:
        if sequence.status is Status.FINISHED:
            return
        del self._alive[sequence.request_id, sequence.attempt]
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif not sequence.in_flight:
            self._release(sequence)
        sequence.status, sequence.finish_reason = Status.FINISHED, reason

    def _release(self, sequence: Sequence) -> None:
        self.prefixes.offer(sequence)  # again: the block that held a prefix first may be gone by now
        self._blocks.free(sequence.block_table)
        sequence.block_table = []
        self.running.remove(sequence)

    def check_integrity(self) -> None:
        """Raise AssertionError where the books do not add up. For tests and idle moments."""
        held = [block for s in self.running for block in s.block_table]
        assert len(held) == len(set(held)), "a block belongs to two sequences"
        assert len(held) + self._blocks.free_blocks == self._num_blocks, "a block is lost or freed twice"
        assert len(self.running) <= self._max_num_seqs, "too many sequences run"
        for queue in (self.waiting, self.running):
            assert queue == sorted(queue, key=_arrival), "a queue is out of order"
        for s in self.waiting:
            assert s.status is Status.WAITING and not s.block_table and not s.num_computed and not s.in_flight, s
        for s in self.running:
            assert s.status is Status.RUNNING or (s.status is Status.FINISHED and s.in_flight), s
            assert s.num_computed <= min(s.num_tokens, len(s.block_table) * self._block_size), s
        alive = [s for s in self.waiting + self.running if s.status is not Status.FINISHED]
        assert set(self._alive.values()) == set(alive), "a sequence is lost"


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _chunk(sequence: Sequence, length: int) -> ScheduledChunk:
    sequence.in_flight = True
    return ScheduledChunk(sequence, sequence.num_computed, length, samples=length == sequence.remaining)
