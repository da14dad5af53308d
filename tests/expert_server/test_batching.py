"""Grouped calls: any mix of requests comes back to its senders, row by row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_server import batching
from moering.expert_frames import Dispatch

LAYERS, EXPERTS, HIDDEN = 3, 8, 4
LIMITS = batching.Limits(LAYERS, EXPERTS, HIDDEN, 20)


def dispatch(pairs, seq=1, layer=0, prefill=False, hidden=HIDDEN):
    """`pairs`: (row, expert) tuples; rows are renumbered so that each has a pair."""
    pairs = sorted(pairs, key=lambda p: p[1])
    rows = sorted({row for row, _ in pairs})
    packed = np.array([(rows.index(row), expert) for row, expert in pairs], "<u2").T
    return Dispatch(9, seq, layer, prefill, packed.tobytes(), "float32", int(packed[0].max()) + 1, hidden)


def request(message, identity=b"r"):
    rows, hidden = message.rows, message.columns
    tensor = np.arange(rows * hidden, dtype=np.float32) + 1000 * message.seq
    return batching.parse(identity, message, memoryview(tensor.tobytes()), LIMITS)


def in_slot(rows):
    """A slot in which these rows were sent."""
    sent = np.full((LIMITS.pairs, HIDDEN), np.nan, np.float32)
    sent[: len(rows)] = rows
    return sent, np.empty_like(sent)


def row_each(message):
    """The same dispatch with its rows in shared memory, one for each pair."""
    r = request(message)
    rows = r.hidden[r.rows]
    experts = message.pairs[len(message.pairs) // 2 :]
    moved = message._replace(pairs=experts, rows=len(rows), slot=0)
    return batching.parse(b"r", moved, in_slot(rows), LIMITS)


def row_once(message):
    """The same with each row once."""
    return batching.parse(b"r", message._replace(slot=0), in_slot(request(message).hidden), LIMITS)


pair_lists = st.lists(st.tuples(st.integers(0, 5), st.integers(0, EXPERTS - 1)), min_size=1, max_size=12, unique=True)
requests = st.lists(
    st.tuples(pair_lists, st.integers(0, LAYERS - 1), st.booleans(), st.sampled_from([request, row_each, row_once])),
    min_size=1,
    max_size=6,
)


@given(requests, st.integers(1, 40))
def test_every_request_gets_its_own_rows_back(specs, max_pairs):
    sent = [way(dispatch(p, seq, layer, prefill)) for seq, (p, layer, prefill, way) in enumerate(specs)]
    answers = {}
    for group in batching.group(sent, max_pairs):
        layers = {r.message.layer for r in group.requests}
        assert len(layers) == 1
        assert group.experts == sorted(set(group.experts))
        hidden = np.concatenate([r.hidden for r in group.requests])
        if group.rows is not None:
            hidden = hidden[group.rows]
        assert sum(group.counts) == len(hidden)
        assert len(hidden) <= max_pairs or len(group.requests) == 1
        pair_experts = np.repeat(group.experts, group.counts)
        out = hidden * (1 + pair_experts[:, None])  # expert e multiplies by e + 1
        for r, rows in zip(group.requests, batching.split(group, out), strict=True):
            answers[r.message.seq] = rows
    assert sorted(answers) == [r.message.seq for r in sent]
    for r in sent:
        hidden = r.hidden if r.rows is None else r.hidden[r.rows]
        assert (answers[r.message.seq] == hidden * (1 + np.repeat(r.experts, r.counts)[:, None])).all()


@given(st.lists(st.integers(0, 300), min_size=1, max_size=80), st.booleans())
def test_many_pairs_are_grouped_as_few_are(experts, in_order):
    experts = sorted(experts) if in_order else experts
    found = batching.runs_of_few(experts)
    assert batching.runs_of_many(np.array(experts, np.uint16)) == found
    assert (found is None) == (experts != sorted(experts))


@pytest.mark.parametrize("pairs", [batching.FEW_PAIRS, batching.FEW_PAIRS + 1])
def test_messages_of_few_and_of_many_pairs_say_the_same(pairs):
    limits, rows = batching.Limits(1, pairs, HIDDEN, pairs), np.zeros((2, HIDDEN), np.float32)
    good = Dispatch(9, 1, 0, False, b"", "float32", 2, HIDDEN)

    def parse(which, experts):
        packed = np.array([which, experts], "<u2").tobytes()
        return batching.parse(b"", good._replace(pairs=packed), memoryview(rows.tobytes()), limits)

    alternating, ascending = [i % 2 for i in range(pairs)], list(range(pairs))
    request = parse(alternating, ascending)
    assert (request.rows.tolist(), request.experts, request.counts) == (alternating, ascending, [1] * pairs)
    assert parse([*alternating[:-1], 2], ascending) == "row 2 of 2"
    assert parse(alternating, [*ascending[:-1], pairs]).startswith(
        "experts [0, 1, 2, 3, 4, 5, 6, 7]… are not sorted, or"
    )
    assert isinstance(parse(alternating, ascending[::-1]), str)


def test_decode_goes_before_prefill():
    long, short = request(dispatch([(0, 0), (1, 0)], 1, prefill=True)), request(dispatch([(0, 0)], 2))
    first, *_ = batching.group([long, short], 2)
    assert [r.message.seq for r in first.requests] == [2]


def test_a_slot_too_small_for_the_answer_is_named():
    message = dispatch([(0, e) for e in range(4)])._replace(slot=0)
    slot = np.zeros((3, HIDDEN), np.float32), np.zeros((3, HIDDEN), np.float32)
    assert "at most 3 pairs" in batching.parse(b"r", message, slot, LIMITS)


def test_rows_of_two_types_are_not_one_call():
    limits = LIMITS._replace(dtypes=("float32", "bfloat16"))
    sent = [request(dispatch([(0, 0)], 1))]
    for seq in (2, 3):
        half = dispatch([(0, 0)], seq)._replace(dtype="bfloat16")
        sent.append(batching.parse(b"r", half, memoryview(bytes(2 * HIDDEN)), limits))
    assert sent[1].hidden.dtype == np.int16
    assert [[r.message.seq for r in g.requests] for g in batching.group(sent, 100)] == [[1], [2, 3]]


def test_one_call_per_layer():
    sent = [request(dispatch([(0, e)], e, layer=e % 2)) for e in range(6)]
    assert [len(g.requests) for g in batching.group(sent, 100)] == [3, 3]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"layer": LAYERS}, "layer 3"),
        ({"dtype": "float16"}, "float16"),
        ({"columns": 5}, "rows of 5"),
        ({"pairs": b"\1\0\0\0"}, "row 1"),
        ({"pairs": b""}, "0 bytes of pairs"),
        ({"pairs": b"\0\0\0\0\0"}, "5 bytes of pairs"),
        ({"pairs": b"\0\0\x08\0"}, "beyond 8"),
        ({"pairs": b"\0\0\0\0\1\0\0\0"}, "not sorted"),
        ({"pairs": b"\0" * 4 * 21}, "at most 20 pairs"),
        ({"rows": 0}, "0 rows"),
        ({"rows": 2}, "2 rows"),
    ],
)
def test_a_wrong_dispatch_is_named(change, part):
    good = dispatch([(0, 0)])
    assert isinstance(batching.parse(b"", good, memoryview(bytes(16)), LIMITS), batching.Request)
    wrong = good._replace(**change)
    assert part in batching.parse(b"", wrong, memoryview(bytes(16)), LIMITS)
