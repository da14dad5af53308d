"""The kernel for quantised weights and many rows: who gets it, that it compiles for sm_90 without a GPU, and on Hopper
its bits."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from kernels import gluon_quantized_gemm
from kernels.quantized_weight import QuantizedWeight, pack_fp8, pack_mxfp4
from kernels.triton_quantized_ffn import (
    NARROW_FP8_DOWN,
    NARROW_MXFP4_DOWN,
    WIDE_FP8,
    WIDE_MXFP4,
    QuantizedExperts,
    choose_quantized_tiling,
)
from kernels.triton_small_tiles import SmallTiling
from kernels.triton_tiling import FFNTiling
from tests.kernels.compiled import run_compiled
from tests.kernels.hopper import (
    HOPPER,
    assert_a_list_without_tiles_is_not_read,
    assert_results_go_to_an_address,
    assert_same_bits,
    normal,
)


@pytest.mark.parametrize(
    ("mxfp4", "rows", "chosen"),
    [(False, 20, None), (False, 21, WIDE_FP8[64]), (False, 48, WIDE_FP8[64]), (False, 49, WIDE_FP8[128]),
     (False, 96, WIDE_FP8[128]), (False, 97, replace(WIDE_FP8[128], down=NARROW_FP8_DOWN)),
     (True, 10, None), (True, 11, WIDE_MXFP4[32]), (True, 24, WIDE_MXFP4[32]), (True, 25, WIDE_MXFP4[64]),
     (True, 52, WIDE_MXFP4[64]), (True, 53, WIDE_MXFP4[128]), (True, 1024, WIDE_MXFP4[128])],
)  # fmt: skip
def test_many_rows_per_expert_get_it_where_it_can_run(mxfp4: bool, rows: int, chosen: FFNTiling | None) -> None:
    tiling = choose_quantized_tiling(128 * rows, 128, mxfp4, 2048, wide=True)
    assert isinstance(tiling, SmallTiling) if chosen is None else tiling == chosen
    assert isinstance(choose_quantized_tiling(128 * rows, 128, mxfp4, 2048), SmallTiling)


def test_fp8_whose_hidden_size_has_no_blocks_of_256() -> None:
    for rows in (21, 64, 300):
        tiling = choose_quantized_tiling(rows, 1, False, 640, wide=True)
        assert isinstance(tiling, FFNTiling)
        assert tiling.down == NARROW_FP8_DOWN


@pytest.mark.parametrize(("rows", "narrow"), [(64, False), (256, True), (4096, False)])
def test_where_blocks_of_256_would_leave_the_last_round_empty_they_are_narrow(rows: int, narrow: bool) -> None:
    """8 experts, hidden 4096: 128, 320 and 4160 items, for 132 multiprocessors."""
    tiling = choose_quantized_tiling(8 * rows, 8, True, 4096, wide=True)
    assert isinstance(tiling, FFNTiling)
    assert (tiling.down == NARROW_MXFP4_DOWN) == narrow


@pytest.mark.parametrize("mxfp4", [False, True])
@pytest.mark.parametrize(
    ("changed", "admitted"),
    [({}, True), ({"is_cuda": False}, False), ({"capability": (10, 0)}, False), ({"interpret": True}, False),
     ({"hidden": 192}, False), ({"intermediate": 320}, False)],
)  # fmt: skip
def test_where_it_can_run(monkeypatch: pytest.MonkeyPatch, changed: dict, admitted: bool, mxfp4: bool) -> None:
    case = SimpleNamespace(
        **{"is_cuda": True, "capability": (9, 0), "interpret": False, "hidden": 256, "intermediate": 384} | changed
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case.capability)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", case.interpret)

    def weight(rows: int, depth: int) -> SimpleNamespace:
        stored = triton.cdiv(depth, 128) * 128
        return SimpleNamespace(
            mxfp4=mxfp4, shape=(4, rows, stored), data=SimpleNamespace(is_cuda=case.is_cuda, device="cuda:0")
        )

    w13, w2 = weight(2 * case.intermediate, case.hidden), weight(case.hidden, case.intermediate)
    assert gluon_quantized_gemm.admits(w13, w2) == admitted


@pytest.mark.parametrize(("mxfp4", "admitted"), [(False, True), (True, False)])
def test_mxfp4_needs_blocks_of_256(monkeypatch: pytest.MonkeyPatch, mxfp4: bool, admitted: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    data = SimpleNamespace(is_cuda=True, device="cuda:0")
    w13, w2 = (SimpleNamespace(mxfp4=mxfp4, shape=shape, data=data) for shape in ((4, 512, 384), (4, 384, 256)))
    assert gluon_quantized_gemm.admits(w13, w2) == admitted


def test_a_triton_without_gluon() -> None:
    code = """
