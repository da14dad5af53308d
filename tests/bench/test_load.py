"""The load generator: what it starts, and the figures it makes of the answers."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from bench.client import Arrival, Exchange
from bench.load import LoadConfig, Source, closed_loop, main, open_loop, workload
from bench.report import gaps, quantile, summarise, table
from bench.workload import Lengths, Workload, poisson_times
from moering.errors import ConfigError
from tests.bench.fake_server import count_to_max_tokens, serving_in_thread


def test_main_reports_every_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "load.json"
    with serving_in_thread(count_to_max_tokens) as url:
        argv = ["--url", url, "--requests", "10", "--concurrency", "3", "--output-tokens", "5", "--json", str(out)]
        assert main([*argv, "--api-key", "hush"]) == 0
    report = json.loads(out.read_text())
    summary = report["summary"]
    assert (summary["requests"], summary["completed"], summary["errors"]) == (10, 10, {})
    assert summary["output_tokens"] == 50
    assert 0 <= summary["itl_ms"]["p50"] <= summary["itl_ms"]["p99"] <= summary["itl_ms"]["max"]
    assert 0 < summary["ttft_ms"]["p50"] <= summary["e2e_ms"]["p50"]
    assert "hush" not in out.read_text()
    captured = capsys.readouterr()
    assert "10 of 10 completed, errors: none" in captured.out
    assert captured.err == ""  # no progress bar where nobody looks


def test_main_counts_errors_by_kind_and_fails(tmp_path: Path) -> None:
    served = itertools.count()

    async def every_third(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if next(served) % 3 == 2:
            return web.json_response({"error": {"message": "full"}}, status=503)
        return await count_to_max_tokens(request, body)

    out = tmp_path / "load.json"
    with serving_in_thread(every_third) as url:
        assert main(["--url", url, "--requests", "9", "--rate", "500", "--json", str(out)]) == 1
    assert json.loads(out.read_text())["summary"]["errors"] == {"http_503": 3}


@pytest.mark.parametrize("argv", [["--concurrency", "0"], ["--prompt-tokens", "9-3"], ["--rate", "-1"]])
def test_bad_options_are_one_clear_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, "--model", "m", "--url", "http://127.0.0.1:9"]) == 1
    assert argv[0].strip("-").replace("-", "_") in capsys.readouterr().err


def test_closed_loop_keeps_the_concurrency_and_no_more() -> None:
    running, most, sent = set(), [], []

    async def send(index: int) -> None:
        running.add(index)
        most.append(len(running))
        await asyncio.sleep(0)
        running.remove(index)
        sent.append(index)

    asyncio.run(closed_loop(Source(20, None), 4, send))
    assert sorted(sent) == list(range(20))
    assert max(most) == 4


def test_open_loop_does_not_wait_for_answers() -> None:
    async def go() -> list[int]:
        started: list[int] = []
        all_started = asyncio.Event()

        async def send(index: int) -> None:
            started.append(index)
            if len(started) == 6:
                all_started.set()
            await asyncio.wait_for(all_started.wait(), 60)  # answers only once all others are under way

        await open_loop(Source(6, None), rate=1000, seed=1, send=send)
        return started

    assert asyncio.run(go()) == list(range(6))


def test_a_duration_ends_the_starting_of_requests() -> None:
    times = iter([0.0, 0.5, 0.9, 1.0])
    source = Source(None, 1.0, clock=lambda: next(times))
    assert [source.take(), source.take(), source.take()] == [0, 1, None]


def test_poisson_times_repeat_and_have_the_rate() -> None:
    def first(n: int, seed: int) -> list[float]:
        return list(itertools.islice(poisson_times(50.0, seed), n))

    assert first(5000, 3) == first(5000, 3)
    assert first(5, 3) != first(5, 4)
    spaces = [b - a for a, b in itertools.pairwise(first(5000, 3))]
    mean = sum(spaces) / len(spaces)
    assert mean == pytest.approx(1 / 50, rel=0.06)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in spaces) / len(spaces))
    assert deviation == pytest.approx(mean, rel=0.1)  # exponential, not regular


def test_requests_depend_on_seed_and_number_alone() -> None:
    def make(seed: int, **changes: Any) -> Workload:
        kinds: dict[str, Any] = {"api": "completions", "model": "m", "vocab_size": 100} | changes
        return Workload(prompt=Lengths(3, 9), output=Lengths(4, 8), seed=seed, **kinds)

    one = make(1)
    later = one.body(7)
    assert [one.body(i) for i in range(8)][7] == later
    assert make(2).body(7) != later
    assert all(0 <= t < 100 for t in later["prompt"]) and 3 <= len(later["prompt"]) <= 9
    assert 4 <= later["max_tokens"] <= 8
    assert "ignore_eos" not in later and make(1, ignore_eos=True).body(7)["ignore_eos"] is True
    chat = make(1, api="chat").body(0)
    assert 3 <= len(chat["messages"][0]["content"].split()) <= 9


def test_both_ends_of_a_range_are_drawn() -> None:
    rng = random.Random(0)
    assert {Lengths.parse("2-4").draw(rng) for _ in range(100)} == {2, 3, 4}
    assert Lengths.parse("5") == Lengths(5, 5)


def test_workload_errors_name_the_option() -> None:
    with pytest.raises(ConfigError, match="output_tokens"):
        workload(LoadConfig(output_tokens="many"), "m")


def _recorded(times: list[float], error: str | None = None) -> Exchange:
    arrivals = [Arrival(t, "x", [], []) for t in times]
    return Exchange(started_s=0.0, ended_s=times[-1] + 0.1, arrivals=arrivals, error=error)


def test_figures_of_known_exchanges() -> None:
    good = _recorded([0.5, 0.6, 0.9])
    assert gaps(good) == pytest.approx([0.1, 0.3])
    summary = summarise([good, _recorded([1.0, 9.0], "disconnected")], wall_s=2.0)
    assert summary["ttft_ms"]["max"] == pytest.approx(500)  # the broken one gives no latency,
    assert summary["itl_ms"]["max"] == pytest.approx(300)
    assert summary["e2e_ms"]["max"] == pytest.approx(1000)
    assert summary["tokens_per_s"] == pytest.approx(2.5)  # but its tokens were made
    assert summary["errors"] == {"disconnected": 1}
    assert "300.0" in table(summary)


def test_nothing_measured_is_shown_as_nothing() -> None:
    summary = summarise([], wall_s=1.0)
    assert summary["ttft_ms"] == {"p50": None, "p99": None, "max": None}
    assert "-" in table(summary)


def test_quantiles_are_nearest_rank() -> None:
    values = list(range(1, 101))
    random.Random(0).shuffle(values)
    assert [quantile(values, q) for q in (0.5, 0.99, 1.0)] == [50, 99, 100]
    assert quantile([3.0], 0.99) == 3.0
