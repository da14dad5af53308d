"""The kernels on fp8 and MXFP4 weights against the float64 reference on the weights they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from kernels import reference
from kernels.quantized_weight import QuantizedWeight, pack_fp8, pack_mxfp4
from kernels.triton_quantized_ffn import QuantizedExperts, choose_quantized_tiling
from kernels.triton_small_tiles import Cut, SmallTiling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 6e-3 if DEVICE == "cuda" else 1.2e-2  # the interpreter truncates to bf16 where a GPU rounds
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
Made = tuple[QuantizedWeight, torch.Tensor]


def fp8(experts: int, rows: int, depth: int) -> Made:
    """An fp8 weight and the float64 matrix it stands for."""
    generator = torch.Generator().manual_seed(rows + depth)
    data = (torch.randn(experts, rows, depth, generator=generator) * 64).to(torch.float8_e4m3fn)
    scale = (torch.rand(experts, rows // 128, depth // 128, generator=generator) + 0.5) / 64 * depth**-0.5
    dense = data.double() * scale.repeat_interleave(128, 1).repeat_interleave(128, 2).double()
    return pack_fp8(data.to(DEVICE), scale.to(DEVICE)), dense.to(DEVICE)


def mxfp4(experts: int, rows: int, depth: int) -> Made:
    """The same for MXFP4, from a checkpoint's layout."""
    generator = torch.Generator().manual_seed(rows + depth)
    blocks = torch.randint(0, 256, (experts, rows, depth // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(119, 124, (experts, rows, depth // 32), generator=generator, dtype=torch.uint8)
    values = torch.stack([E2M1[(blocks & 15).long()], E2M1[(blocks >> 4).long()]], dim=-1).view(experts, rows, depth)
    dense = values * torch.exp2(scales.double() - 127).repeat_interleave(32, 2)
    return pack_mxfp4(blocks.to(DEVICE), scales.to(DEVICE)), dense.to(DEVICE)


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def rows_of(count: int, hidden: int) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)


# MXFP4 rows need not fill a tile; fp8 blocks do
@pytest.mark.parametrize("one_launch", [True, False])
@pytest.mark.parametrize(
    ("make", "hidden", "intermediate"), [(fp8, 256, 128), (fp8, 128, 256), (mxfp4, 192, 64), (mxfp4, 64, 320)]
)
def test_against_the_dense_weights(
    make: Callable[[int, int, int], Made], hidden: int, intermediate: int, one_launch: bool
) -> None:
    (w13, dense13), (w2, dense2) = make(4, 2 * intermediate, hidden), make(4, hidden, intermediate)
    hidden_states = rows_of(5, hidden)
    experts, rows = ints([2] * 18 + [0, 3, -1, 2]), ints([position % 5 for position in range(22)])
    out = torch.full((22, hidden), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    tiling = SmallTiling(16, Cut(32, 128, 3), Cut(128, 128, 3), one_launch=one_launch)
    QuantizedExperts(w13, w2).forward(hidden_states, experts, rows, out=out, tiling=tiling)
    expected = reference.expert_ffn(hidden_states, dense13, dense2, experts, rows)
    local = experts >= 0
    error = (out[local].double() - expected[local]).norm(dim=1) / expected[local].norm(dim=1)
    assert float(error.max()) < TOLERANCE
    assert bool(out[~local].isnan().all())


@pytest.mark.parametrize("make", [fp8, mxfp4])
def test_biases_and_the_clamped_activation(make: Callable[[int, int, int], Made]) -> None:
    (w13, dense13), (w2, dense2) = make(2, 256, 128), make(2, 128, 128)
    generator = torch.Generator().manual_seed(9)
    biases = tuple(torch.randn(2, columns, generator=generator).to(DEVICE) for columns in (256, 128))
    hidden_states = 3 * rows_of(4, 128)
    experts, rows = ints([0, 1, 1, 0]), ints([0, 1, 2, 3])
    result = QuantizedExperts(w13, w2, biases, limit=2.5).forward(hidden_states, experts, rows)
    expected = reference.expert_ffn(hidden_states, dense13, dense2, experts, rows, biases, limit=2.5)
    error = (result.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < TOLERANCE


@pytest.mark.parametrize("make", [fp8, mxfp4])
def test_the_result_goes_to_an_address(make: Callable[[int, int, int], Made]) -> None:
    """With the same bits, and nothing beside it."""
    (w13, _), (w2, _) = make(3, 256, 128), make(3, 128, 128)
    experts, hidden_states = QuantizedExperts(w13, w2), rows_of(5, 128)
    ids, rows = ints([2] * 18 + [0, 1, 1]), ints([position % 5 for position in range(21)])
    wanted = experts.forward(hidden_states, ids, rows)
    out = torch.full((23, 128), -1, dtype=torch.bfloat16, device=DEVICE)
    address = torch.tensor([out[1:].data_ptr()], dtype=torch.int64, device=DEVICE)
    experts.forward(hidden_states, ids, rows, out=address)
    assert torch.equal(out[1:22].view(torch.int16), wanted.view(torch.int16))
    assert bool((out[[0, 22]] == -1).all())


if DEVICE == "cuda":  # the interpreter multiplies with numpy, whose bits follow the shape of a tile

    @pytest.mark.parametrize("make", [fp8, mxfp4])
    @pytest.mark.parametrize("rows", [1, 3, 40, 700, 4096])
    def test_bits_are_equal_at_every_batch_size_and_tiling(make: Callable[[int, int, int], Made], rows: int) -> None:
        (w13, _), (w2, _) = make(8, 512, 512), make(8, 512, 256)
        experts = QuantizedExperts(w13, w2)
        hidden_states = rows_of(4096, 512)
        ids = torch.rand(4096, 8, generator=torch.Generator().manual_seed(5)).topk(2).indices.to(DEVICE, torch.int32)
        ids = ids.contiguous()
        wanted = experts.forward(hidden_states, ids.view(-1), top_k=2)[: 2 * rows].view(torch.int16)
        for n, hidden in itertools.product((1, 12, 40, 100, 4096), (256, 4096, 8192)):
            tiling = choose_quantized_tiling(n, 8, w13.mxfp4, hidden)
            got = experts.forward(hidden_states[:rows], ids[:rows].reshape(-1), top_k=2, tiling=tiling)
            assert torch.equal(got.view(torch.int16), wanted)


def test_one_launch_where_down_fills_the_multiprocessors() -> None:
    one = [(16, 128, 2048), (64, 128, 2048), (5, 32, 7168), (16, 8, 4096), (160, 8, 7168), (10_000, 128, 2048)]
    got = [choose_quantized_tiling(pairs, experts, False, hidden).one_launch for pairs, experts, hidden in one]
    assert got == [False, True, True, False, True, False]


def test_mxfp4_tilings_follow_the_number_of_programs() -> None:
    cells = [(7, 32, 7168), (16, 8, 4096), (64, 32, 7168), (64, 128, 2048), (512, 128, 2048), (512, 8, 4096)]
    got = [choose_quantized_tiling(pairs, experts, True, hidden) for pairs, experts, hidden in cells]
    assert [tiling.gate_up.block_n for tiling in got] == [32, 64, 64, 64, 64, 64]
    assert [tiling.down.block_k for tiling in got] == [256, 256, 128, 128, 128, 128]
    assert [tiling.one_launch for tiling in got] == [True, False, True, True, True, False]
    assert [tiling.registers for tiling in got] == [None, None, None, None, 80, 168]


def test_arguments_are_checked() -> None:
    (w13, _), (w2, _) = fp8(2, 256, 128), fp8(2, 128, 128)
    with pytest.raises(ValueError, match="belong together"):
        QuantizedExperts(w13, QuantizedWeight(w2.data[:1], w2.scale[:1]))
    with pytest.raises(ValueError, match="belong together"):
        QuantizedExperts(w13, mxfp4(2, 128, 128)[0])
    experts = QuantizedExperts(w13, w2)
    with pytest.raises(ValueError, match="bfloat16"):
        experts.forward(torch.zeros(1, 128, device=DEVICE), ints([0]))
    assert experts.forward(rows_of(1, 128), ints([])).shape == (0, 128)
