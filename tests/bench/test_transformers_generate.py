"""Comparing speeds and tokens of two generators."""

from __future__ import annotations

import pytest

from bench.generators import Answer
from bench.transformers_generate import BARS, agreeing, compare, summary, table


def test_tokens_agree_up_to_the_first_difference() -> None:
    assert agreeing([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert agreeing([1, 2], [1, 2]) == 2
    assert agreeing([1], [2]) == 0


def test_speed_counts_the_tokens_of_all_prompts() -> None:
    ours = Answer(2.0, [[1, 2, 3], [4, 5, 6]])
    theirs = Answer(6.0, [[1, 2, 3], [4, 0, 6]])
    assert compare(ours, theirs) == {"moering": 3.0, "transformers": 1.0, "ratio": 3.0, "equal": 4, "tokens": 6}


def test_ratios_are_taken_round_by_round() -> None:
    def cell(moering: float, transformers: float) -> dict[str, float]:
        ratio = moering / transformers
        return {"moering": moering, "transformers": transformers, "ratio": ratio, "equal": 7, "tokens": 8}

    # The machine became twice as slow in the second round: the ratio did not change.
    rounds = [dict.fromkeys(BARS, cell(*speeds)) for speeds in ((40.0, 20.0), (20.0, 10.0), (33.0, 11.0))]
    figures = summary(rounds)
    one = figures["modes"]["one"]
    assert (one["ratio"], one["min"], one["max"]) == (2.0, 2.0, pytest.approx(3.0))
    assert (one["equal"], one["tokens"]) == (21, 24)
    chosen = {mode: {"dtype": "auto", "experts": "eager", "threads": 2} for mode in BARS}
    verdicts = [line.count("MISSED") for line in table({**figures, "chosen": chosen}).splitlines()[2:]]
    assert verdicts == [0, 1, 0]  # 2.0 is less than the bar of 4 for one prompt after the other
