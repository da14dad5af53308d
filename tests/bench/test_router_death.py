"""The bench's arithmetic: which gap belongs to a kill, and what it is held against."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
from aiohttp import web

from bench.account import Account
from bench.client import Arrival, Exchange, new_session
from bench.router_death import Death, Gap, Phase, RouterDeathConfig, _figures, _prefill, gap_across, progress, split
from bench.streams import Streams
from moering.errors import ConfigError
from tests.bench.fake_server import event, serving, start


def record(*times: float) -> Exchange:
    return Exchange(arrivals=[Arrival(t, "x", [1], []) for t in times])


@pytest.mark.parametrize(("at_s", "gap"), [(1.5, 3.0), (1.0, 3.0), (3.9, 3.0), (4.0, 1.0), (0.5, None), (6.0, None)])
def test_the_gap_across_a_moment(at_s: float, gap: float | None) -> None:
    assert gap_across(record(1.0, 4.0, 5.0), at_s) == gap


def test_the_longest_gaps_are_those_of_the_streams_that_moved() -> None:
    gaps = [Gap(0.1, 10), Gap(2.0, 20), Gap(0.3, 30), Gap(1.0, 40)]
    moved, others = split(gaps, 2)
    assert [g.tokens for g in moved] == [20, 40] and {g.tokens for g in others} == {10, 30}
    assert split(gaps, 0) == ([], sorted(gaps, key=lambda g: -g.seconds))


def test_the_progress_of_streams_is_that_of_the_furthest() -> None:
    clients = Streams(None, "", [{"max_tokens": 4}, {"max_tokens": 10}], 2)  # type: ignore[arg-type]
    clients.running, clients.request = {0: record(1.0), 1: record(1.0, 2.0, 3.0)}, {0: 0, 1: 1}
    assert progress(clients) == 0.3


def test_the_prompts_of_a_prefill_arrive_together() -> None:
    lengths: list[int] = []

    async def main() -> list[float]:
        together = asyncio.Event()

        async def handler(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
            response = await start(request)
            lengths.append(len(body["prompt"]))
            if len(lengths) == 3:
                together.set()
            await together.wait()
            await event(response, {"choices": [{"token_ids": [1], "finish_reason": "length"}]})
            await event(response, "[DONE]")
            return response

        death = Death([Gap(2.0, 100), Gap(1.5, 70), Gap(1.0, 80)], [Gap(0.1, 50)], 4.0)
        async with serving(handler) as url, new_session(10.0) as session:
            alone = Streams(session, url, [{"prompt": [1], "max_tokens": 9, "stream": True}], 1)
            return await _prefill(alone, death, RouterDeathConfig())

    waits_s = asyncio.run(main())
    assert sorted(lengths) == [70, 80, 100]
    assert len(waits_s) == 3 and waits_s == sorted(waits_s, reverse=True)


CLEAN = Account(requests=4, tokens=400)


def figures(over_s: float, account: Account = CLEAN, *, held: bool = True) -> dict:
    """Two deaths; the second one's gap exceeds its prefill by `over_s` once a router is there again, after 4.5 s."""
    first = Death([Gap(6.0, 100), Gap(5.5, 100)], [Gap(0.1, 50)], 4.0, [1.8, 1.0])
    second = Death([Gap(5.0 + over_s, 100)], [], 4.5, [0.5])
    return _figures(Phase(20.0, [first, second], account), allowance_s=1.0, held=held)


def test_a_gap_is_held_against_its_prefill_and_the_time_without_a_router() -> None:
    good = figures(over_s=0.9)
    assert (good["kills"], good["moved_streams"], good["within_bar"], good["met"]) == (2, 3, 3, True)
    assert good["over_prefill_s"] == {"p50": 0.5, "p90": 0.9, "max": 0.9}
    assert good["gap_others_s"]["max"] == 0.1 and good["restart_s"]["max"] == 4.5
    bad = figures(over_s=1.1)
    assert (bad["within_bar"], bad["met"]) == (2, False)
    assert figures(over_s=0.9, held=False)["over_prefill_by_kill_s"] == [[4.2, 4.5], [5.4]]


@pytest.mark.parametrize("fault", ["lost", "duplicated", "changed", "changed_digests", "errors"])
def test_a_token_that_differs_misses_the_bar(fault: str) -> None:
    assert not figures(0.0, dataclasses.replace(CLEAN, **{fault: 1}))["met"]


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="requests at least streams"):
        RouterDeathConfig(requests=3)
