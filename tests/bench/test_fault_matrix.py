"""The fault matrix on a cluster that only looks like one, and its figures from arrivals at known times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.client import Arrival, Exchange
from bench.cluster import Event, Process, Status
from bench.episodes import Episode, Killed
from bench.fault_matrix import Case, cases, caught_up_s, figures, next_tokens
from bench.fault_report import Run
from bench.fault_run import FaultConfig
from bench.faults import main
from bench.streams import Recorded
from tests.bench.fake_cluster import Tokens, fake_cluster


def matrix(url: str, folder: Path, *flags: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, figures and page of the matrix on the fake."""
    argv = ["--matrix", "--url", url, "--out", str(folder), "--docs", str(folder / "docs"), "--expert-servers", "3"]
    argv += ["--streams", "4", "--requests", "4", "--output-tokens", "20-30", "--times", "1", "--calm", "0.05"]
    status = main([*argv, "--poll", "0.01", "--restore-timeout", "20", *flags])
    return status, json.loads((folder / "faults.json").read_text()), (folder / "docs" / "faults.md").read_text()


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake's counters are never late."""
    monkeypatch.setattr("bench.fault_run.COUNTERS_S", 0.0)
    monkeypatch.setattr("bench.fault_matrix.STAGGER_S", 0.01)


def test_the_page_and_its_pictures(tmp_path: Path) -> None:
    with fake_cluster() as url:
        status, result, page = matrix(url, tmp_path, "--at-once", "0,1,2")
    assert status == 0
    assert [(c["dead"], c["policy"]) for c in result["cases"]] == [
        (0, "wait"), (1, "wait"), (2, "wait"), (2, "wait"), (2, "renormalize")
    ]  # fmt: skip
    assert all(c["kept"] for c in result["cases"])
    assert [len(f["killed"]) for c in result["cases"] for f in c["faults"]] == [1, 2, 2, 2]
    for fault in (f for c in result["cases"] for f in c["faults"]):
        assert 0 < fault["detected_s"] <= fault["reloaded_s"] < 20 and 0 < fault["next_token_s"] < 20
    assert "$" not in page and "ended early" not in page and "2 of 3 is the most that died" in page
    for picture in ("faults-gaps.png", "faults-timeline.png"):
        assert f"(pictures/{picture})" in page
        assert (tmp_path / "docs" / "pictures" / picture).stat().st_size > 0


def _lost(position: int, tokens: Tokens) -> Tokens:
    return []


def test_a_lost_token_stands_on_the_page_and_fails_the_run(tmp_path: Path) -> None:
    with fake_cluster(_lost) as url:
        status, result, page = matrix(url, tmp_path, "--at-once", "1")
    (case,) = result["cases"]
    assert (status, case["kept"], case["account"]["lost"]) == (1, False, 1)
    row = next(line for line in page.splitlines() if line.startswith("| 1 | "))
    assert row.split(" | ")[3:6] == ["1", "0", "0"]  # lost, duplicated, changed
    assert "0 of 3 is the most that died" in page


@pytest.mark.parametrize("numbers", ["-1", "9", "x"])
def test_bad_numbers_are_one_clear_line(numbers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--matrix", f"--at-once={numbers}", "--out", str(tmp_path)]) == 1
    assert "at_once" in capsys.readouterr().err


def test_powers_of_two_and_all_of_them() -> None:
    assert [c.dead for c in cases(FaultConfig(matrix=True))] == [0, 1, 2, 4, 8, 2, 4]
    assert FaultConfig(matrix=True, expert_servers=6).numbers == [0, 1, 2, 4, 6]


def _run(*streams: list[float]) -> Run:
    """Streams with a token at each of these times; the kill is at 10, all is as before at 14.75."""
    exchanges = [Exchange(started_s=0.0, arrivals=[Arrival(t, "", [7], ["d"]) for t in times]) for times in streams]
    recorded = [Recorded(i, i, e) for i, e in enumerate(exchanges)]
    alive, dead, back = (Process("a", "expert-server", 1, "ONLINE", n) for n in (1, 1, 2))
    before, noticed = Status(9.9, 1, 1, {"a": alive}), Status(10.1, 1, 0, {})
    events = [Event(10.2, "member.offline", "a"), Event(13.0, "member.online", "a")]
    after = [noticed, Status(14.5, 2, 1, {"a": back})]
    return Run(recorded, 10.0, recorded, [Episode([Killed(dead, 10.0)], before, after, 1, 2, events)], {}, 0.0, 20.0)


def test_the_figures_of_streams_at_known_times() -> None:
    steady = [i / 4 for i in range(1, 80)]
    held = [t for t in steady if not 10 < t < 13]  # stands still for 3 s and goes on as before
    run = _run(steady, held)
    assert sorted(next_tokens(run, 10.0)) == [0.25, 3.0]
    found = figures(Case("1", 1), run, 4.0)
    assert found["longest_ms"]["affected"] == {"streams": 1, "p50": 3000.0, "p99": 3000.0, "max": 3000.0}
    assert found["longest_ms"]["unaffected"] == {"streams": 1, "p50": 250.0, "p99": 250.0, "max": 250.0}
    assert found["tokens_per_s"]["before"] == found["tokens_per_s"]["after"] == 8.0 > found["tokens_per_s"]["during"]
    (fault,) = found["faults"]
    assert (fault["detected_s"], fault["reloaded_s"]) == (pytest.approx(0.2), 3.0)
    assert fault["next_token_s"] == 3.0
    assert caught_up_s(run, 10.0, 18.0, 8.0) == pytest.approx(2.6)
    assert caught_up_s(run, 10.0, 11.0, 8.0) is None
