"""Arrays over servers, layers and experts: what a view says of the experts, and how its rows are put together.

A mask is bool [servers, layers, experts]; rows are int16 [layers, experts, width], server indices in order, -1 padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moering.protocol import MemberInfo, Operation, View

Pairs = npt.NDArray[np.bool_]
Replicas = npt.NDArray[np.int16]
Ways = npt.NDArray[np.uint8]
"""[layers, experts]: how many of the first replicas share an expert's tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """The part of a view that this module answers for; `routing` and `target` are int16 [layers, experts, width]."""

    servers: tuple[str, ...]
    routing: Replicas
    target: Replicas
    failures_survivable: int
    orphans: int
    under_target: int
    failures_restorable: int
    popularity: bytes  # see `View`
    ways: Ways

    def same_as(self, other: Tables | None) -> bool:
        """Whether nothing has changed that members need to be told. Popularity alone is no news."""
        return (
            other is not None
            and self.servers == other.servers
            and self.failures_restorable == other.failures_restorable
            and np.array_equal(self.routing, other.routing)
            and np.array_equal(self.target, other.target)
            and np.array_equal(self.ways, other.ways)
        )


def columns(mask: Pairs) -> Replicas:
    """[servers, layers, experts] → [layers, experts, servers] of server indices, -1 where the mask is false."""
    numbers = np.arange(len(mask), dtype=np.int16).reshape(-1, 1, 1)
    return np.moveaxis(np.where(mask, numbers, np.int16(-1)), 0, 2)


def pick(mask: Pairs, rows: Replicas) -> Pairs:
    """Whether the server of each replica in `rows` has its bit of [servers, layers, experts] set."""
    if not len(mask):
        return np.zeros(rows.shape, np.bool_)
    layers, experts = np.ogrid[: rows.shape[0], : rows.shape[1]]
    picked: Pairs = mask[np.maximum(rows, 0), layers[..., None], experts[..., None]] & (rows >= 0)
    return picked


def pack(rows: Replicas) -> Replicas:
    """The replicas of each expert moved to the front in their order, columns of padding cut off."""
    order = np.argsort(rows < 0, axis=2, kind="stable")
    width = max(1, int((rows >= 0).sum(axis=2).max()))
    return np.take_along_axis(rows, order, axis=2)[:, :, :width]


def widen(rows: Replicas, width: int) -> Replicas:
    """Padded to `width` columns."""
    return np.pad(rows, ((0, 0), (0, 0), (0, width - rows.shape[2])), constant_values=-1)


def make_view(
    term: int,
    epoch: int,
    members: list[MemberInfo],
    tables: Tables | None,
    replication: int,
    operations: list[Operation],
) -> View:
    """The message that tells members all this; without `tables` there is no plan yet."""
    if tables is None:
        return View(term, epoch, members, [], 0, 0, 0, b"", b"", replication, -1, 0, 0, operations=operations)
    layers, experts, width = tables.routing.shape
    return View(
        term, epoch, members, list(tables.servers), layers, experts, width, tables.routing.astype("<i2").tobytes(),
        tables.target.astype("<i2").tobytes(), replication, tables.failures_survivable, tables.orphans,
        tables.under_target, failures_restorable=tables.failures_restorable, operations=operations,
        popularity=tables.popularity,
        ways=tables.ways.tobytes() if (tables.ways > 1).any() else b"",
    )  # fmt: skip


def ways_of(view: View) -> Ways:
    """The `ways` of a view that was checked."""
    shape = view.layers, view.experts
    return np.frombuffer(view.ways, np.uint8).reshape(shape) if view.ways else np.ones(shape, np.uint8)
