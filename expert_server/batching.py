"""Merges what several routers sent for one layer into one grouped call, and takes the result apart again. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moering.protocol import Dispatch


@dataclass(frozen=True, slots=True)
class Request:
    """A checked dispatch: whom to answer, the rows, and the expert and local row of each pair (int64)."""

    identity: bytes
    message: Dispatch
    hidden: np.ndarray  # float32 [rows, hidden_size]
    rows: np.ndarray
    experts: np.ndarray


@dataclass(frozen=True, slots=True)
class Group:
    """Requests of one layer as one grouped call, pairs sorted by expert."""

    requests: list[Request]
    rows: np.ndarray  # int64 [pairs], into the concatenated rows of all requests
    experts: list[int]  # distinct, ascending
    counts: list[int]  # pairs of each
    order: np.ndarray | None  # position of each sorted pair before sorting; None: they were sorted


def check(message: Dispatch, layers: int, experts: int, hidden_size: int) -> str | None:
    """What is wrong with a dispatch, or None."""
    rows, columns = message.shape
    pairs = len(message.experts) // 2
    if message.dtype != "float32" or columns != hidden_size:
        return f"{message.dtype} rows of {columns}; this checkpoint has float32 rows of {hidden_size}"
    if not 0 <= message.layer < layers:
        return f"layer {message.layer} of {layers}"
    if len(message.rows) != len(message.experts) or len(message.experts) % 2 or not 0 < rows <= pairs:
        return f"{len(message.rows)} bytes of rows and {len(message.experts)} of experts for {rows} rows"
    return _check_pairs(message, experts)


def _check_pairs(message: Dispatch, experts: int) -> str | None:
    pair_experts = np.frombuffer(message.experts, "<u2").astype(np.int64)
    if (pair_experts[1:] < pair_experts[:-1]).any():
        return "pairs are not sorted by expert"
    if pair_experts[-1] >= experts:
        return f"expert {pair_experts[-1]} of {experts}"
    if (row := int(np.frombuffer(message.rows, "<u2").max())) >= message.shape[0]:
        return f"row {row} of {message.shape[0]}"
    return None


def request(identity: bytes, message: Dispatch, tensor: memoryview) -> Request:
    """The arrays of a dispatch that passed `check`."""
    hidden = np.frombuffer(tensor, "<f4").reshape(message.shape)
    rows = np.frombuffer(message.rows, "<u2").astype(np.int64)
    return Request(identity, message, hidden, rows, np.frombuffer(message.experts, "<u2").astype(np.int64))


def group(requests: Iterable[Request], max_pairs: int) -> list[Group]:
    """Grouped calls for these requests: decode before prefill, one call per layer, at most `max_pairs` in a call
    unless one request alone has more."""
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
        pair_experts = np.concatenate([r.experts for r in requests])
        order = pair_experts.argsort(kind="stable")
        rows, pair_experts = rows[order], pair_experts[order]
    starts = [0, *(np.flatnonzero(pair_experts[1:] != pair_experts[:-1]) + 1).tolist(), len(pair_experts)]
    counts = [end - start for start, end in pairwise(starts)]
    return Group(requests, rows, pair_experts[starts[:-1]].tolist(), counts, order)


def split(group: Group, out: np.ndarray) -> list[np.ndarray]:
    """The rows of `out` [pairs, hidden_size] that answer each request, in the order of its pairs."""
    if group.order is None:
        return [out]
    unsorted = np.empty_like(out)
    unsorted[group.order] = out
    bounds = np.cumsum([len(r.experts) for r in group.requests])[:-1]
    return np.split(unsorted, bounds)
