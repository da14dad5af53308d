"""A decoder and experts on fp8 weights against the same weights served as a plain checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fp8 import quantize, widen
from tests.router.decoding import Model, random_tokens
from tests.tiny import write_checkpoint

TOKENS = random_tokens(40, seed=3)


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "plain", request.param, hidden=160, intermediate=136)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_are_those_of_the_plain_checkpoint_where_weights_are_bf16_numbers(
    plain: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    fp8 = quantize(plain, tmp_path / "fp8", powers=True)
    wide = Model.open(widen(fp8, tmp_path / "wide", dtype))
    narrow = Model.open(fp8)
    assert torch.equal(narrow.prefill(TOKENS, [0]), wide.prefill(TOKENS, [0]))
    assert narrow.greedy(TOKENS, 4, [1]) == wide.greedy(TOKENS, 4, [1])


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_other_weights_are_rounded_to_fp16(plain: Path, tmp_path: Path, scale_dtype: torch.dtype) -> None:
    fp8 = quantize(plain, tmp_path / "fp8", scale_dtype)
    logits = Model.open(fp8).prefill(TOKENS, [0])
    assert torch.equal(logits, Model.open(widen(fp8, tmp_path / "half", torch.float16)).prefill(TOKENS, [0]))
    exact = Model.open(widen(fp8, tmp_path / "exact", torch.float32)).prefill(TOKENS, [0])
    in_bf16 = Model.open(widen(fp8, tmp_path / "bf16", torch.bfloat16)).prefill(TOKENS, [0])
    error, error_of_bf16 = (float((x - exact).norm(dim=1).median()) for x in (logits, in_bf16))
    assert 0 < error < error_of_bf16


def test_fp8_weights_are_those_that_were_quantised(plain: Path, tmp_path: Path) -> None:
    """Less what fp8 takes: another order of rows, or a scale of another block, would leave nothing alike."""
    before, after = (Model.open(path).prefill(TOKENS, [0]) for path in (plain, quantize(plain, tmp_path / "fp8")))
    errors = (after - before).norm(dim=1) / before.norm(dim=1)
    assert float(errors.median()) < 0.3