import sys
sys.modules["triton.experimental.gluon"] = None
import torch
from kernels.quantized_weight import pack_fp8
from kernels.triton_quantized_ffn import QuantizedExperts
w13, w2 = (
    pack_fp8(torch.zeros(1, rows, 128).to(torch.float8_e4m3fn), torch.ones(1, rows // 128, 1)) for rows in (256, 128)
)
print(type(QuantizedExperts(w13, w2).choose_tiling(500)).__name__)
"""
    assert run_compiled(code) == "SmallTiling\n"


COMPILE = """
from kernels.gluon_quantized_gemm import BOX, HALF, SHARED, WORDS, heights, quantized_kernel as kernel
from kernels.triton_quantized_ffn import NARROW_FP8_DOWN, NARROW_MXFP4_DOWN, WIDE_FP8, WIDE_MXFP4
from tests.kernels.compiled import compile_gluon, disassembled

LARGE, FP8 = WIDE_MXFP4[128], WIDE_FP8[128]
for MXFP4, BLOCK_M, cut, GATE_UP, BIAS, LIMIT, OUT_AT in (
    (False, 128, FP8.gate_up, True, False, 0.0, False), (False, 128, FP8.gate_up, True, True, 7.0, False),
    (False, 128, FP8.down, False, True, 0.0, True), (False, 64, WIDE_FP8[64].gate_up, True, False, 0.0, False),
    (False, 128, NARROW_FP8_DOWN, False, False, 0.0, False),
    (True, 128, LARGE.gate_up, True, True, 7.0, False), (True, 128, LARGE.down, False, True, 0.0, True),
    (True, 128, NARROW_MXFP4_DOWN, False, False, 0.0, False),
    (True, 32, WIDE_MXFP4[32].gate_up, True, False, 0.0, False),
):
    types = dict.fromkeys(("x", "bias_ptr", "out_ptr"), "*bf16")
    types |= dict.fromkeys(("index_ptr", "tiles_ptr", "num_tiles_ptr"), "*i32")
    types |= dict.fromkeys(("x_stride", "out_stride", "depth", "columns"), "i32")
    types |= {"scale_ptr": "*i32" if MXFP4 else "*fp32"}
    types |= {"w_desc": f"tensordesc<i32[{cut.block_n // (2 if MXFP4 else 1)}, 32],{WORDS.value!r}>"}
    if not GATE_UP:
        types |= {"x": f"tensordesc<bf16[{BOX.value}, {HALF.value}],{SHARED.value!r}>"}
    if OUT_AT:
        types |= {"out_ptr": "*i64"}
    chosen = {"MXFP4": MXFP4, "GATE_UP": GATE_UP, "BLOCK_M": BLOCK_M, "BLOCK_N": cut.block_n, "STAGES": cut.stages}
    chosen |= {"GROUP_M": cut.group_m, "BIAS": BIAS, "LIMIT": LIMIT, "OUT_AT": OUT_AT}
    compiled = compile_gluon(kernel, types, chosen)
    usage, sass = (disassembled(compiled, option) for option in ("-res-usage", "-sass"))
    ptx = compiled.asm["ptx"]
    blocks = cut.block_n * (2 if GATE_UP else 1) // 128  # of 64 weight rows, of a consumer
    loops = heights(MXFP4, blocks, BLOCK_M)
    words = blocks * (8 * 4 if MXFP4 else 16 * 2)  # of a thread, and multiplications for each
    print(compiled.metadata.shared, int(usage.split("STACK:")[1].split()[0]), "st.global.v4" in ptx,
          "shfl.sync.bfly" in ptx, sass.count("HMUL2") == 2 * len(loops) * words,
          sass.count("HGMMA") == 2 * 8 * blocks * sum(1 + (rest > 0) for _, rest in loops),
          sass.count("WARPGROUP.DEPBAR") == 2 * len(loops) * (1 if MXFP4 else blocks))
"""


def test_it_compiles_without_a_gpu_and_keeps_its_accumulators_in_registers() -> None:
    """Nor does a word travel between threads. Weights are widened once for all rows; a step's products are waited for
    once, fp8's once for each block.

    Some registers of an item are not kept there, of 128 rows by two blocks of fp8 up to 16.
    """
    lines = run_compiled(COMPILE).splitlines()
    assert len(lines) == 9
    for shared, stack, wide_stores, shuffles, *counts in (line.split() for line in lines):
        assert int(shared) <= 227 * 1024
        assert int(stack) <= 64
        assert (wide_stores, shuffles) == ("True", "False")
        assert counts == ["True"] * 3


if HOPPER:
    COUNTS = [0, 1, 15, 16, 17, 31, 32, 33, 48, 49, 63, 64, 65, 80, 81, 95, 96, 97, 127, 128, 129, 200, 0, 300]
    SMALL = choose_quantized_tiling(64, 1, False, 2048)
    TILINGS = {
        "fp8, narrow": (False, replace(WIDE_FP8[128], down=NARROW_FP8_DOWN)),
        "mxfp4, narrow": (True, replace(WIDE_MXFP4[128], down=NARROW_MXFP4_DOWN)),
        **{f"fp8, {block_m} rows": (False, tiling) for block_m, tiling in WIDE_FP8.items()},
        **{f"mxfp4, {block_m} rows": (True, tiling) for block_m, tiling in WIDE_MXFP4.items()},
    }  # fmt: skip
    every_tiling = pytest.mark.parametrize(("mxfp4", "tiling"), TILINGS.values(), ids=TILINGS)

    def fp8_weight(rows: int, depth: int) -> QuantizedWeight:
        """Other experts, other weights; scales that are no powers of two."""
        data = torch.stack([(64 * normal(rows, depth)).roll(n, 0).to(torch.float8_e4m3fn) for n in range(len(COUNTS))])
        scale = (normal(len(COUNTS), rows // 128, depth // 128).float().abs() + 0.1) / 64 * depth**-0.5
        return pack_fp8(data, scale)

    def mxfp4_weight(rows: int, depth: int) -> QuantizedWeight:
        generator = torch.Generator("cuda").manual_seed(rows + depth)
        made: Any = {"generator": generator, "dtype": torch.uint8, "device": "cuda"}
        blocks = torch.randint(0, 256, (len(COUNTS), rows, depth // 2), **made)
        return pack_mxfp4(blocks, torch.randint(117, 123, (len(COUNTS), rows, depth // 32), **made))

    def layer(mxfp4: bool, hidden: int, intermediate: int, biased: bool = False) -> QuantizedExperts:
        biases = normal(len(COUNTS), 2 * intermediate), normal(len(COUNTS), hidden)
        weight = mxfp4_weight if mxfp4 else fp8_weight
        w13, w2 = weight(2 * intermediate, hidden), weight(hidden, intermediate)
        return QuantizedExperts(w13, w2, biases if biased else None, limit=1.5 if biased else 0)

    @every_tiling
    @pytest.mark.parametrize(
        ("hidden", "intermediate", "biased"), [(256, 128, True), (1280, 384, False), (4096, 2048, False)]
    )
    def test_bits_are_those_of_the_small_tiles(
        hidden: int, intermediate: int, biased: bool, mxfp4: bool, tiling: FFNTiling
    ) -> None:
        experts = layer(mxfp4, hidden, intermediate, biased)
        assert isinstance(experts.choose_tiling(64 * len(COUNTS)), FFNTiling)
        assert_same_bits(experts, normal(333, hidden), COUNTS, SMALL, [tiling])

    def test_fp8_needs_no_more_than_128_columns() -> None:
        for tiling in WIDE_FP8.values():
            narrow = replace(tiling, down=NARROW_FP8_DOWN)
            assert_same_bits(layer(False, 640, 128), normal(333, 640), COUNTS, SMALL, [narrow])

    @every_tiling
    def test_rows_that_are_not_aligned(mxfp4: bool, tiling: FFNTiling) -> None:
        experts = layer(mxfp4, 1280, 384)
        assert_same_bits(experts, normal(333, 1280 + 8)[:, 1:1281], COUNTS, SMALL, [tiling])

    @every_tiling
    def test_results_go_to_an_address(mxfp4: bool, tiling: FFNTiling) -> None:
        assert_results_go_to_an_address(layer(mxfp4, 1280, 384), COUNTS, SMALL, tiling)

    @every_tiling
    def test_a_list_without_tiles_is_not_read(mxfp4: bool, tiling: FFNTiling) -> None:
        assert_a_list_without_tiles_is_not_read(layer(mxfp4, 1280, 384), tiling)
