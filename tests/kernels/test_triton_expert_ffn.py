"""The Triton kernels against their reference: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.triton_combine import combine
from kernels.triton_expert_ffn import GroupedExperts
from kernels.triton_grouping import COUNTER_FIELD, SINGLE_PROGRAM_PAIRS, PairGrouper
from kernels.triton_small_tiles import MAX_PAIRS, Cut, SmallTiling
from kernels.triton_tiling import FFNTiling, Tiling, choose_tiling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A GPU multiplies float32 in tf32. The interpreter truncates to bf16 where a GPU rounds: twice the error, other bits.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
EXACT_DTYPES = DTYPES[:-1] if DEVICE == "cpu" else DTYPES
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1.2e-2 if DEVICE == "cpu" else 6e-3}
SMALL = SmallTiling(16, Cut(64, 32, 2), Cut(64, 32, 2))
TOGETHER = SmallTiling(16, Cut(32, 64, 2), Cut(32, 32, 2), group_m=2)  # gate and up in one operand
APART = SmallTiling(32, Cut(64, 64, 2), Cut(128, 64, 2), group_m=1, one_launch=False)
LARGE = FFNTiling(32, Tiling(32, 32, 4, 2, group_m=2, programs_per_sm=3), Tiling(32, 16, 4, 2, group_m=2))
SWAPPED = FFNTiling(16, Tiling(16, 64, 4, 2, group_m=1), Tiling(64, 32, 4, 2, group_m=1, programs_per_sm=2, swap=True))
TILINGS: dict[str, FFNTiling | SmallTiling] = {
    "small": SMALL,
    "together": TOGETHER,
    "apart": APART,
    "large": LARGE,
    "swapped": SWAPPED,
}


def weights(experts: int, hidden: int, intermediate: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(experts * hidden + intermediate)
    w13 = torch.randn(experts, 2 * intermediate, hidden, generator=generator) * hidden**-0.5
    w2 = torch.randn(experts, hidden, intermediate, generator=generator) * intermediate**-0.5
    return w13.to(DEVICE, dtype), w2.to(DEVICE, dtype)


def rows_of(count: int, hidden: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def poisoned(pairs: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((pairs, hidden), float("nan"), dtype=dtype, device=DEVICE)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def worst_row_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((got.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


@pytest.mark.parametrize("name", TILINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 64), (72, 40), (136, 104)])
def test_off_tile_sizes_and_experts_without_tokens(
    name: str, dtype: torch.dtype, hidden: int, intermediate: int
) -> None:
    w13, w2 = weights(6, hidden, intermediate, dtype)
    hidden_states = rows_of(9, hidden, dtype)
    # expert 2 has 37 pairs (more than one tile), expert 0 and 4 none, pair 3 belongs to another server
    experts = ints([2] * 35 + [1, 3, 5, 2, 2])
    experts[3] = -1
    rows = ints([position % 9 for position in range(40)])
    out = poisoned(40, hidden, dtype)
    result = GroupedExperts(w13, w2).forward(hidden_states, experts, rows, out=out, tiling=TILINGS[name])
    assert result.data_ptr() == out.data_ptr()
    local = experts >= 0
    expected = reference.expert_ffn(hidden_states, w13, w2, experts, rows)
    assert worst_row_error(result[local], expected[local]) < TOLERANCE[dtype]
    assert bool(result[~local].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 256), (136, 104)])
@pytest.mark.parametrize(
    ("ids", "rows", "top_k"),
    [
        ([3], None, 1),
        ([2, -1, 5, 0, -1, 1], None, 3),
        ([-1, 4, 0, 4, 4, 0, -1, 2], [1, 0, 0, 1, 2, 2, 0, 1], 0),
        ([4] * MAX_PAIRS, [position % 3 for position in range(MAX_PAIRS)], 0),
    ],
)
def test_few_pairs_in_one_launch(
    dtype: torch.dtype, hidden: int, intermediate: int, ids: list[int], rows: list[int] | None, top_k: int
) -> None:
    w13, w2 = weights(6, hidden, intermediate, dtype)
    layer = GroupedExperts(w13, w2)
    experts, pairs = ints(ids), len(ids)
    of_pair = [pair // top_k for pair in range(pairs)] if rows is None else rows
    for seed in (1, 2):  # the second call finds the counters as the first one left them
        hidden_states = rows_of(3, hidden, dtype, seed)
        out = poisoned(pairs, hidden, dtype)
        layer.forward(hidden_states, experts, None if rows is None else ints(rows), top_k, out)
        expected = reference.expert_ffn(hidden_states, w13, w2, experts, ints(of_pair))
        local = experts >= 0
        assert worst_row_error(out[local], expected[local]) < TOLERANCE[dtype]
        assert bool(out[~local].isnan().all())
        assert not layer._small_tiles._of_pairs.any()


@pytest.mark.parametrize("name", [*TILINGS, None])
def test_biases_and_the_clamped_activation(name: str | None) -> None:
    dtype = torch.float16
    w13, w2 = weights(3, 72, 40, dtype)
    biases = (rows_of(3, 80, dtype, seed=3), rows_of(3, 72, dtype, seed=4))
    hidden_states = 3 * rows_of(5, 72, dtype)  # so that some values are clamped
    ids = [1] * (20 if name else MAX_PAIRS - 3) + [0, 2, 2]
    experts, rows = ints(ids), ints([position % 5 for position in range(len(ids))])
    layer = GroupedExperts(w13, w2, biases, limit=2.5)
    result = layer.forward(hidden_states, experts, rows, tiling=TILINGS[name] if name else None)
    expected = reference.expert_ffn(hidden_states, w13, w2, experts, rows, biases, limit=2.5)
    assert worst_row_error(result, expected) < TOLERANCE[dtype]
    assert worst_row_error(expected, reference.expert_ffn(hidden_states, w13, w2, experts, rows, biases, 100.0)) > 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_depend_on_nothing_else(dtype: torch.dtype) -> None:
    w13, w2 = weights(3, 64, 48, dtype)
    experts = GroupedExperts(w13, w2)
    hidden_states = rows_of(20, 64, dtype)
    ids = ints([0, 1, 0, 2] + [0] * 16)
    rows = ints(list(range(20)))
    together = experts.forward(hidden_states, ids, rows, tiling=SMALL)
    for pair in (0, 3, 7):
        alone = experts.forward(hidden_states[pair : pair + 1], ids[pair : pair + 1], ints([0]), tiling=SMALL)
        assert torch.equal(bits(alone[0]), bits(together[pair]))


if DEVICE == "cuda":  # the interpreter multiplies with numpy, whose bits follow the shape of a tile

    @pytest.mark.parametrize("rows", [1, 2, 3, 8, 40, 200, 1024, 4096])
    def test_bits_are_equal_at_every_batch_size_and_tiling(rows: int) -> None:
        w13, w2 = weights(8, 512, 256, torch.bfloat16)
        experts = GroupedExperts(w13, w2)
        hidden_states = rows_of(4096, 512, torch.bfloat16)
        scores = torch.rand(4096, 8, generator=torch.Generator().manual_seed(5))
        ids = scores.topk(2).indices.to(DEVICE, torch.int32).contiguous()
        wanted = experts.forward(hidden_states, ids.view(-1), top_k=2)
        part = ids[:rows].reshape(-1)
        tilings = [choose_tiling(pairs, 8) for pairs in (2, 40, 120, 400, 8192)]
        for tiling in [None, *tilings, experts.choose_tiling(2400)]:
            got = experts.forward(hidden_states[:rows], part, top_k=2, tiling=tiling)
            assert torch.equal(bits(got), bits(wanted[: 2 * rows]))


@pytest.mark.parametrize("name", ["small", "together"])
def test_calls_with_one_grouping_find_its_counters_at_zero(name: str) -> None:
    w13, w2 = weights(4, 136, 104, torch.float16)
    layer, tiling = GroupedExperts(w13, w2), TILINGS[name]
    experts, rows = ints([3] * 70 + [0, 1, 1]), ints([position % 9 for position in range(73)])
    grouping = PairGrouper(4, experts.device).group(experts, rows, 0, tiling.block_m)
    for seed in (1, 2):
        hidden_states = rows_of(9, 136, torch.float16, seed)
        activations, out = poisoned(73, 104, torch.float16), poisoned(73, 136, torch.float16)
        layer.ffn(hidden_states, grouping, activations, out, tiling)
        expected = reference.expert_ffn(hidden_states, w13, w2, experts, rows)
        assert worst_row_error(out, expected) < TOLERANCE[torch.float16]
        assert not grouping.tiles[: int(grouping.num_tiles), COUNTER_FIELD.value].any()


@pytest.mark.parametrize("pairs", [1, 7, 300, SINGLE_PROGRAM_PAIRS + 5])
def test_grouping_places_every_local_pair_once(pairs: int) -> None:
    generator = torch.Generator().manual_seed(pairs)
    experts = torch.randint(-1, 5, (pairs,), generator=generator, dtype=torch.int32).to(DEVICE)
    rows = torch.randint(0, 99, (pairs,), generator=generator, dtype=torch.int32).to(DEVICE)
    grouper = PairGrouper(5, experts.device)
    for _ in range(2):  # the second call finds the counters as the first one left them
        grouping = grouper.group(experts, rows, 0, block_m=16)
        seen = []
        for expert, start, count, first, tiles, end, counter, _ in grouping.tiles[: int(grouping.num_tiles)].tolist():
            assert 0 < count <= 16
            assert counter == 0
            assert start + count == min(end, start + 16)
            members = grouping.order[start : start + count]
            assert bool((experts[members.long()] == expert).all())
            assert torch.equal(grouping.rows[start : start + count], rows[members.long()])
            assert tiles == -(-int((experts == expert).sum()) // 16)
            assert end == grouping.tiles[first, 1] + (experts == expert).sum()
            assert grouping.tiles[first, 0] == expert
            assert first == 0 or grouping.tiles[first - 1, 0] < expert
            seen += members.tolist()
        assert sorted(seen) == (experts >= 0).nonzero().view(-1).tolist()


def test_nothing_to_do() -> None:
    w13, w2 = weights(2, 64, 32, torch.float32)
    experts = GroupedExperts(w13, w2)
    assert experts.forward(rows_of(3, 64, torch.float32), ints([]), ints([])).shape == (0, 64)
    out = poisoned(3, 64, torch.float32)
    experts.forward(rows_of(3, 64, torch.float32), ints([-1, -1, -1]), ints([0, 1, 2]), out=out, tiling=SMALL)
    assert bool(out.isnan().all())


@pytest.mark.parametrize("dtype", EXACT_DTYPES)
def test_combine_multiplies_and_adds_in_top_k_order(dtype: torch.dtype) -> None:
    pair_rows = rows_of(5 * 3, 1100, dtype)
    topk_weights = torch.rand(5, 3, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    assert torch.equal(bits(combine(pair_rows, topk_weights)), bits(reference.combine(pair_rows, topk_weights)))
    experts = ints([0, -1, 2] * 5)
    pair_rows[experts < 0] = float("nan")
    got = combine(pair_rows, topk_weights, experts)
    assert torch.equal(bits(got), bits(reference.combine(pair_rows, topk_weights, experts)))


def test_arguments_are_checked() -> None:
    w13, w2 = weights(2, 64, 32, torch.float32)
    with pytest.raises(ValueError, match="belong together"):
        GroupedExperts(w13, w2[:, :, :16])
    with pytest.raises(ValueError, match="contiguous"):
        GroupedExperts(w13, w2.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match="a bias"):
        GroupedExperts(w13, w2, (w13[:, :, 0].contiguous(), w2[0]))
    with pytest.raises(ValueError, match="multiples of 8"):
        GroupedExperts(w13[:, :, :60].contiguous(), w2[:, :60].contiguous())
    experts = GroupedExperts(w13, w2)
    with pytest.raises(ValueError, match="int32"):
        experts.forward(rows_of(2, 64, torch.float32), torch.tensor([0, 1], device=DEVICE))
    with pytest.raises(ValueError, match="float32"):
        experts.forward(rows_of(2, 64, torch.bfloat16), ints([0, 1]))
    with pytest.raises(ValueError, match="contiguous rows"):
        experts.forward(rows_of(2, 32, torch.float32), ints([0, 1]))


@pytest.mark.parametrize("ping_pong", [False, True])
@pytest.mark.parametrize("experts", [8, 32, 128])
def test_every_load_has_a_tiling(experts: int, ping_pong: bool) -> None:
    loads = (1, 8, 9, 64, 1000, 4000, 10_000, 1_000_000)
    heights = [choose_tiling(pairs, experts, ping_pong).block_m for pairs in loads]
    assert heights == sorted(heights)
