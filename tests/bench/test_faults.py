"""The fault bench against a fake cluster: it must find what is planted, and report a clean run as clean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.fault_report import only_resent
from bench.faults import main
from tests.bench.fake_cluster import Plant, Tokens, fake_cluster


@pytest.fixture(autouse=True)
def _counters_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake's counters are never late."""
    monkeypatch.setattr("bench.fault_run.COUNTERS_S", 0.0)


def bench(url: str, out: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Run the bench on the fake with small sizes."""
    argv = ["--url", url, "--out", str(out), "--streams", "4", "--requests", "8", "--output-tokens", "20-30"]
    argv += ["--calm", "0.05", "--poll", "0.01", "--restore-timeout", "20", *flags]
    status = main(argv)
    return status, json.loads((out / "faults.json").read_text())


def test_a_clean_run(tmp_path: Path) -> None:
    with fake_cluster() as url:
        status, result = bench(url, tmp_path, "--times", "3")
    assert status == 0 and result["kept"] is True
    account = result["account"]
    assert account["requests"] >= 8 and account["tokens"] >= 20 * account["requests"]
    assert sum(account.values()) == account["requests"] + account["tokens"]  # all others are 0
    assert len(result["faults"]) == result["hits"] == 3
    assert result["counters"] == {"dispatches_lost": 3, "rows_lost": 3, "rows_resent": 3, "tokens_recomputed": 0}
    for fault in result["faults"]:
        assert fault["streams"] == 4
        assert fault["counters"]["rows_lost"] == fault["counters"]["rows_resent"] == 1
        assert 0 < fault["noticed_ms"] <= fault["redundant_ms"] <= 20_000
        assert fault["noticed_ms"] < fault["replaced_ms"]
        assert fault["longest_gap_ms"] > 0
    assert (tmp_path / "gaps.png").stat().st_size > 0 and (tmp_path / "timeline.png").stat().st_size > 0
    table = (tmp_path / "faults.md").read_text()
    assert "| 0 | 0 | 0 | 0 | 0 |" in table and "| 3 | expert-server-" in table


def _lost(position: int, tokens: Tokens) -> Tokens:
    return []


def _twice(position: int, tokens: Tokens) -> Tokens:
    return tokens * 2


def _changed(position: int, tokens: Tokens) -> Tokens:
    return [(1001, digest) for _, digest in tokens]


def _other_logits(position: int, tokens: Tokens) -> Tokens:
    return [(token, "other") for token, _ in tokens]


@pytest.mark.parametrize(
    ("plant", "found"),
    [(_lost, "lost"), (_twice, "duplicated"), (_changed, "changed"), (_other_logits, "changed_digests")],
)
def test_what_is_planted_is_found(plant: Plant, found: str, tmp_path: Path) -> None:
    with fake_cluster(plant) as url:
        status, result = bench(url, tmp_path, "--times", "1")
    assert (status, result["kept"]) == (1, False)
    wrong = {name: n for name, n in result["account"].items() if n and name not in ("requests", "tokens")}
    assert wrong == {found: 1}


@pytest.mark.parametrize(
    ("counters", "kept"),
    [
        ({}, True),
        ({"rows_lost": 7, "rows_resent": 7, "tokens_recomputed": 0}, True),
        ({"rows_lost": 7, "rows_resent": 6}, False),
        ({"rows_lost": 7, "rows_resent": 8}, False),
        ({"tokens_recomputed": 1}, False),
        ({"forwards_restarted": 1}, False),
    ],
)
def test_only_what_was_lost_may_be_sent_again(counters: dict[str, int], kept: bool) -> None:
    assert only_resent(counters) is kept


def test_several_at_once_are_one_fault(tmp_path: Path) -> None:
    with fake_cluster() as url:
        _, result = bench(url, tmp_path, "--times", "1", "--kill", "expert-server,expert-server")
    (fault,) = result["faults"]
    assert len({killed["id"] for killed in fault["killed"]}) == 2
    assert fault["replaced_ms"] is not None


def test_kills_that_hit_nothing_are_followed_by_others_up_to_a_limit(tmp_path: Path) -> None:
    with fake_cluster(hits=False) as url:
        _, result = bench(url, tmp_path, "--times", "1")
    assert [fault["hit"] for fault in result["faults"]] == [False, False, False]
    assert result["hits"] == 0


def test_a_status_without_counters_leaves_hits_unknown(tmp_path: Path) -> None:
    with fake_cluster(counters=False) as url:
        status, result = bench(url, tmp_path, "--times", "1")
    assert status == 0
    assert [(f["hit"], f["rerouted_ms"], f["counters"]) for f in result["faults"]] == [(None, None, {})]


def test_a_run_without_faults(tmp_path: Path) -> None:
    with fake_cluster() as url:
        status, result = bench(url, tmp_path, "--times", "0")
    assert status == 0 and result["faults"] == []
    assert result["between_faults"]["gap_ms"]["max"] > 0
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("argv", [["--kill", "launcher"], ["--streams", "0"], ["--requests", "2"]])
def test_bad_options_are_one_clear_line(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, "--out", str(tmp_path)]) == 1
    assert argv[0].strip("-") in capsys.readouterr().err


def test_a_cluster_that_does_not_start_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path / "nothing-here"), "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "it exited with status" in error and "nothing-here" in error
