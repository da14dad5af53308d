"""The bench of several deaths at once, on a cluster that only looks like one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.several_at_once import main
from tests.bench.fake_cluster import Tokens, fake_cluster


def _lost(position: int, tokens: Tokens) -> Tokens:
    return []


def flags(url: str, out: Path) -> list[str]:
    argv = ["--url", url, "--out", str(out), "--at-once", "1,2", "--times", "1", "--streams", "4"]
    return [*argv, "--output-tokens", "20-30", "--calm", "0.05"]


def test_each_number_has_its_account(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.faults.COUNTERS_S", 0.0)
    with fake_cluster(expert_servers=3) as url:
        assert main(flags(url, tmp_path)) == 0
    runs = json.loads((tmp_path / "several_at_once.json").read_text())["runs"]
    assert [[len(f["killed"]) for f in run["faults"]] for run in runs.values()] == [[1], [2]]
    assert all(run["kept"] for run in runs.values())
    *_, one, two = capsys.readouterr().out.splitlines()
    assert one.startswith("| 1 | 1 | ") and two.startswith("| 2 | 1 | ") and "NOT" not in one + two


def test_what_is_lost_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.faults.COUNTERS_S", 0.0)
    with fake_cluster(_lost) as url:
        assert main([*flags(url, tmp_path), "--at-once", "1"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[3:5] == ["0", "1"]  # errors, lost


@pytest.mark.parametrize("numbers", ["0", "9", "x"])
def test_bad_numbers_are_one_clear_line(numbers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--at-once", numbers, "--out", str(tmp_path)]) == 1
    assert "at_once" in capsys.readouterr().err
