"""The ping-pong kernel: which loads get it, that it compiles for sm_90 without a GPU, and its bits on a Hopper GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton

from kernels import gluon_grouped_gemm
from kernels.triton_expert_ffn import GroupedExperts
from kernels.triton_grouping import TILE_FIELDS, Grouping
from kernels.triton_tiling import PING_PONG, PING_PONG_AHEAD, PING_PONG_WIDE, FFNTiling, choose_tiling
from tests.kernels.compiled import run_compiled

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
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
    case = SimpleNamespace(
        **{"dtype": torch.bfloat16, "hidden": 64, "intermediate": 64, "is_cuda": True, "capability": (9, 0)}
        | {"interpret": False}
        | changed
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case.capability)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", case.interpret)
    common = {"is_cuda": case.is_cuda, "device": "cuda:0", "dtype": case.dtype}
    w13 = SimpleNamespace(shape=(2, 2 * case.intermediate, case.hidden), **common)
    w2 = SimpleNamespace(shape=(2, case.hidden, case.intermediate), **common)
    assert gluon_grouped_gemm.admits(w13, w2) == admitted


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

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(sum(shape))
        return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)

    def layer(hidden: int, intermediate: int, dtype: torch.dtype, biased: bool) -> GroupedExperts:
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

    def assert_same_bits(experts: GroupedExperts, hidden_states: torch.Tensor) -> None:
        ids = pairs()
        rows = torch.arange(len(ids), dtype=torch.int32, device="cuda") % len(hidden_states)
        results = []
        for tiling in (LARGE, *PING_PONGS):
            out = torch.full((len(ids), experts.hidden), float("nan"), dtype=hidden_states.dtype, device="cuda")
            results.append(experts.forward(hidden_states, ids, rows, out=out, tiling=tiling))
        assert not results[0][ids >= 0].isnan().any()
        for result in results[1:]:
            assert torch.equal(results[0].view(torch.int16), result.view(torch.int16))

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
        experts = layer(hidden, intermediate, dtype, biased)
        assert experts.choose_tiling(256 * len(COUNTS)) is PING_PONG
        assert_same_bits(experts, normal(333, hidden, dtype=dtype))

    def test_rows_that_are_not_aligned() -> None:
        experts = layer(576, 448, torch.bfloat16, False)
        assert_same_bits(experts, normal(333, 576 + 8)[:, 1:577])

    @pytest.mark.parametrize("tiling", [PING_PONG, PING_PONG_WIDE], ids=["64", "128"])
    def test_results_go_to_an_address(tiling: FFNTiling) -> None:
        experts, ids = layer(576, 448, torch.bfloat16, False), pairs()
        x = normal(len(ids), 576)
        expected = experts.forward(x, ids, tiling=LARGE)
        grouping = experts._grouper.group(ids, None, 1, tiling.block_m)
        activations, out = normal(len(ids), 448), torch.empty_like(expected)
        address = torch.tensor([out.data_ptr()], device="cuda")
        experts.ffn(x, grouping, activations, address, tiling)
        assert torch.equal(out[ids >= 0].view(torch.int16), expected[ids >= 0].view(torch.int16))

    @pytest.mark.parametrize("tiling", [PING_PONG, PING_PONG_WIDE], ids=["64", "128"])
    def test_a_list_without_tiles_is_not_read(tiling: FFNTiling) -> None:
        experts = layer(576, 448, torch.bfloat16, False)
        numbers = torch.zeros(300, dtype=torch.int32, device="cuda")
        tiles = torch.full((300, TILE_FIELDS.value), 0x7F7F7F7F, dtype=torch.int32, device="cuda")
        grouping = Grouping(numbers, numbers, tiles, torch.zeros_like(numbers[:1]), tiling.block_m)
        activations, out = torch.zeros(300, 448).bfloat16().cuda(), torch.zeros(300, 576).bfloat16().cuda()
        experts.ffn(normal(300, 576), grouping, activations, out, tiling)
        torch.cuda.synchronize()
        assert not activations.any() and not out.any()
