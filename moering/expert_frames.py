"""The two messages that a decode step waits for at every layer: rows to an expert server, and its answer.

They have a fixed layout where all other messages are MessagePack maps: after a wait, with cold caches, every function
that a message passes through costs, and these pass at each MoE layer of each step. The first byte, which no MessagePack
map begins with, tells them apart. The same checks apply: bytes become a message or a `ProtocolError`.

Rows travel as a second frame, or lie in memory that both ends share (`moering.shared_rows`): then the message names the
slot and has no second frame. There a dispatch may hold one row for each pair, in their order, and name experts alone.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from moering.errors import ProtocolError

MARK = 0xC1
"""First byte; MessagePack never uses it."""
INLINE = 0xFFFF
"""In place of a slot: the rows follow as a frame."""
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_DTYPES = tuple(ITEM_BYTES)
_DISPATCH, _REPLY = 1, 2
# mark, version, kind, dtype, slot, router, seq: where both agree
_HEAD = struct.Struct("<BBBBHxxQQ")
_DISPATCH_REST = struct.Struct("<HBxII")  # layer, prefill, rows, columns; pairs follow
_REPLY_REST = struct.Struct("<QIII")  # incarnation, compute_us, rows, columns


class Dispatch(NamedTuple):
    """Rows [rows, columns] of one layer for experts of one server."""

    router: int  # incarnation of the router; (router, seq) is never used again
    seq: int
    layer: int
    prefill: bool  # decode rows are computed before these
    pairs: bytes  # uint16, sorted: [2, n] row and logical expert of each; or [n], the experts of one row each
    dtype: str
    rows: int
    columns: int
    slot: int = INLINE

    @property
    def KIND(self) -> str:
        """Its name in errors."""
        return "dispatch"


class Reply(NamedTuple):
    """The unsummed expert outputs [rows, columns], one row for each pair, in the order of the dispatch's pairs."""

    router: int
    seq: int
    incarnation: int  # of the expert server
    compute_us: int
    dtype: str
    rows: int
    columns: int
    slot: int = INLINE

    @property
    def KIND(self) -> str:
        """Its name in errors."""
        return "reply"


def encode(m: Dispatch | Reply, version: int) -> bytes:
    """The header frame."""
    dtype = _DTYPES.index(m.dtype)
    if m.__class__ is Dispatch:
        head = _HEAD.pack(MARK, version, _DISPATCH, dtype, m.slot, m.router, m.seq)
        return head + _DISPATCH_REST.pack(m.layer, m.prefill, m.rows, m.columns) + m.pairs
    assert isinstance(m, Reply)
    head = _HEAD.pack(MARK, version, _REPLY, dtype, m.slot, m.router, m.seq)
    return head + _REPLY_REST.pack(m.incarnation, m.compute_us, m.rows, m.columns)


def decode(frames: Sequence[bytes | memoryview], version: int) -> tuple[Dispatch | Reply, memoryview | None]:
    """The message whose header `frames[0]` begins with `MARK`, and its rows if they follow. Raises `ProtocolError`."""
    header = frames[0]
    if len(header) < 2 or header[1] != version:
        raise ProtocolError(f"protocol version {header[1:2].hex() or 'none'}; this process speaks {version}")
    try:
        _, _, kind, code, slot, router, seq = _HEAD.unpack_from(header)
        dtype = _DTYPES[code]
        message: Dispatch | Reply
        if kind == _DISPATCH:
            layer, prefill, rows, columns = _DISPATCH_REST.unpack_from(header, _HEAD.size)
            pairs = bytes(header[_HEAD.size + _DISPATCH_REST.size :])
            message = Dispatch(router, seq, layer, prefill != 0, pairs, dtype, rows, columns, slot)
        elif kind == _REPLY and len(header) == _HEAD.size + _REPLY_REST.size:
            incarnation, compute_us, rows, columns = _REPLY_REST.unpack_from(header, _HEAD.size)
            message = Reply(router, seq, incarnation, compute_us, dtype, rows, columns, slot)
        else:
            raise ProtocolError(f"a header of {len(header)} bytes and kind {kind} is neither dispatch nor reply")
    except (struct.error, IndexError) as e:
        raise ProtocolError(f"a header of {len(header)} bytes is neither dispatch nor reply") from e
    if slot != INLINE:
        if len(frames) != 1:
            raise ProtocolError(f"{message.KIND}: {len(frames)} frames where 1 is expected")
        return message, None
    if len(frames) != 2:
        raise ProtocolError(f"{message.KIND}: {len(frames)} frames where 2 are expected")
    tensor = memoryview(frames[1])
    expected = rows * columns * ITEM_BYTES[dtype]
    if tensor.nbytes != expected:
        raise ProtocolError(f"{message.KIND}: a tensor of {tensor.nbytes} bytes; dtype and shape ask for {expected}")
    return message, tensor
