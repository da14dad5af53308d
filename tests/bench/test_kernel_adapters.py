"""What bench.kernels times computes the experts' rows: its own adapters, on every kind of weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.kernel_cases import DEVICE, Shape, make_case, reference_error
from bench.kernel_ours import Ours, OursQuantized
from bench.kernel_peers import CublasLoop, interleaved
from bench.kernel_quantized import fp8_rows, quantized_weights

SHAPE = Shape("tiny", hidden=128, intermediate=256, local=4, experts=6, top_k=2)
TOLERANCE = 6e-3 if DEVICE == "cuda" else 1.2e-2  # the interpreter truncates to bf16 where a GPU rounds


@pytest.mark.parametrize(
    ("kind", "make"), [("bf16", Ours), ("bf16", CublasLoop), ("fp8", OursQuantized), ("mxfp4", OursQuantized)]
)
def test_adapters_compute_what_the_stored_weights_stand_for(kind: str, make: Any) -> None:
    w13, w2 = SHAPE.weights() if kind == "bf16" else quantized_weights(SHAPE, kind)
    case = make_case(SHAPE, 24, seed=1)  # the launch for few pairs is not one for the interpreter
    peer = make(w13, w2, None)
    (variant,) = peer.variants(case)
    run = peer.prepare(case, variant)
    run.core()
    assert reference_error(case, w13, w2, run.rows()) < TOLERANCE


def test_bytes_moved_counts_touched_experts_and_rows() -> None:
    case = make_case(SHAPE, 1, seed=1)
    touched = sum(count > 0 for count in case.counts)
    rows = 2 * 128 * (1 + case.pairs)
    assert case.bytes_moved(*SHAPE.weights()) == touched * 2 * 3 * 128 * 256 + rows
    assert case.bytes_moved(*quantized_weights(SHAPE, "fp8")) == touched * (3 * 128 * 256 + 4 * 6) + rows
    assert case.bytes_moved(*quantized_weights(SHAPE, "mxfp4")) == touched * 3 * 128 * 256 * 17 / 32 + rows


@pytest.mark.parametrize("silu_mul", [False, True])
def test_fp8_rows(silu_mul: bool) -> None:
    # each block's largest is a power of two times 448, so that nothing is rounded: the interpreter rounds fp8 wrongly
    rows = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).to(DEVICE).to(torch.float8_e4m3fn)
    rows[:, ::128] = 448
    scale = torch.tensor([[1.0, 0.5], [2.0, 4.0], [0.25, 1.0]], device=DEVICE)
    x = (rows.float() * scale.repeat_interleave(128, 1)).to(torch.bfloat16)
    if silu_mul:
        x = torch.cat([torch.full_like(x, 64), x / 64], dim=1)  # silu(64) is 64
    got, got_scale = fp8_rows(x, silu_mul=silu_mul)
    assert torch.equal(got_scale, scale)
    assert torch.equal(got.float(), rows.float())


def test_interleaved() -> None:
    w13 = torch.tensor([[[1], [2], [3], [4], [5], [6]]])
    assert interleaved(w13).tolist() == [[[1], [4], [2], [5], [3], [6]]]
