"""Bytes to messages and back, with the checks between them."""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgpack

from moering import codec, expert_frames
from moering.errors import ProtocolError
from moering.expert_frames import Dispatch, Reply

PROTOCOL_VERSION = 6
MAX_HEADER_BYTES = 8 << 20
"""A header longer than this is refused unread. The largest honest one is a plan of some 60 KB or a long prompt."""
MAX_FRAME_BYTES = 16 << 20
"""Limit of one zmq frame (zmq.MAXMSGSIZE): a larger one makes libzmq drop the connection."""
MAX_TENSOR_BYTES = 1 << 20
"""Senders split rows so that a tensor frame stays within this, to keep one long prompt from holding up decoding."""

KINDS: dict[str, type] = {}
"""All messages but those of a fixed layout."""

C = TypeVar("C", bound=type)


def message(kind: str) -> Callable[[C], C]:
    """Make a dataclass the message of that kind."""

    def register(cls: C) -> C:
        cls.KIND = kind  # type: ignore[attr-defined]
        KINDS[kind] = cls
        return cls

    return register


def encode(message: Any) -> bytes:
    """The header frame of a message."""
    if message.__class__ is Dispatch or message.__class__ is Reply:
        return expert_frames.encode(message, PROTOCOL_VERSION)
    fields = {"v": PROTOCOL_VERSION, "kind": message.KIND, **codec.to_map(message)}
    return typing.cast(bytes, msgpack.packb(fields))


def decode(frames: Sequence[bytes | memoryview]) -> tuple[Any, memoryview | None]:
    """The message in `frames` (without identity) and its tensor frame. Raises `ProtocolError`."""
    if not frames:
        raise ProtocolError("an empty message")
    header = frames[0]
    if header and header[0] == expert_frames.MARK:
        return expert_frames.decode(frames, PROTOCOL_VERSION)
    if len(header) > MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {len(header)} bytes; the limit is {MAX_HEADER_BYTES}")
    try:
        fields = msgpack.unpackb(header, strict_map_key=False)
    except Exception as e:  # msgpack raises many kinds, all of which mean the same here
        raise ProtocolError(f"the header is not MessagePack: {type(e).__name__}") from e
    if not isinstance(fields, dict):
        raise ProtocolError("the header is not a map")
    version, kind = fields.pop("v", None), fields.pop("kind", None)
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {codec.shown(version)}; this process speaks {PROTOCOL_VERSION}")
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ProtocolError(f"unknown message kind {codec.shown(kind)}")
    if len(frames) != 1:
        raise ProtocolError(f"{kind}: {len(frames)} frames where 1 is expected")
    return codec.from_map(cls, fields, str(kind)), None
