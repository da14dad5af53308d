"""The bench of several GPUs: what it makes of figures, and its parts at a tiny size on CPUs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from bench.decode_rate import decode_rate
from bench.engine_client import EngineClient
from bench.engine_processes import Place, in_process
from bench.multi_gpu import Bench
from bench.multi_gpu_config import Config, Gpus, Setting
from bench.multi_gpu_report import draw, table
from bench.qwen3_shape import fewer_layers, layers_that_fit, write_checkpoint
from moering.checkpoint import Checkpoint
from moering.errors import ConfigError, MoeringError

ROW = {
    "in process": {"tokens_per_s_a_gpu": 100.0, "ms_a_token": 10.0, "cost": 0.0},
    "one micro-batch": {"tokens_per_s_a_gpu": 80.0, "ms_a_token": 12.0, "cost": 0.2},
    "two micro-batches": {"tokens_per_s_a_gpu": 97.0, "ms_a_token": 10.3, "cost": 0.03},
}
DEAR = ROW | {"two micro-batches": {"tokens_per_s_a_gpu": 90.0, "ms_a_token": 11.0, "cost": 0.1}}
FIGURES: dict[str, Any] = {
    "gpus": {"names": ["a card", "a card"], "gb": 80.0, "driver": "1"},
    "layers": 16,
    "apart": False,
    "static": {
        "streams": {"32": ROW, "8": DEAR, "64": DEAR},
        "equal": {"two micro-batches": {"equal": 5, "digests": 6}},
        "price": {"64": {"hop": 10.0, "compute": 20.0, "round_trip": 30.0}},
    },
    "failed": {"kills": "out of time"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("multi_gpu") / "whole", 2, tiny=True)


def test_the_bar_counts_from_32_streams_on_and_what_is_missing_is_named() -> None:
    text = table(FIGURES)
    rows = [line for line in text.splitlines() if line.startswith(("| 8", "| 32", "| 64 | 100"))]
    assert [("bar" in r, "MISSED" in r) for r in rows] == [(False, False), (True, False), (True, True)]
    assert "**kills**: not run" in text and "FAILED kills: out of time" in text and "5 of 6" in text


def test_what_was_measured_is_drawn(tmp_path: Path) -> None:
    assert [p.name for p in draw(FIGURES, tmp_path)] == ["multi-gpu-static.png", "multi-gpu-price.png"]
    assert all(p.stat().st_size for p in tmp_path.iterdir())


def test_fewer_layers_are_a_checkpoint_of_the_same_experts(checkpoint: Path, tmp_path: Path) -> None:
    whole, one = Checkpoint(checkpoint), Checkpoint(fewer_layers(checkpoint, tmp_path / "one", 1))
    assert (whole.num_layers, one.num_layers) == (2, 1)
    assert one.expert(0, 3).digest == whole.expert(0, 3).digest


@pytest.mark.parametrize(("gpus", "least", "most"), [(1, 20, 28), (2, 18, 26), (4, 20, 36), (8, 36, 48)])
def test_layers_fit_cards_of_80_gb(gpus: int, least: int, most: int) -> None:
    assert least <= layers_that_fit(85.0, gpus) <= most
    assert layers_that_fit(1e4, gpus) == 48


def test_servers_share_a_gpu_only_where_there_are_too_few() -> None:
    assert [Gpus(("x",) * n, 80.0, "").servers for n in (1, 2, 3, 4, 8)] == [3, 3, 3, 3, 7]


@pytest.mark.parametrize(("gpus", "said"), [(2, "they share a GPU"), (4, "MISSED")])
def test_two_routers_are_held_against_one_where_each_has_a_gpu(gpus: int, said: str) -> None:
    death = {"account": {"lost": 0, "changed": 1}, "faults": [{"over_kill_ms": 7.0}]}
    found = {"tokens_per_s": {"1": 100.0, "2": 150.0}, "death": death}
    card = FIGURES["gpus"] | {"names": ["a card"] * gpus}
    text = table(FIGURES | {"gpus": card, "routers": found})
    assert "1.50 of one" in text and said in text
    assert "1 deaths of one of two: lost 0, changed 1; gap over each, ms: [7.0]" in text
    assert "**a second router**: not run" in table(FIGURES)


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="parts"):
        Config(parts=("static", "nonsense"))


def test_decoding_is_measured_while_all_streams_decode(checkpoint: Path, tmp_path: Path) -> None:
    flags = ["--max-num-seqs", "4", "--kv-cache-mb", "64", "--max-num-batched-tokens", "4"]
    with in_process(Place(checkpoint, "cpu"), flags, tmp_path / "log") as address:
        client = EngineClient(address, 20.0)
        for _ in range(2):  # the second time beside what was aborted
            rate = decode_rate(client, [[30 + i, 40] for i in range(3)], 0.05, 4)
            assert rate.tokens >= 12 and rate.seconds >= 0.05
        assert len(client.generate([[50]], 3).outputs[0]) == 3
        client.close()


def test_a_part_that_fails_is_named_and_the_next_one_runs(checkpoint: Path, tmp_path: Path) -> None:
    setting = Setting(Config(device="cpu", parts=("reload",)), Gpus(("a",), 1.0, ""), checkpoint, tmp_path)
    bench = Bench(setting, setting, {})

    async def fails() -> None:
        raise MoeringError("no such thing")

    async def both() -> None:
        await bench._part("static", fails)
        await bench.run()

    asyncio.run(both())
    figures = json.loads((tmp_path / "multi_gpu.json").read_text())
    assert "no such thing" in figures["failed"]["static"] and figures["reload"]["plain_read_gb_per_s"] > 0
