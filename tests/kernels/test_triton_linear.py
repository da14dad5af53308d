"""The Triton linear layer: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from kernels.triton_linear import Linear, LinearTiling, choose_linear_tiling
from tests.interpreter import DEVICE

SMALL = LinearTiling(16, 32, 32, 4, 2, group_m=2)
SWAPPED = LinearTiling(16, 64, 64, 4, 2, swap=True)
# The interpreter truncates to bf16 where a GPU rounds.
TOLERANCE = 1.2e-2 if DEVICE == "cpu" else 6e-3


def layer(columns: int, depth: int) -> Linear:
    generator = torch.Generator().manual_seed(columns * depth)
    return Linear((torch.randn(columns, depth, generator=generator) * depth**-0.5).to(DEVICE, torch.bfloat16))


def rows_of(count: int, depth: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, depth, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("tiling", [SMALL, SWAPPED], ids=["plain", "swapped"])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 40, 72), (37, 72, 64), (50, 128, 136)])
def test_products_of_any_size(tiling: LinearTiling, rows: int, columns: int, depth: int) -> None:
    linear, x = layer(columns, depth), rows_of(rows, depth)
    expected = x.double() @ linear.weight.double().T
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((rows, columns), float("nan"), dtype=dtype, device=DEVICE)
        assert error(linear(x, out, tiling=tiling), expected) < (1e-5 if dtype == torch.float32 else TOLERANCE)
    start = rows_of(rows, columns, seed=2).float()
    assert error(linear(x, start.clone(), add=True, tiling=tiling), expected + start.double()) < 1e-5


def test_shapes_that_do_not_fit_are_refused() -> None:
    linear = layer(32, 64)
    with pytest.raises(ValueError, match=r"want \[n, 64\]"):
        linear(rows_of(2, 32), torch.empty(2, 32, device=DEVICE))
    with pytest.raises(ValueError, match=r"want \(2, 32\)"):
        linear(rows_of(2, 64), torch.empty(3, 32, device=DEVICE))
    with pytest.raises(ValueError, match="that 8 divides"):
        Linear(torch.empty(4, 12, device=DEVICE))


def test_a_row_has_the_same_bits_at_every_row_count() -> None:
    """On a GPU over the tilings that are used; the interpreter's own product depends on the tile, so one tile there."""
    columns, depth = (5120, 2048) if DEVICE == "cuda" else (96, 64)
    linear, x = layer(columns, depth), rows_of(4096 if DEVICE == "cuda" else 70, depth)
    counts = (1, 2, 7, 16, 17, 32, 33, 64, 128, 129, 1000, 4096) if DEVICE == "cuda" else (1, 5, 16, 33, 70)
    whole = linear(x, torch.empty(len(x), columns, device=DEVICE), tiling=None if DEVICE == "cuda" else SMALL)
    for count in counts:
        tiling = choose_linear_tiling(count, columns) if DEVICE == "cuda" else SMALL
        part = linear(x[:count], torch.empty(count, columns, device=DEVICE), tiling=tiling)
        assert torch.equal(part, whole[:count]), f"{count} rows"
