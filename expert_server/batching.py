"""Merges what several routers sent for one layer into one grouped call, and takes the result apart again. Pure."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from moering.expert_frames import Dispatch
from moering.shared_rows import ARRAYS

FEW_PAIRS = 64
"""Up to so many pairs, lists are faster than arrays."""


class Limits(NamedTuple):
    """What a dispatch may ask for."""

    layers: int
    experts: int
    hidden_size: int
    pairs: int  # of one message
    dtypes: tuple[str, ...] = ("float32",)


class Request(NamedTuple):
    """A checked dispatch: whom to answer, the rows, and the experts of its pairs."""

    identity: bytes
    message: Dispatch
    hidden: np.ndarray  # [rows, hidden_size], as all rows here of the message's dtype (`moering.shared_rows.ARRAYS`)
    rows: np.ndarray | None  # int64 [pairs], into hidden; None: pair i has row i
    experts: list[int]  # distinct, ascending
    counts: list[int]  # pairs of each
    out: np.ndarray | None  # [pairs, hidden_size] where the answer is to be put, if it is shared memory

    @property
    def pairs(self) -> int:
        """Number of (row, expert) pairs."""
        return len(self.hidden) if self.rows is None else len(self.rows)


class Group(NamedTuple):
    """Requests of one layer and dtype as one grouped call, pairs sorted by expert."""

    requests: list[Request]
    rows: np.ndarray | None  # int64 [pairs], into the concatenated rows of all requests; None: pair i has row i
    experts: list[int]  # distinct, ascending
    counts: list[int]  # pairs of each
    order: np.ndarray | None  # position of each sorted pair before sorting; None: they were sorted


def parse(  # noqa: PLR0911  (one return for each thing that may be wrong)
    identity: bytes,
    message: Dispatch,
    rows: memoryview | tuple[np.ndarray, np.ndarray],
    limits: Limits,
) -> Request | str:
    """The request in a dispatch, or what is wrong with it.

    `rows` is a frame's bytes, or arrays of a slot in shared memory: what was sent, and where the answer goes.
    """
    layers, num_experts, hidden_size, max_pairs, dtypes = limits
    row_each = isinstance(rows, tuple) and 2 * message.rows == len(message.pairs)  # else it is 4 * pairs
    pairs, rest = divmod(len(message.pairs), 2 if row_each else 4)
    if message.dtype not in dtypes or message.columns != hidden_size:
        return f"{message.dtype} rows of {message.columns}; here are {' or '.join(dtypes)} rows of {hidden_size}"
    if message.layer >= layers:
        return f"layer {message.layer} of {layers}"
    if isinstance(rows, tuple):
        max_pairs = min(max_pairs, len(rows[1]))
    if rest or not 0 < message.rows <= pairs <= max_pairs:
        return f"{len(message.pairs)} bytes of pairs for {message.rows} rows; at most {max_pairs} pairs in one message"
    # both ends are little-endian
    numbers: Any = (
        memoryview(message.pairs).cast("H").tolist() if pairs <= FEW_PAIRS else np.frombuffer(message.pairs, "H")
    )
    pair_experts = numbers[-pairs:]
    grouped = (runs_of_few if pairs <= FEW_PAIRS else runs_of_many)(pair_experts)
    if grouped is None or pair_experts[-1] >= num_experts:
        return f"experts {list(map(int, pair_experts[:8]))}… are not sorted, or beyond {num_experts}"
    if isinstance(rows, tuple):
        hidden, out = rows[0][: message.rows], rows[1][:pairs]
    else:
        hidden, out = np.frombuffer(rows, ARRAYS[message.dtype]).reshape(message.rows, hidden_size), None
    if row_each:
        return Request(identity, message, hidden, None, *grouped, out)
    pair_rows = np.array(numbers[:pairs], np.int64)
    if pair_rows.max() >= message.rows:
        return f"row {pair_rows.max()} of {message.rows}"
    return Request(identity, message, hidden, pair_rows, *grouped, out)


def group(requests: list[Request], max_pairs: int) -> list[Group]:
    """Grouped calls for these requests, decode before prefill: one call per layer and dtype, of up to `max_pairs`."""
    if len(requests) == 1:  # the common case, and the one that a decode step waits for
        return [_merge(requests)]
    groups: list[list[Request]] = []
    open_groups: dict[tuple[int, str], tuple[list[Request], int]] = {}
    for r in sorted(requests, key=lambda r: r.message.prefill):
        key = r.message.layer, r.message.dtype
        members, pairs = open_groups.get(key, ([], max_pairs))
        if pairs + r.pairs > max_pairs:
            members, pairs = [], 0
            groups.append(members)
        members.append(r)
        open_groups[key] = (members, pairs + r.pairs)
    return [_merge(members) for members in groups]


def _merge(requests: list[Request]) -> Group:
    if len(requests) == 1:
        r = requests[0]
        return Group(requests, r.rows, r.experts, r.counts, None)
    offsets = np.cumsum([0] + [len(r.hidden) for r in requests[:-1]])
    rows = np.concatenate(
        [(np.arange(r.pairs) if r.rows is None else r.rows) + o for r, o in zip(requests, offsets, strict=True)]
    )
    unsorted = np.concatenate([np.repeat(r.experts, r.counts) for r in requests])
    order = unsorted.argsort(kind="stable")
    experts, counts = np.unique(unsorted, return_counts=True)
    return Group(requests, rows[order], experts.tolist(), counts.tolist(), order)


def runs_of_many(pair_experts: np.ndarray) -> tuple[list[int], list[int]] | None:
    """`runs_of_few` for arrays."""
    changes = (pair_experts[1:] != pair_experts[:-1]).nonzero()[0]
    bounds = np.zeros(len(changes) + 2, np.int64)
    bounds[1:-1], bounds[-1] = changes + 1, len(pair_experts)
    experts = pair_experts[bounds[:-1]]
    if (experts[1:] < experts[:-1]).any():
        return None
    return experts.tolist(), (bounds[1:] - bounds[:-1]).tolist()


def runs_of_few(pair_experts: list[int]) -> tuple[list[int], list[int]] | None:
    """The distinct experts and how often each comes; None where they are not ascending."""
    experts: list[int] = []
    counts: list[int] = []
    last = -1
    for expert in pair_experts:
        if expert == last:
            counts[-1] += 1
        elif expert > last:
            experts.append(expert)
            counts.append(1)
            last = expert
        else:
            return None
    return experts, counts


def split(group: Group, out: np.ndarray) -> list[np.ndarray]:
    """The rows of `out` [pairs, hidden_size] that answer each request, in the order of its pairs."""
    if group.order is None:
        return [out]
    unsorted = np.empty_like(out)
    unsorted[group.order] = out
    bounds = np.cumsum([r.pairs for r in group.requests])[:-1]
    return np.split(unsorted, bounds)
