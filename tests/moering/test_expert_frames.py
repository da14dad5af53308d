"""Dispatch and Reply on the wire: what goes in comes out, and anything else is an error that says what is wrong."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moering import protocol
from moering.errors import ProtocolError
from moering.expert_frames import INLINE, ITEM_BYTES, MARK, Dispatch, Reply
from moering.protocol import PROTOCOL_VERSION, decode, encode

OURS = bytes([MARK, PROTOCOL_VERSION])

u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
dtypes = st.sampled_from(sorted(ITEM_BYTES))
slots = st.integers(0, INLINE - 1)
dispatches = st.builds(Dispatch, u64, u64, u16, st.booleans(), st.binary(max_size=64), dtypes, u32, u32, slots)
replies = st.builds(Reply, u64, u64, u64, u32, dtypes, u32, u32, slots)


def dispatch(**changes: Any) -> Dispatch:
    return Dispatch(1, 2, 3, False, b"", "float32", 2, 3)._replace(**changes)


@given(st.one_of(dispatches, replies))
def test_what_goes_in_comes_out(message: Dispatch | Reply) -> None:
    assert decode([encode(message)]) == (message, None)


@given(st.one_of(dispatches, replies), st.data())
def test_rows_that_follow_come_with_it(message: Dispatch | Reply, data: st.DataObject) -> None:
    message = message._replace(rows=data.draw(st.integers(0, 4)), columns=data.draw(st.integers(0, 4)), slot=INLINE)
    rows = bytes(message.rows * message.columns * ITEM_BYTES[message.dtype])
    got, tensor = decode([encode(message), rows])
    assert got == message
    assert tensor is not None
    assert bytes(tensor) == rows


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([encode(dispatch())], "1 frames where 2"),
        ([encode(dispatch()), bytes(24), b""], "3 frames where 2"),
        ([encode(dispatch(slot=0)), bytes(24)], "2 frames where 1"),
        ([encode(dispatch()), bytes(23)], "23 bytes; dtype and shape ask for 24"),
        ([encode(dispatch(dtype="float16")), bytes(24)], "24 bytes; dtype and shape ask for 12"),
        ([encode(dispatch(rows=(1 << 32) - 1, columns=(1 << 32) - 1)), bytes(24)], "ask for"),
        ([b"\xc1"], "protocol version none"),
        ([b"\xc1\x01" + bytes(40)], f"protocol version 01; this process speaks {PROTOCOL_VERSION}"),
        ([OURS + b"\x01\x09" + bytes(40)], "neither dispatch nor reply"),  # a dtype that there is not
        ([OURS + b"\x07\x00" + bytes(40)], "kind 7 is neither"),
        ([encode(dispatch())[:30], bytes(24)], "neither dispatch nor reply"),
        ([encode(Reply(1, 2, 3, 4, "float32", 2, 3)) + b"\0", bytes(24)], "neither dispatch nor reply"),
    ],
)
def test_the_error_says_what_is_wrong(frames: list[bytes], text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        decode(frames)


@given(st.binary(max_size=100))
def test_garbage_is_an_error_and_nothing_else(garbage: bytes) -> None:
    header = bytes([0xC1, protocol.PROTOCOL_VERSION]) + garbage
    try:
        message, _ = decode([header])
    except ProtocolError:
        return
    assert encode(message)[4:6] == header[4:6]  # what passes is a message in shared memory


def test_rows_are_not_copied() -> None:
    rows = bytearray(24)
    _, tensor = decode([encode(dispatch()), memoryview(rows)])
    assert tensor is not None
    rows[5] = 9
    assert tensor[5] == 9
