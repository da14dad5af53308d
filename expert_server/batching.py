"""Merges what several routers sent for one layer into one grouped call, and takes the result apart again. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from moering.protocol import Dispatch


@dataclass(frozen=True, slots=True)
class Request:
    """A checked dispatch: whom to answer, the rows, and for each pair its row (int64) and its expert."""

    identity: bytes
    message: Dispatch
    hidden: np.ndarray  # float32 [rows, hidden_size]
    rows: np.ndarray
    experts: list[int]


@dataclass(frozen=True, slots=True)
class Group:
    """Requests of one layer as one grouped call, pairs sorted by expert."""

    requests: list[Request]
    rows: np.ndarray  # int64 [pairs], into the concatenated rows of all requests
    experts: list[int]  # distinct, ascending
    counts: list[int]  # pairs of each
    order: np.ndarray | None  # position of each sorted pair before sorting; None: they were sorted


def parse(identity: bytes, message: Dispatch, tensor: memoryview, limits: tuple[int, int, int, int]) -> Request | str:
    """The request in a dispatch, or what is wrong with it. `limits`: layers, experts, hidden size, pairs."""
    layers, num_experts, hidden_size, max_pairs = limits
    rows, columns = message.shape
    pairs = len(message.pairs) // 4
    if message.dtype != "float32" or columns != hidden_size:
        return f"{message.dtype} rows of {columns}; this checkpoint has float32 rows of {hidden_size}"
    if not 0 <= message.layer < layers:
        return f"layer {message.layer} of {layers}"
    if len(message.pairs) % 4 or not 0 < rows <= pairs <= max_pairs:
        return f"{len(message.pairs)} bytes of pairs for {rows} rows; at most {max_pairs} pairs in one message"
    pair_rows, pair_experts = np.frombuffer(message.pairs, "<u2").reshape(2, pairs)
    experts = pair_experts.tolist()
    if experts != sorted(experts) or experts[-1] >= num_experts:
        return f"experts {experts[:8]}… are not sorted, or beyond {num_experts}"
    if pair_rows.max() >= rows:
        return f"row {pair_rows.max()} of {rows}"
    hidden = np.frombuffer(tensor, "<f4").reshape(rows, columns)
    return Request(identity, message, hidden, pair_rows.astype(np.int64), experts)


def group(requests: list[Request], max_pairs: int) -> list[Group]:
    """Grouped calls for these requests: decode before prefill, one call per layer, at most `max_pairs` in a call."""
    if len(requests) == 1:  # the common case, and the one that a decode step waits for
        return [_merge(requests)]
    groups: list[list[Request]] = []
    open_groups: dict[int, tuple[list[Request], int]] = {}
    for r in sorted(requests, key=lambda r: r.message.prefill):
        members, pairs = open_groups.get(r.message.layer, ([], max_pairs))
        if pairs + len(r.experts) > max_pairs:
            members, pairs = [], 0
            groups.append(members)
        members.append(r)
        open_groups[r.message.layer] = (members, pairs + len(r.experts))
    return [_merge(members) for members in groups]


def _merge(requests: list[Request]) -> Group:
    if len(requests) == 1:
        rows, pair_experts, order = requests[0].rows, requests[0].experts, None
    else:
        offsets = np.cumsum([0] + [len(r.hidden) for r in requests[:-1]])
        rows = np.concatenate([r.rows + offset for r, offset in zip(requests, offsets, strict=True)])
        unsorted = np.array([e for r in requests for e in r.experts])
        order = unsorted.argsort(kind="stable")
        rows, pair_experts = rows[order], unsorted[order].tolist()
    experts, counts = _runs(pair_experts)
    return Group(requests, rows, experts, counts, order)


def _runs(pair_experts: Iterable[int]) -> tuple[list[int], list[int]]:
    runs = [(expert, sum(1 for _ in members)) for expert, members in groupby(pair_experts)]
    return [expert for expert, _ in runs], [count for _, count in runs]


def split(group: Group, out: np.ndarray) -> list[np.ndarray]:
    """The rows of `out` [pairs, hidden_size] that answer each request, in the order of its pairs."""
    if group.order is None:
        return [out]
    unsorted = np.empty_like(out)
    unsorted[group.order] = out
    bounds = np.cumsum([len(r.experts) for r in group.requests])[:-1]
    return np.split(unsorted, bounds)
