"""What the bench of loading makes of its figures, and that its three ways of reading read what they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.client import Arrival, Exchange
from bench.elastic import Step
from bench.loading import main, summary, table
from bench.loading_rates import Loading
from tests.tiny import write_checkpoint


def step(at_s: float, phase: str = "done") -> Step:
    """Calm from `at_s` for ten seconds, then ten seconds of loading."""
    return Step("scale", at_s, at_s + 10, at_s + 20, {"phase": phase, "moved_bytes": 2_000_000})


def exchange(*rates: tuple[float, float, float]) -> Exchange:
    """One token at a time; each of `rates` is (from, to, tokens a second)."""
    times = [start + (n + 0.5) / rate for start, end, rate in rates for n in range(round((end - start) * rate))]
    made = Exchange()
    made.arrivals = [Arrival(t, "x", [1], []) for t in times]
    return made


def figures(joining: float, loading: float) -> dict[str, Any]:
    e = exchange((0, 10, 10), (10, 20, joining), (20, 30, 20), (30, 40, loading))
    cluster = summary([step(0), step(20)], [e])
    rates = [{"cache": "warm", "way": "plain", "gb_per_s": [1.0, 3.0, 2.0], "of_plain": 1.0}]
    return {"rates": rates, "traffic": [{"share": "0.1", **cluster}]}


def test_the_cost_is_what_is_missing_to_the_calm_time_before() -> None:
    joined, loaded = figures(9, 15)["traffic"][0]["rows"]
    assert (joined["calm"], joined["loading"], joined["cost"]) == ([10.0], [9.0], 0.1)
    assert (loaded["calm"], loaded["loading"], loaded["cost"]) == ([20.0], [15.0], 0.25)
    assert joined["mb"] == [2.0] and joined["seconds"] == [10]
    assert joined["loading_gap_ms"]["p50"] == pytest.approx(1000 / 9, rel=0.01)


def test_the_bar() -> None:
    assert table(figures(9, 18)).count("MISSED") == 0
    assert table(figures(8, 17)).count("MISSED") == 2
    assert "| warm | plain | 2.00 | 1.00 | 3.00 | 100% |" in table(figures(9, 18))


def test_an_operation_that_failed_is_shown() -> None:
    assert summary([step(0, "failed"), step(20)], [exchange((0, 40, 10))])["failed_operations"] == 1


def test_each_way_reads_its_bytes(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m")
    files = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    loading = Loading(checkpoint, 1)
    loading.drop_cache()
    plain, experts, loaded = (way() for way in loading.ways.values())
    loading.close()
    assert plain == files > experts == loaded > files // 4


def test_without_traffic_only_the_rates_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "m")
    assert main(["--model", str(checkpoint), "--rounds", "2", "--shares", "none", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "loading.json").read_text())
    assert [(r["cache"], r["way"], len(r["gb_per_s"])) for r in written["rates"]] == [
        (cache, way, 2) for cache in ("warm", "dropped") for way in ("plain", "read and hashed", "loaded")
    ]
    assert written["traffic"] == []
    assert "| dropped | loaded |" in capsys.readouterr().out
