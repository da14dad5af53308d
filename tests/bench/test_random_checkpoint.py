"""Random checkpoints are ones that moering serves, with experts that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from bench.random_checkpoint import Shape, main, write
from kernels.tensors import as_tensor
from moering.checkpoint import Checkpoint
from router.model_config import MoEModelConfig

SIZES: Any = {"layers": 2, "hidden": 32, "intermediate": 32, "experts": 4, "heads": 4, "head_dim": 16, "vocab": 300}


@pytest.mark.parametrize("dtype", ["float16", "fp8"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_it_can_be_served(family: str, dtype: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write(Shape(str(tmp_path), family, dtype=dtype, **SIZES)))
    assert (checkpoint.num_layers, checkpoint.num_experts, checkpoint.top_k) == (2, 4, 2)
    assert MoEModelConfig.from_checkpoint(checkpoint).vocab_size == 300
    assert len({checkpoint.expert(layer, expert).digest for layer in range(2) for expert in range(4)}) == 8
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.decode(tokenizer.encode("a ring, ü").ids) == "a ring, ü"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fp8_weights_are_those_in_bf16_but_for_their_steps(family: str, tmp_path: Path) -> None:
    sizes = SIZES | {"hidden": 160, "intermediate": 136, "head_dim": 64}
    fp8, bf16 = (Checkpoint(write(Shape(str(tmp_path / n), family, dtype=n, **sizes))) for n in ("fp8", "bfloat16"))
    assert fp8.expert_dtypes == {"F8_E4M3"}
    names = fp8.names()
    assert names == bf16.names()
    pairs = [(fp8.tensor(name), bf16.tensor(name)) for name in names]
    pairs += zip(fp8.expert(1, 2).parts, bf16.expert(1, 2).parts, strict=True)
    quantised = [a.scale is not None for a, _ in pairs]
    assert sum(quantised) == 2 * 4 + 3  # attention of two layers, an expert
    for a, b in pairs:
        wanted = as_tensor(b).float()
        error = (as_tensor(a).float() - wanted).norm() / wanted.norm()
        assert float(error) < (0.04 if a.scale is not None else 1e-9)


def test_equal_shapes_give_equal_files(tmp_path: Path) -> None:
    one, two, other = (Shape(str(tmp_path / n), seed=seed, **SIZES) for n, seed in (("1", 1), ("2", 1), ("3", 2)))
    digests = [Checkpoint(write(shape)).expert(0, 0).digest for shape in (one, two, other)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("argv", [[], ["x", "--vocab", "10"], ["x", "--top-k", "99"]])
def test_bad_options_are_one_clear_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    assert capsys.readouterr().err.startswith("bench.random_checkpoint: ")
