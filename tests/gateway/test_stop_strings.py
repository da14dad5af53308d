"""Stop strings: never in the text, whatever pieces it comes in."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.stop_strings import StopStrings
from tests.gateway.fake_router import FakeRouter, says
from tests.gateway.harness import gateway, run


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the earliest stop string."""
    starts = [i for s in stops if (i := text.find(s)) >= 0]
    return (text[: min(starts)], True) if starts else (text, False)


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_pieces_give_what_the_whole_gives(pieces, stops):
    finder, sent = StopStrings(stops), ""
    for piece in pieces:
        sent += finder.push(piece)
        # At any moment nothing may be out that a later piece could turn into a part of a stop string.
        assert "".join(pieces).startswith(sent)
        assert not any(s in sent for s in stops)
    if finder.hit is None:
        sent += finder.finish()
    assert (sent, finder.hit is not None) == first_match("".join(pieces), pieces, stops)


def first_match(text: str, pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """The match that is complete first, piece by piece; within a piece the earliest."""
    for total in itertools.accumulate(pieces):
        cut, hit = reference(total, stops)
        if hit:
            return cut, True
    return text, False


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["END", ["nope", "D!"], " E", "xyz"])
def test_a_stop_string_ends_the_answer_and_the_work(model, ids, stop, stream):
    async def main():
        text = "to the END! and on" + " and on" * 20
        router = FakeRouter(script=says(ids(text), eos=2))
        async with gateway(model, router) as g:
            stops = [stop] if isinstance(stop, str) else stop
            expected, _ = reference(text, stops)
            request = {"prompt": "x", "max_tokens": 400, "stop": stop}
            if stream:
                choices = [e["choices"][0] for e in (await g.stream("/v1/completions", request))[:-1]]
            else:
                choices = (await g.post("/v1/completions", request))[1]["choices"]
            assert "".join(c["text"] for c in choices) == expected
            assert choices[-1]["finish_reason"] == "stop"
            assert len(g.services.journal) == 0

    run(main())


def test_the_router_is_told_when_a_stop_string_ends_a_request(model, ids):
    async def main():
        stop_at = len(ids("abc END"))
        router = FakeRouter(script=says(ids("abc END more and more"), eos=2), hold_at=stop_at)
        async with gateway(model, router) as g:
            status, body, _ = await g.post("/v1/completions", {"prompt": "x", "max_tokens": 50, "stop": "END"})
            assert status == 200 and body["choices"][0]["text"] == "abc "
            assert body["usage"]["completion_tokens"] == stop_at
            router.wait(lambda r: r.aborts)
            assert router.aborts[0].request_id == router.submits[0].request_id

    run(main())


def test_stop_strings_count_only_after_min_tokens(model, ids):
    async def main():
        text = "END one END two"
        async with gateway(model, FakeRouter(script=says(ids(text), eos=2))) as g:
            request = {"prompt": "x", "max_tokens": 50, "stop": "END", "min_tokens": len(ids("END "))}
            _, body, _ = await g.post("/v1/completions", request)
            assert body["choices"][0]["text"] == "END one "

    run(main())


def test_end_of_text_ids_and_the_clients_own(model):
    async def main():
        router = FakeRouter()
        async with gateway(model, router) as g:
            base = {"prompt": [5], "max_tokens": 1}
            for extra in ({}, {"stop_token_ids": [9]}, {"ignore_eos": True, "stop_token_ids": [9]}):
                assert (await g.post("/v1/completions", {**base, **extra}))[0] == 200
            assert [s.sampling.stop_token_ids for s in router.submits] == [[2], [2, 9], [9]]

    run(main())
