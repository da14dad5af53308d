"""The kernel for some dozens of rows per expert: which loads get it, that it compiles for sm_90 without a GPU, and its
bits on a Hopper GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton

from kernels import gluon_dense_tiles
from kernels.triton_expert_ffn import GroupedExperts
from kernels.triton_grouping import TILE_FIELDS, Grouping
from kernels.triton_tiling import DENSE_64, DENSE_96, PING_PONG, DenseTiling, choose_tiling
from tests.kernels.compiled import run_compiled

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
PRESENT = choose_tiling(64, 1)


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [(20, None), (21, DENSE_64), (48, DENSE_64), (49, DENSE_96), (76, DENSE_96), (77, None), (300, None)],
)
def test_some_dozens_of_rows_per_expert_get_it_where_it_can_run(rows: int, chosen: DenseTiling | None) -> None:
    tiling = choose_tiling(3 * rows, 3, ping_pong=True, dense=True)
    assert tiling is chosen if chosen else not isinstance(tiling, DenseTiling)
    assert not isinstance(choose_tiling(3 * rows, 3, ping_pong=True), DenseTiling)


@pytest.mark.parametrize(
    ("changed", "admitted"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"hidden": 192}, False),
        ({"intermediate": 192}, False),
        ({"is_cuda": False}, False),
        ({"capability": (10, 0)}, False),
        ({"interpret": True}, False),
    ],
)
def test_where_it_can_run(monkeypatch: pytest.MonkeyPatch, changed: dict, admitted: bool) -> None:
    case = SimpleNamespace(
        **{"dtype": torch.bfloat16, "hidden": 128, "intermediate": 384, "is_cuda": True, "capability": (9, 0)}
        | {"interpret": False}
        | changed
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case.capability)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", case.interpret)
    common = {"is_cuda": case.is_cuda, "device": "cuda:0", "dtype": case.dtype}
    w13 = SimpleNamespace(shape=(2, 2 * case.intermediate, case.hidden), **common)
    w2 = SimpleNamespace(shape=(2, case.hidden, case.intermediate), **common)
    assert gluon_dense_tiles.admits(w13, w2) == admitted


COMPILE = """
from kernels.gluon_dense_tiles import BLOCK_K, BOX, HALF, SHARED, UPPER, dense_tiles_kernel as kernel, heights
from kernels.triton_tiling import DENSE_64, DENSE_96
from tests.kernels.compiled import compile_gluon, disassembled

for tiling, GATE_UP, BIAS, LIMIT, OUT_AT in (
    (DENSE_64, True, True, 7.0, False), (DENSE_96, True, False, 0.0, False), (DENSE_96, True, True, 7.0, False),
    (DENSE_64, False, True, 0.0, True), (DENSE_96, False, False, 0.0, False), (DENSE_96, False, True, 0.0, True),
):
    types = dict.fromkeys(("x", "bias_ptr", "out_ptr"), "*bf16")
    types |= dict.fromkeys(("index_ptr", "tiles_ptr", "num_tiles_ptr"), "*i32")
    types |= dict.fromkeys(("x_stride", "out_stride", "depth", "columns"), "i32")
    types |= {"w_desc": f"tensordesc<bf16[{HALF.value}, {BLOCK_K.value}],{SHARED.value!r}>"}
    if not GATE_UP:
        types |= {"x": f"tensordesc<bf16[{BOX.value}, {BLOCK_K.value}],{SHARED.value!r}>"}
    if OUT_AT:
        types |= {"out_ptr": "*i64"}
    lower = tiling.block_m - UPPER.value
    chosen = {"LOWER": lower, "STAGES": tiling.stages, "GATE_UP": GATE_UP, "GROUP_M": tiling.group_m}
    chosen |= {"BIAS": BIAS, "LIMIT": LIMIT, "OUT_AT": OUT_AT}
    compiled = compile_gluon(kernel, types, chosen)
    usage, sass = (disassembled(compiled, option) for option in ("-res-usage", "-sass"))
    ptx, loops = compiled.asm["ptx"], heights(lower)
    print(compiled.metadata.shared, "STACK:0 " in usage, "st.global.v4" in ptx, "shfl.sync.bfly" in ptx,
          sass.count("HGMMA") == 2 * 2 * 4 * sum(1 + (rest > 0) for _, rest in loops),
          sass.count("WARPGROUP.DEPBAR") == 2 * len(loops))
