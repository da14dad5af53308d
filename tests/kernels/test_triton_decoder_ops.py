"""Norm, rotary embedding and the gate's choice: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import reference
from kernels.pinning import pin
from kernels.triton_attention import PAGE_KEYS
from kernels.triton_combine import add_combined, add_combined_at
from kernels.triton_gate import choose_experts
from kernels.triton_rms_norm import rms_norm
from kernels.triton_rotary import Rotary
from tests.interpreter import DEVICE


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("size", [64, 72, 2048])
def test_rms_norm(size: int) -> None:
    x, weight = random(5, size), random(size, seed=2)
    out, again = torch.empty_like(x), torch.empty_like(x)
    expected = reference.rms_norm(x, weight, 1e-5)
    assert (rms_norm(x, weight, 1e-5, out).double() - expected).abs().max() < 1e-5
    half = torch.empty_like(x, dtype=torch.bfloat16)
    assert (rms_norm(x, weight, 1e-5, half).double() - expected).abs().max() < 0.05
    assert torch.equal(rms_norm(x[3:4].contiguous(), weight, 1e-5, out[:1]), rms_norm(x, weight, 1e-5, again)[3:4])


@pytest.mark.parametrize("norms", [False, True])
def test_rotary_turns_queries_and_fills_the_cache(norms: bool) -> None:
    heads, kv_heads, dim, positions = 3, 2, 32, torch.tensor([0, 7, 90, 91], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([5, 70, 64, 191], dtype=torch.int32, device=DEVICE)
    qkv = random(4, heads + 2 * kv_heads, dim)
    angles = torch.arange(100, device=DEVICE)[:, None] * 10.0 ** -torch.arange(dim // 2, device=DEVICE)
    weights = random(2, dim, seed=3) if norms else None
    cache = torch.zeros(3, 2, kv_heads, PAGE_KEYS, dim, device=DEVICE)
    query = torch.empty(4, heads, dim, device=DEVICE)
    Rotary(angles.cos(), angles.sin(), weights, 1e-6)(qkv, positions, slots, query, cache)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    if weights is not None:
        q, k = (reference.rms_norm(t, w, 1e-6) for t, w in zip((q, k), weights, strict=True))
    cos, sin = angles.cos()[positions.long()], angles.sin()[positions.long()]
    assert (query.double() - reference.rotary(q, cos, sin)).abs().max() < 1e-5
    pages, places = slots.long() // PAGE_KEYS, slots.long() % PAGE_KEYS
    assert (cache[pages, 0, :, places].double() - reference.rotary(k, cos, sin)).abs().max() < 1e-5
    assert torch.equal(cache[pages, 1, :, places], v)
    cache[pages, :, :, places] = 0
    assert not cache.any()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (128, 8), (6, 6)])
def test_the_gate_takes_the_highest_scores(experts: int, top_k: int, normalize: bool) -> None:
    scores = random(7, experts)
    scores[1] = 0.5  # equal ones
    scores[2, 3:] = scores[2, 3]
    ids = torch.full((7, top_k), -7, device=DEVICE)
    local = ids.int()
    weights = random(7, top_k)
    choose_experts(scores, torch.tensor([5], dtype=torch.int32, device=DEVICE), ids, local, weights, normalize)
    expected_ids, expected = reference.choose_experts(scores, top_k, normalize)
    assert torch.equal(ids, expected_ids)
    assert (weights.double() - expected).abs().max() < 1e-6
    assert torch.equal(local[:5].long(), ids[:5]) and bool((local[5:] == -1).all())


def test_a_row_of_nans_still_names_experts_that_exist() -> None:
    scores, weights = random(2, 6), random(2, 2)
    scores[0] = float("nan")
    ids = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    choose_experts(scores, torch.tensor([2], dtype=torch.int32, device=DEVICE), ids, ids.int(), weights, True)
    assert bool(((ids >= 0) & (ids < 6)).all())
    assert torch.equal(ids[1], scores[1].topk(2).indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_added_in_top_k_order(dtype: torch.dtype) -> None:
    residual, pair_rows, weights = random(3, 72), random(12, 72, seed=2).to(dtype), random(3, 4, seed=3).abs()
    expected = residual.clone()
    for slot in range(4):
        expected += weights[:, slot, None] * pair_rows.float().view(3, 4, -1)[:, slot]
    add_combined(residual, pair_rows, weights)
    assert torch.equal(residual, expected)


def test_experts_are_added_from_wherever_they_lie() -> None:
    residual, pair_rows, weights = random(3, 72), random(12, 72, seed=2).bfloat16(), random(3, 4, seed=3).abs()
    expected = residual.clone()
    add_combined(expected, pair_rows, weights)
    at = torch.randperm(15, generator=torch.Generator().manual_seed(4))[:12].to(DEVICE)
    scattered = torch.full((15, 72), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    scattered[at] = pair_rows
    add_combined_at(residual, scattered.data_ptr() + at * 144, weights)
    assert torch.equal(residual, expected)


def test_experts_are_added_from_memory_of_the_host() -> None:
    residual, pair_rows, weights = random(3, 72), random(12, 72, seed=2).bfloat16(), random(3, 4, seed=3).abs()
    expected = residual.clone()
    add_combined(expected, pair_rows, weights)
    memory = np.zeros(3 * 4096, np.uint8)
    start = -memory.ctypes.data % 4096
    page = memory[start : start + 4096]
    undo = pin(page) if DEVICE == "cuda" else int
    assert undo is not None
    page[: 12 * 144] = pair_rows.cpu().view(torch.uint8).numpy().reshape(-1)
    add_combined_at(residual, page.ctypes.data + torch.arange(12, device=DEVICE) * 144, weights)
    assert torch.equal(residual, expected)
    undo()


def test_what_has_no_place_counts_as_zeros() -> None:
    residual, pair_rows, weights = random(2, 72), random(3, 72, seed=2).bfloat16(), random(2, 2, seed=3).abs()
    expected = residual.clone()
    expected[0] += weights[0, 1] * pair_rows[2].float()
    expected[1] += weights[1, 0] * pair_rows[0].float()
    first = pair_rows.data_ptr()
    add_combined_at(residual, torch.tensor([0, first + 288, first, 0], device=DEVICE), weights)
    assert torch.equal(residual, expected)
    with pytest.raises(ValueError, match="int64 addresses of 4 pairs"):
        add_combined_at(residual, torch.tensor([0, 1], device=DEVICE), weights)
