"""The kernel for some dozens of rows per expert: which loads get it, that it compiles for sm_90 without a GPU, and its
bits on a Hopper GPU."""

from __future__ import annotations

import pytest
import torch

from kernels import gluon_dense_tiles
from kernels.triton_tiling import DENSE_64, DENSE_96, PING_PONG, DenseTiling, choose_tiling
from tests.kernels.compiled import run_compiled
from tests.kernels.hopper import (
    HOPPER,
    assert_a_list_without_tiles_is_not_read,
    assert_results_go_to_an_address,
    assert_same_bits,
    dense_weights,
    layer,
    normal,
)

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
    w13, w2 = dense_weights(monkeypatch, 128, 384, changed)
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
        experts = layer(len(COUNTS), hidden, intermediate, dtype, biased)
        assert isinstance(experts.choose_tiling(64 * len(COUNTS)), DenseTiling)
        assert experts.choose_tiling(256 * len(COUNTS)) is PING_PONG
        assert_same_bits(experts, normal(333, hidden, dtype=dtype), COUNTS, PRESENT, [tiling])

    def test_rows_that_are_not_aligned() -> None:
        experts = layer(len(COUNTS), 640, 384)
        assert_same_bits(experts, normal(333, 640 + 8)[:, 1:641], COUNTS, PRESENT, [DENSE_96])

    @every_tiling
    def test_results_go_to_an_address(tiling: DenseTiling) -> None:
        assert_results_go_to_an_address(layer(len(COUNTS), 640, 384), COUNTS, PRESENT, tiling)

    @every_tiling
    def test_a_list_without_tiles_is_not_read(tiling: DenseTiling) -> None:
        assert_a_list_without_tiles_is_not_read(layer(len(COUNTS), 640, 384), tiling)