"""


def test_it_compiles_without_a_gpu_and_keeps_its_accumulators_in_registers() -> None:
    """Two blocks of weight rows, four products of 16 columns each, are waited for once."""
    lines = run_compiled(COMPILE).splitlines()
    assert len(lines) == 6
    for shared, no_stack, wide_stores, shuffles, *counts in (line.split() for line in lines):
        assert int(shared) <= 227 * 1024
        assert (no_stack, wide_stores, shuffles) == ("True", "True", "False")
        assert counts == ["True"] * 2


if HOPPER:
    COUNTS = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 79, 80, 81, 95, 96, 97, 111, 127, 128, 129, 200, 0, 300]
    every_tiling = pytest.mark.parametrize("tiling", [DENSE_64, DENSE_96], ids=["tile64", "tile96"])

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(sum(shape))
        return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)

    def layer(
        hidden: int, intermediate: int, dtype: torch.dtype = torch.bfloat16, biased: bool = False
    ) -> GroupedExperts:
        w13 = torch.stack([normal(2 * intermediate, hidden, scale=hidden**-0.5, dtype=dtype)] * len(COUNTS))
        w2 = torch.stack([normal(hidden, intermediate, scale=intermediate**-0.5, dtype=dtype)] * len(COUNTS))
        for expert in range(len(COUNTS)):  # other experts, other weights
            w13[expert] = w13[expert].roll(expert, 0)
            w2[expert] = w2[expert].roll(expert, 0)
        biases = (normal(len(COUNTS), 2 * intermediate, dtype=dtype), normal(len(COUNTS), hidden, dtype=dtype))
        return GroupedExperts(w13, w2, biases if biased else None, limit=1.5 if biased else 0)

    def pairs() -> torch.Tensor:
        """The expert of each pair, some of them not here, in a random order."""
        ids = torch.cat([torch.full((count,), expert) for expert, count in enumerate(COUNTS)] + [torch.full((50,), -1)])
        return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))].int().cuda()

    def assert_same_bits(experts: GroupedExperts, hidden_states: torch.Tensor, dense: DenseTiling) -> None:
        ids = pairs()
        rows = torch.arange(len(ids), dtype=torch.int32, device="cuda") % len(hidden_states)
        results = []
        for tiling in (PRESENT, dense):
            out = torch.full((len(ids), experts.hidden), float("nan"), dtype=hidden_states.dtype, device="cuda")
            results.append(experts.forward(hidden_states, ids, rows, out=out, tiling=tiling))
        assert not results[0][ids >= 0].isnan().any()
        assert torch.equal(results[0].view(torch.int16), results[1].view(torch.int16))

    @every_tiling
    @pytest.mark.parametrize(
        ("hidden", "intermediate", "dtype", "biased"),
        [
            (128, 128, torch.bfloat16, False),
            (2048, 768, torch.bfloat16, False),
            (640, 384, torch.float16, True),
        ],
    )
    def test_bits_are_those_of_the_other_kernel(
        hidden: int, intermediate: int, dtype: torch.dtype, biased: bool, tiling: DenseTiling
    ) -> None:
        experts = layer(hidden, intermediate, dtype, biased)
        assert isinstance(experts.choose_tiling(64 * len(COUNTS)), DenseTiling)
        assert experts.choose_tiling(256 * len(COUNTS)) is PING_PONG
        assert_same_bits(experts, normal(333, hidden, dtype=dtype), tiling)

    def test_rows_that_are_not_aligned() -> None:
        assert_same_bits(layer(640, 384), normal(333, 640 + 8)[:, 1:641], DENSE_96)

    @every_tiling
    def test_results_go_to_an_address(tiling: DenseTiling) -> None:
        experts, ids = layer(640, 384), pairs()
        x = normal(len(ids), 640)
        expected = experts.forward(x, ids, tiling=PRESENT)
        grouping = experts._grouper.group(ids, None, 1, tiling.block_m)
        activations, out = normal(len(ids), 384), torch.empty_like(expected)
        experts.ffn(x, grouping, activations, torch.tensor([out.data_ptr()], device="cuda"), tiling)
        assert torch.equal(out[ids >= 0].view(torch.int16), expected[ids >= 0].view(torch.int16))

    @every_tiling
    def test_a_list_without_tiles_is_not_read(tiling: DenseTiling) -> None:
        experts = layer(640, 384)
        numbers = torch.zeros(300, dtype=torch.int32, device="cuda")
        tiles = torch.full((300, TILE_FIELDS.value), 0x7F7F7F7F, dtype=torch.int32, device="cuda")
        grouping = Grouping(numbers, numbers, tiles, torch.zeros_like(numbers[:1]), tiling.block_m)
        activations, out = torch.zeros(300, 384).bfloat16().cuda(), torch.zeros(300, 640).bfloat16().cuda()
        experts.ffn(normal(300, 640), grouping, activations, out, tiling)
        torch.cuda.synchronize()
        assert not activations.any() and not out.any()
