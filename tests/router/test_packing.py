"""Both ways to group pairs by server give the same, and what they give is what a message may carry."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from router.packing import pack, pack_few, pack_many, split


@st.composite
def layers(draw):
    experts, servers, rows = draw(st.integers(1, 12)), draw(st.integers(1, 5)), draw(st.integers(1, 20))
    top_k = draw(st.integers(1, min(4, experts)))
    route = np.array(draw(st.lists(st.integers(-1, servers - 1), min_size=experts, max_size=experts)), np.int16)
    ids = np.array([draw(st.permutations(range(experts)))[:top_k] for _ in range(rows)])
    chosen = draw(st.none() | st.sets(st.integers(0, ids.size - 1), min_size=1))
    return None if chosen is None else np.array(sorted(chosen)), ids.reshape(-1), route, top_k


@given(layers())
def test_few_and_many_are_the_same(layer):
    few, many = pack_few(*layer), pack_many(*layer)
    assert len(few) == len(many)
    for a, b in zip(few, many, strict=True):
        assert (a.server, a.distinct_experts) == (b.server, b.distinct_experts)
        for x, y in zip(a[1:5], b[1:5], strict=True):
            assert x.dtype == y.dtype
            assert x.tolist() == y.tolist()


@given(layers(), st.integers(1, 7))
def test_every_slot_is_in_one_message_of_its_server(layer, max_pairs):
    slots, experts, route, top_k = layer
    messages = [m for p in pack(slots, experts, route, top_k) for m in split(p, max_pairs, top_k)]
    wanted = np.arange(len(experts)) if slots is None else slots
    assert sorted(s for m in messages for s in m.slots) == wanted.tolist()
    for m in messages:
        assert len(m.slots) <= max_pairs
        assert set(route[m.experts]) == {m.server}
        assert (experts[m.slots] == m.experts).all()
        assert list(m.experts) == sorted(m.experts)
        assert len(set(m.experts)) == m.distinct_experts
        assert (m.pair_rows == m.slots // top_k).all()
        assert list(m.rows) == sorted(set(m.slots // top_k))
