"""What the bench of the whole system on a GPU makes of its logs and figures."""

from __future__ import annotations

from pathlib import Path

from bench.gpu_end_to_end import Config, _prompts, loading, table

SLOW = {"engine": 20.0, "transformers": 10.0, "ratio": 2.0}
FIGURES = {
    "gpu": "a card",
    "layers": 12,
    "speed": {
        "8": SLOW | {"transformers_trials": {"eager": 3.0, "grouped_mm": 9.0}},
        "32": SLOW | {"transformers_trials": {"eager": 9.0, "grouped_mm": 0.0}},
    },
}


def test_loads_are_read_from_the_log(tmp_path: Path) -> None:
    log = tmp_path / "cluster.log"
    lines = ("x loaded 42 of 768 experts", "x loaded 768 experts in 10.0 s", "x loaded 3 experts in 0.0 s")
    log.write_text("\n".join(lines))
    whole, few = loading(log, 10_000_000)
    assert whole == {"experts": 768, "gb": 7.68, "seconds": 10.0, "gb_per_s": 0.77}
    assert (few["experts"], few["gb_per_s"]) == (3, 0.6)


def test_prompts_are_as_many_as_the_most_streams_and_always_the_same() -> None:
    config = Config(streams=("1", "5"), prompt_tokens=7)
    prompts = _prompts(config, 50)
    assert [len(p) for p in prompts] == [7] * 5 and len({tuple(p) for p in prompts}) == 5
    assert prompts == _prompts(config, 50)


def test_the_table_names_the_best_way_of_transformers_and_the_bar_that_was_missed() -> None:
    rows = table(FIGURES).splitlines()[-2:]
    assert rows == [
        "| 8 | 20.0 | 10.0 (grouped_mm) | 2.0 |",
        "| 32 | 20.0 | 10.0 (eager) | 2.0 (bar 3: MISSED) |",
    ]
