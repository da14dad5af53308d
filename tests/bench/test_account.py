"""The account finds each way in which a stream can differ from the one without failure, and counts it once."""

from __future__ import annotations

import pytest

from bench.account import Account, Output, compare, total
from bench.client import Arrival, Exchange

TOKENS = [5, 6, 7, 8, 9]
DIGESTS = ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("observed", "lost", "duplicated", "changed"),
    [
        (TOKENS, 0, 0, 0),
        ([5, 6, 8, 9], 1, 0, 0),  # in the middle
        ([5, 6, 7], 2, 0, 0),  # at the end
        ([], 5, 0, 0),
        ([5, 6, 6, 7, 8, 9], 0, 1, 0),
        ([5, 6, 7, 6, 7, 8, 9], 0, 2, 0),  # two sent again
        ([5, 6, 1, 8, 9], 0, 0, 1),
        ([5, 6, 1, 2, 3], 0, 0, 3),
        ([5, 6, 7, 8, 1, 2], 0, 1, 1),  # another last one, and one too many
    ],
)
def test_tokens(observed: list[int], lost: int, duplicated: int, changed: int) -> None:
    account = compare(Output(TOKENS), Output(observed))
    assert (account.lost, account.duplicated, account.changed) == (lost, duplicated, changed)
    assert account.clean == (observed == TOKENS)
    assert (account.requests, account.tokens) == (1, len(observed))


def test_repeated_tokens_are_not_mistaken_for_duplicates() -> None:
    same = [3, 3, 3, 3]
    assert compare(Output(same), Output(same)).clean
    assert compare(Output(same), Output([3, 3, 3])).lost == 1
    assert compare(Output(same), Output([3] * 5)).duplicated == 1


def test_equal_tokens_from_other_logits_are_seen() -> None:
    account = compare(Output(TOKENS, DIGESTS), Output(TOKENS, ["a", "b", "X", "d", "Y"]))
    assert (account.changed, account.changed_digests) == (0, 2)
    assert not account.clean


def test_digests_are_compared_where_tokens_are_aligned() -> None:
    account = compare(Output(TOKENS, DIGESTS), Output([5, 7, 8, 9], ["a", "c", "d", "e"]))
    assert (account.lost, account.changed_digests) == (1, 0)


def test_digests_that_were_not_sent_are_no_proof() -> None:
    account = compare(Output(TOKENS, DIGESTS), Output(TOKENS, ["a", "b"]))
    assert (account.missing_digests, account.clean) == (3, False)
    assert compare(Output(TOKENS), Output(TOKENS)).missing_digests == 0


def test_an_error_counts_besides_what_it_lost() -> None:
    account = compare(Output(TOKENS), Output(TOKENS[:2]), error="stream_error")
    assert (account.errors, account.lost) == (1, 3)
    assert not compare(Output(TOKENS), Output(TOKENS), error="disconnected").clean


def test_a_sum_hides_nothing() -> None:
    good = compare(Output(TOKENS, DIGESTS), Output(TOKENS, DIGESTS))
    bad = compare(Output(TOKENS, DIGESTS), Output([1, *TOKENS[1:]], DIGESTS))
    assert total([good, good]).clean
    assert total([good, good]).tokens == 10
    assert total([good, bad, good]).changed == 1
    assert not total([good, bad, good]).clean


def test_nothing_served_is_not_clean() -> None:
    assert not Account().clean
    assert not total([]).clean


def test_output_of_a_recorded_stream_joins_its_chunks() -> None:
    arrivals = [Arrival(0.1, "x", [1, 2], ["p", "q"]), Arrival(0.2, "y", [3], ["r"])]
    output = Output.of(Exchange(arrivals=arrivals))
    assert (list(output.tokens), list(output.digests)) == ([1, 2, 3], ["p", "q", "r"])
