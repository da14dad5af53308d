"""Equal prefixes stay together while their router's load allows it."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.affinity import SLACK, SLACK_SHARE, Affinity


def test_without_a_known_prefix_the_least_load_counts():
    affinity = Affinity()
    assert affinity.choose([], {"a": 2.0, "b": 1.0, "c": 3.0}) == "b"
    affinity.sent([b"1"], "a")
    assert affinity.choose([b"2", b"1"], {"a": 2.0, "b": 1.0}) == "b"  # a block counts only behind those before it


def test_the_router_that_had_the_longest_prefix_is_chosen():
    affinity = Affinity()
    affinity.sent([b"1"], "a")
    affinity.sent([b"1", b"2"], "b")
    assert affinity.choose([b"1", b"2", b"3"], {"a": 0.0, "b": 1.5}) == "b"
    assert affinity.choose([b"1", b"9"], {"a": 0.5, "b": 0.0}) == "b"  # both have as much of this one


def test_not_beyond_what_its_load_allows():
    affinity = Affinity()
    affinity.sent([b"1"], "a")
    limit = 4.0 * (1 + SLACK_SHARE) + SLACK
    assert affinity.choose([b"1"], {"a": limit, "b": 4.0}) == "a"
    assert affinity.choose([b"1"], {"a": limit + 0.1, "b": 4.0}) == "b"


def test_a_router_that_is_gone_has_nothing():
    affinity = Affinity()
    affinity.sent([b"1"], "a")
    affinity.forget("a")
    assert affinity.choose([b"1"], {"a": 1.0, "b": 0.0}) == "b"


def test_what_was_not_used_for_long_is_forgotten_from_its_end():
    affinity = Affinity(most=3)
    affinity.sent([b"1", b"2"], "a")
    affinity.sent([b"3"], "a")
    affinity.sent([b"4"], "a")
    assert set(affinity._sent_to) == {b"1", b"3", b"4"}


keys = st.lists(st.sampled_from([b"1", b"2", b"3"]), max_size=3)


@given(st.lists(st.tuples(keys, st.sampled_from("abc")), max_size=8), keys, st.lists(st.floats(0, 50), min_size=3))
def test_the_choice_is_never_far_above_the_least_load(sent, wanted, loads):
    affinity = Affinity(most=4)
    for some, router in sent:
        affinity.sent(some, router)
    by_router = dict(zip("abc", loads, strict=False))
    chosen = affinity.choose(wanted, by_router)
    assert by_router[chosen] <= min(by_router.values()) * (1 + SLACK_SHARE) + SLACK
