"""Random checkpoints are ones that moering serves, with experts that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from bench.random_checkpoint import Shape, main, write
from moering.checkpoint import Checkpoint
from router.model_config import MoEModelConfig

SIZES: Any = {"layers": 2, "hidden": 32, "intermediate": 32, "experts": 4, "heads": 4, "head_dim": 16, "vocab": 300}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_it_can_be_served(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(Shape(str(tmp_path), family, **SIZES)))
    assert (checkpoint.num_layers, checkpoint.num_experts, checkpoint.top_k) == (2, 4, 2)
    assert MoEModelConfig.from_checkpoint(checkpoint).vocab_size == 300
    assert len({checkpoint.expert(layer, expert).digest for layer in range(2) for expert in range(4)}) == 8
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.decode(tokenizer.encode("a ring, ü").ids) == "a ring, ü"


def test_equal_shapes_give_equal_files(tmp_path: Path) -> None:
    one, two, other = (Shape(str(tmp_path / n), seed=seed, **SIZES) for n, seed in (("1", 1), ("2", 1), ("3", 2)))
    digests = [Checkpoint(write(shape)).expert(0, 0).digest for shape in (one, two, other)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("argv", [[], ["x", "--vocab", "10"], ["x", "--top-k", "99"]])
def test_bad_options_are_one_clear_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    assert capsys.readouterr().err.startswith("bench.random_checkpoint: ")
