from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moering import protocol
from moering.errors import ProtocolError
from moering.protocol import KINDS, Abort, Hello, Submit, decode, encode

# What MessagePack can carry in an integer.
INTEGERS = st.integers(-(1 << 63), (1 << 64) - 1)
LEAVES = {
    int: INTEGERS,
    str: st.text(),
    bytes: st.binary(),
    bool: st.booleans(),
    float: st.floats(allow_nan=False, allow_infinity=False),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of an annotated type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        fields = {name: values(h) for name, h in typing.get_type_hints(hint).items()}
        return st.builds(hint, **fields)  # type: ignore[arg-type]
    if origin in (types.UnionType, typing.Union):
        return st.none() | values(next(a for a in args if a is not type(None)))
    if origin is list:
        return st.lists(values(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=3)
    return LEAVES[hint]


@st.composite
def framed(draw: st.DrawFn) -> tuple[Any, list[bytes]]:
    """Any message of any kind, and its frames."""
    message = draw(values(KINDS[draw(st.sampled_from(sorted(KINDS)))]))
    return message, [encode(message)]


def outcome(frames: list[bytes]) -> object:
    """The message, or None for a `ProtocolError`. Nothing else may come out, whatever goes in."""
    try:
        return decode(frames)[0]
    except ProtocolError as e:
        assert str(e)
        assert len(str(e)) < 500  # a frame must not fill the log either
        return None


def header(message: object, /, **changed: Any) -> bytes:
    """The header of `message` with some of its fields replaced, unchecked; `...` leaves one out."""
    fields = msgpack.unpackb(encode(message), strict_map_key=False) | changed
    return typing.cast(bytes, msgpack.packb({k: v for k, v in fields.items() if v is not ...}))


@settings(max_examples=200)
@given(framed())
def test_every_message_survives_the_wire(message_and_frames: tuple[Any, list[bytes]]) -> None:
    message, frames = message_and_frames
    decoded, tensor = decode(frames)
    assert decoded == message
    assert type(decoded) is type(message)
    assert ([] if tensor is None else [bytes(tensor)]) == frames[1:]


def test_every_message_has_a_kind_of_its_own_and_is_imported_from_one_place() -> None:
    assert {kind: cls.KIND for kind, cls in KINDS.items()} == {kind: kind for kind in KINDS}  # type: ignore[attr-defined]
    assert all(getattr(protocol, cls.__name__) is cls for cls in KINDS.values())


@settings(max_examples=200)
@given(framed(), st.data())
def test_a_truncated_header_is_refused(message_and_frames: tuple[Any, list[bytes]], data: st.DataObject) -> None:
    _, (head, *tensor) = message_and_frames
    cut = data.draw(st.integers(0, len(head) - 1))
    with pytest.raises(ProtocolError):
        decode([head[:cut], *tensor])


@settings(max_examples=500)
@given(framed(), st.data())
def test_mutated_bytes_give_a_message_or_an_error(
    message_and_frames: tuple[Any, list[bytes]], data: st.DataObject
) -> None:
    _, frames = message_and_frames
    mutated = [bytearray(f) for f in frames]
    for frame in mutated:
        for _ in range(data.draw(st.integers(0, 3)) if frame else 0):
            frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    frames = [bytes(f) for f in mutated]
    message = outcome(frames)
    if message is not None:  # what was let through is well-formed: it means the same again
        assert decode([encode(message), *frames[1:]])[0] == message


@settings(max_examples=200)
@given(st.lists(st.binary(max_size=64), max_size=3))
def test_garbage_gives_an_error(frames: list[bytes]) -> None:
    assert outcome(frames) is None


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | INTEGERS | st.binary(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=500)
@given(framed(), st.data())
def test_a_field_of_another_type_gives_a_message_or_an_error(
    message_and_frames: tuple[Any, list[bytes]], data: st.DataObject
) -> None:
    message, frames = message_and_frames
    name = data.draw(st.sampled_from(["v", "kind", *message.__slots__]))
    value = data.draw(JSON_LIKE)
    changed = outcome([header(message, **{name: value}), *frames[1:]])
    if changed is not None and name in message.__slots__:
        assert getattr(changed, name) == value


@given(JSON_LIKE)
def test_a_header_that_is_no_message_gives_an_error(value: object) -> None:
    assert outcome([msgpack.packb(value)]) is None


HELLO = Hello("router-0", 1, "m", "d")
SUBMIT = Submit("r", 0, [1], [], protocol.Sampling(max_tokens=4), 60.0)


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([], "empty"),
        ([header(HELLO, v=1)], f"version 1; this process speaks {protocol.PROTOCOL_VERSION}"),
        ([header(HELLO, v=...)], "version None"),
        ([header(HELLO, kind="hullo")], "unknown message kind 'hullo'"),
        ([header(HELLO, kind=7)], "unknown message kind 7"),
        ([header(HELLO, server_id=...)], "hello.server_id: missing"),
        ([header(HELLO, extra=1)], "hello: unknown field 'extra'"),
        ([header(HELLO, server_id=1)], "hello.server_id: int where str is expected"),
        ([header(HELLO, incarnation=True)], "hello.incarnation: bool where int is expected"),
        ([header(HELLO), b""], "hello: 2 frames where 1 is expected"),
        ([header(Abort("r", 1), attempt=1.0)], "abort.attempt: float where int is expected"),
        ([b"\xff"], "not a map"),
        ([b"\x07"], "not a map"),
        ([header(HELLO) + b"\x00"], "not MessagePack"),
        ([bytes(protocol.MAX_HEADER_BYTES + 1)], "the limit is"),
    ],
)
def test_the_error_says_what_is_wrong(frames: list[bytes], text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        decode(frames)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "1", True])
def test_a_number_must_be_finite(value: object) -> None:
    with pytest.raises(ProtocolError, match=r"submit\.deadline_s"):
        decode([header(SUBMIT, deadline_s=value)])


@pytest.mark.parametrize("depth", [300, 1000, 1020, 100_000])
@pytest.mark.parametrize(
    ("message", "name"),
    [(HELLO, "v"), (HELLO, "kind"), (HELLO, "server_id"), (HELLO, "other"), (SUBMIT, "deadline_s"), (SUBMIT, "prompt")],
)
def test_deep_nesting_is_refused(message: Any, name: str, depth: int) -> None:
    """Lists in lists in lists are an error like others, where MessagePack's limit stops them (1024) and before."""
    head = header(message, **{name: ...})
    assert head[0] & 0xF0 == 0x80  # a map of fewer than 16 fields: one more entry fits behind
    assert outcome([bytes([head[0] + 1]) + head[1:] + msgpack.packb(name) + b"\x91" * depth + b"\xc0"]) is None


@pytest.mark.parametrize("version", [True, 2.0, "2", [2], 1, "x" * 10_000])
def test_another_version_is_refused(version: object) -> None:
    assert outcome([header(HELLO, v=version)]) is None


def test_the_limits_leave_room_for_honest_messages() -> None:
    plan_of_14848_experts = 14848 * 2 * 8 * 2
    assert plan_of_14848_experts < protocol.MAX_HEADER_BYTES <= protocol.MAX_FRAME_BYTES
    assert protocol.MAX_TENSOR_BYTES < protocol.MAX_FRAME_BYTES
