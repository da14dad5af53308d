"""The ping-pong kernel: who gets it, that it compiles for sm_90 without a GPU, and on a Hopper GPU its bits."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import triton

from kernels import gluon_grouped_gemm
from kernels.triton_expert_ffn import GroupedExperts
from kernels.triton_grouping import TILE_FIELDS, Grouping
from kernels.triton_tiling import PING_PONG, choose_tiling

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
LARGE = choose_tiling(8192, 8)


@pytest.mark.parametrize(("pairs", "chosen"), [(90, False), (91, True), (1100, True), (1101, False)])
def test_a_few_hundred_rows_per_expert_get_it_where_it_can_run(pairs: int, chosen: bool) -> None:
    assert (choose_tiling(3 * pairs, 3, ping_pong=True) is PING_PONG) == chosen
    assert choose_tiling(3 * pairs, 3) is not PING_PONG


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


def run(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_a_triton_without_gluon() -> None:
    code = """
import sys
sys.modules["triton.experimental.gluon"] = None
import torch
from kernels.triton_expert_ffn import GroupedExperts
experts = GroupedExperts(torch.zeros(8, 128, 64), torch.zeros(8, 64, 64))
print(experts.choose_tiling(2400).gate_up.ping_pong)
"""
    assert run(code) == "False\n"


COMPILE = """
import subprocess
import tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from kernels.gluon_grouped_gemm import SHARED, ping_pong_kernel as kernel, store_layout
from kernels.triton_tiling import PING_PONG

for GATE_UP, BIAS, LIMIT, OUT_AT in ((True, False, 0.0, False), (True, True, 7.0, False), (False, True, 0.0, True)):
    cut = PING_PONG.gate_up if GATE_UP else PING_PONG.down
    types = dict.fromkeys(("x", "bias_ptr", "out_ptr"), "*bf16")
    types |= dict.fromkeys(("index_ptr", "tiles_ptr", "num_tiles_ptr"), "*i32")
    types |= dict.fromkeys(("x_stride", "out_stride", "depth", "columns"), "i32")
    types |= {"w_desc": f"tensordesc<bf16[{cut.block_n}, {cut.block_k}],{SHARED.value!r}>"}
    if not GATE_UP:
        types |= {"x": f"tensordesc<bf16[{PING_PONG.block_m}, {cut.block_k}],{SHARED.value!r}>", "out_ptr": "*i64"}
    chosen = {"GATE_UP": GATE_UP, "STAGES": cut.stages, "GROUP_M": cut.group_m, "STORE": store_layout(cut.block_n)}
    chosen |= {"BIAS": BIAS, "LIMIT": LIMIT, "OUT_AT": OUT_AT}
    names = kernel.arg_names
    source = GluonASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in chosen.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if "desc" not in kind},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(compiled.metadata.shared, "STACK:0 " in usage, "st.global.v4" in compiled.asm["ptx"])
"""


def test_it_compiles_without_a_gpu_and_keeps_its_accumulators_in_registers() -> None:
    lines = run(COMPILE).splitlines()
    assert len(lines) == 3
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
        for tiling in (LARGE, PING_PONG):
            out = torch.full((len(ids), experts.hidden), float("nan"), dtype=hidden_states.dtype, device="cuda")
            results.append(experts.forward(hidden_states, ids, rows, out=out, tiling=tiling))
        assert not results[0][ids >= 0].isnan().any()
        assert torch.equal(results[0].view(torch.int16), results[1].view(torch.int16))

    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        ("hidden", "intermediate"), [(64, 64), (576, 448), (2048, 768), (4096, 14336), (7168, 2048), (2880, 2880)]
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

    def test_results_go_to_an_address() -> None:
        experts, ids = layer(576, 448, torch.bfloat16, False), pairs()
        x = normal(len(ids), 576)
        expected = experts.forward(x, ids, tiling=LARGE)
        grouping = experts._grouper.group(ids, None, 1, PING_PONG.block_m)
        activations, out = normal(len(ids), 448), torch.empty_like(expected)
        address = torch.tensor([out.data_ptr()], device="cuda")
        experts.ffn(x, grouping, activations, address, PING_PONG)
        assert torch.equal(out[ids >= 0].view(torch.int16), expected[ids >= 0].view(torch.int16))

    def test_a_list_without_tiles_is_not_read() -> None:
        experts = layer(576, 448, torch.bfloat16, False)
        numbers = torch.zeros(300, dtype=torch.int32, device="cuda")
        tiles = torch.full((300, TILE_FIELDS.value), 0x7F7F7F7F, dtype=torch.int32, device="cuda")
        grouping = Grouping(numbers, numbers, tiles, torch.zeros_like(numbers[:1]), PING_PONG.block_m)
        activations, out = torch.zeros(300, 448).bfloat16().cuda(), torch.zeros(300, 576).bfloat16().cuda()
        experts.ffn(normal(300, 576), grouping, activations, out, PING_PONG)
        torch.cuda.synchronize()
        assert not activations.any() and not out.any()
