"""The ping-pong kernel: which loads get it, that it compiles for sm_90 without a GPU, and its bits on a Hopper GPU."""

from __future__ import annotations

import pytest
import torch

from kernels import gluon_grouped_gemm
from kernels.triton_tiling import PING_PONG, PING_PONG_AHEAD, PING_PONG_WIDE, FFNTiling, choose_tiling
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

LARGE = choose_tiling(8192, 8)


PING_PONGS = (PING_PONG, PING_PONG_AHEAD, PING_PONG_WIDE)


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        (77, PING_PONG),
        (300, PING_PONG),
        (301, PING_PONG_AHEAD),
        (760, PING_PONG_AHEAD),
        (761, PING_PONG_WIDE),
        (9000, PING_PONG_WIDE),
    ],
)
def test_many_rows_per_expert_get_it_where_it_can_run(rows: int, chosen: FFNTiling) -> None:
    for dense in (False, True):
        assert choose_tiling(3 * rows, 3, ping_pong=True, dense=dense) is chosen
    assert choose_tiling(3 * rows, 3) not in PING_PONGS


def test_few_rows_per_expert_do_not_get_it() -> None:
    assert choose_tiling(3 * 76, 3, ping_pong=True) not in PING_PONGS


@pytest.mark.parametrize(
    ("changed", "admitted"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"hidden": 576, "intermediate": 448}, True),
        ({"dtype": torch.float32}, False),
        ({"hidden": 72}, False),
        ({"intermediate": 40}, False),
        ({"is_cuda": False}, False),
        ({"capability": (10, 0)}, False),
        ({"interpret": True}, False),
    ],
)
def test_where_it_can_run(monkeypatch: pytest.MonkeyPatch, changed: dict, admitted: bool) -> None:
    w13, w2 = dense_weights(monkeypatch, 64, 64, changed)
    assert gluon_grouped_gemm.admits(w13, w2) == admitted


def test_rows_are_copied_only_where_cp_async_cannot_move_them() -> None:
    x = torch.arange(320, dtype=torch.bfloat16).view(4, 80)
    assert gluon_grouped_gemm.aligned(x) is x
    for rows in (x[:, 1:65], x[:, :72].contiguous()):
        copy = gluon_grouped_gemm.aligned(rows)
        assert copy is not rows and torch.equal(copy, rows) and copy.is_contiguous()


def test_a_triton_without_gluon() -> None:
    code = """
import sys
sys.modules["triton.experimental.gluon"] = None
import torch
from kernels.triton_expert_ffn import GroupedExperts
experts = GroupedExperts(torch.zeros(8, 128, 64), torch.zeros(8, 64, 64))
print(experts.choose_tiling(2400).gate_up.ping_pong)
"""
    assert run_compiled(code) == "False\n"


COMPILE = """
from kernels.gluon_grouped_gemm import BOX, SHARED, ping_pong_kernel as kernel, weight_box
from kernels.triton_tiling import PING_PONG, PING_PONG_AHEAD, PING_PONG_WIDE
from tests.kernels.compiled import compile_gluon, disassembled

for tiling, GATE_UP, BIAS, LIMIT, OUT_AT in (
    (PING_PONG, True, True, 7.0, False), (PING_PONG_AHEAD, True, False, 0.0, False),
    (PING_PONG, False, True, 0.0, True), (PING_PONG_WIDE, True, False, 0.0, False),
    (PING_PONG_WIDE, False, True, 0.0, True),
):
    cut = tiling.gate_up if GATE_UP else tiling.down
    types = dict.fromkeys(("x", "bias_ptr", "out_ptr"), "*bf16")
    types |= dict.fromkeys(("index_ptr", "tiles_ptr", "num_tiles_ptr"), "*i32")
    types |= dict.fromkeys(("x_stride", "out_stride", "depth", "columns"), "i32")
    types |= {"w_desc": f"tensordesc<bf16[{weight_box(cut.block_n)}, {cut.block_k}],{SHARED.value!r}>"}
    if not GATE_UP:
        types |= {"x": f"tensordesc<bf16[{BOX.value}, {cut.block_k}],{SHARED.value!r}>", "out_ptr": "*i64"}
    chosen = {"BLOCK_M": tiling.block_m, "WIDTH": cut.block_n * (2 if GATE_UP else 1), "STAGES": cut.stages}
    chosen |= {"GATE_UP": GATE_UP, "GROUP_M": cut.group_m, "UNROLL": 2, "AHEAD": cut.ahead}
    chosen |= {"BIAS": BIAS, "LIMIT": LIMIT, "OUT_AT": OUT_AT}
    compiled = compile_gluon(kernel, types, chosen)
    usage = disassembled(compiled, "-res-usage")
    print(compiled.metadata.shared, "STACK:0 " in usage, "st.global.v4" in compiled.asm["ptx"])
"""


def test_it_compiles_without_a_gpu_and_keeps_its_accumulators_in_registers() -> None:
    lines = run_compiled(COMPILE).splitlines()
    assert len(lines) == 5
    for shared, no_stack, wide_stores in (line.split() for line in lines):
        assert int(shared) <= 227 * 1024
        assert (no_stack, wide_stores) == ("True", "True")


if HOPPER:
    COUNTS = [0, 1, 63, 64, 65, 128, 129, 200, 0, 300]

    @pytest.mark.parametrize(
        ("hidden", "intermediate", "dtype", "biased"),
        [
            (64, 64, torch.bfloat16, False),
            (2048, 768, torch.bfloat16, False),
            (7168, 2048, torch.bfloat16, False),
            (2880, 2880, torch.float16, True),
        ],
    )
    def test_bits_are_those_of_the_other_kernel(
        hidden: int, intermediate: int, dtype: torch.dtype, biased: bool
    ) -> None:
        experts = layer(len(COUNTS), hidden, intermediate, dtype, biased)
        assert experts.choose_tiling(256 * len(COUNTS)) is PING_PONG
        assert_same_bits(experts, normal(333, hidden, dtype=dtype), COUNTS, LARGE, PING_PONGS)

    def test_rows_that_are_not_aligned() -> None:
        experts = layer(len(COUNTS), 576, 448)
        assert_same_bits(experts, normal(333, 576 + 8)[:, 1:577], COUNTS, LARGE, PING_PONGS)

    @pytest.mark.parametrize("tiling", [PING_PONG, PING_PONG_WIDE], ids=["64", "128"])
    def test_results_go_to_an_address(tiling: FFNTiling) -> None:
        assert_results_go_to_an_address(layer(len(COUNTS), 576, 448), COUNTS, LARGE, tiling)

    @pytest.mark.parametrize("tiling", [PING_PONG, PING_PONG_WIDE], ids=["64", "128"])
    def test_a_list_without_tiles_is_not_read(tiling: FFNTiling) -> None:
        assert_a_list_without_tiles_is_not_read(layer(len(COUNTS), 576, 448), tiling)
