"""The kernel for fp8 weights and many rows: who gets it, that it compiles for sm_90 without a GPU, and on a Hopper GPU
its bits."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import triton

from kernels import gluon_fp8_gemm
from kernels.quantized_weight import QuantizedWeight, pack_fp8
from kernels.triton_grouping import TILE_FIELDS, Grouping
from kernels.triton_quantized_ffn import WIDE, QuantizedExperts, choose_quantized_tiling
from kernels.triton_small_tiles import SmallTiling

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.parametrize(("rows", "chosen"), [(32, False), (33, True), (4096, True)])
def test_more_than_32_rows_per_expert_get_it_where_it_can_run(rows: int, chosen: bool) -> None:
    assert (choose_quantized_tiling(3 * rows, 3, False, 2048, wide=True) is WIDE) == chosen
    assert isinstance(choose_quantized_tiling(3 * rows, 3, False, 2048), SmallTiling)


@pytest.mark.parametrize(
    ("changed", "admitted"),
    [({}, True), ({"mxfp4": True}, False), ({"is_cuda": False}, False), ({"capability": (10, 0)}, False),
     ({"interpret": True}, False)],
)  # fmt: skip
def test_where_it_can_run(monkeypatch: pytest.MonkeyPatch, changed: dict, admitted: bool) -> None:
    case = SimpleNamespace(**{"mxfp4": False, "is_cuda": True, "capability": (9, 0), "interpret": False} | changed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case.capability)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", case.interpret)
    data = SimpleNamespace(is_cuda=case.is_cuda, device="cuda:0")
    assert gluon_fp8_gemm.admits(SimpleNamespace(mxfp4=case.mxfp4, data=data)) == admitted


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
from kernels.quantized_weight import pack_fp8
from kernels.triton_quantized_ffn import QuantizedExperts
w13, w2 = (
    pack_fp8(torch.zeros(1, rows, 128).to(torch.float8_e4m3fn), torch.ones(1, rows // 128, 1)) for rows in (256, 128)
)
print(type(QuantizedExperts(w13, w2).choose_tiling(500)).__name__)
"""
    assert run(code) == "SmallTiling\n"


COMPILE = """
import subprocess
import tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from kernels.gluon_fp8_gemm import BOX, HALF, SHARED, WORDS, fp8_kernel as kernel
from kernels.triton_quantized_ffn import WIDE

for GATE_UP, BIAS, LIMIT, OUT_AT in ((True, False, 0.0, False), (True, True, 7.0, False), (False, True, 0.0, True)):
    cut = WIDE.gate_up if GATE_UP else WIDE.down
    types = dict.fromkeys(("x", "bias_ptr", "out_ptr"), "*bf16")
    types |= dict.fromkeys(("index_ptr", "tiles_ptr", "num_tiles_ptr"), "*i32")
    types |= dict.fromkeys(("x_stride", "out_stride", "depth", "columns"), "i32")
    types |= {"scale_ptr": "*fp32", "w_desc": f"tensordesc<i32[{cut.block_n}, 32],{WORDS.value!r}>"}
    if not GATE_UP:
        types |= {"x": f"tensordesc<bf16[{BOX.value}, {HALF.value}],{SHARED.value!r}>", "out_ptr": "*i64"}
    chosen = {"GATE_UP": GATE_UP, "STAGES": cut.stages, "GROUP_M": cut.group_m}
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
        usage, sass = (
            subprocess.run([triton.knobs.nvidia.cuobjdump.path, option, file.name],
                           check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    ptx = compiled.asm["ptx"]
    print(compiled.metadata.shared, "STACK:0 " in usage, "st.global.v4" in ptx, "shfl.sync.bfly" in ptx,
          sass.count("HMUL2"), sass.count("HGMMA"))
"""


def test_it_compiles_without_a_gpu_and_keeps_its_accumulators_in_registers() -> None:
    """Nor does a word travel between threads; it is widened by two multiplications, in two consumers' four loops."""
    lines = run(COMPILE).splitlines()
    assert len(lines) == 3
    for shared, no_stack, wide_stores, shuffles, multiplications, products in (line.split() for line in lines):
        assert int(shared) <= 227 * 1024
        assert (no_stack, wide_stores, shuffles) == ("True", "True", "False")
        assert int(multiplications) == 2 * 4 * 16 * 2  # 16 words of a thread
        assert int(products) == 2 * (4 + 1) * 8  # a tile of 65 to 96 rows has two products


if HOPPER:
    COUNTS = [0, 1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 200, 0, 300]
    SMALL = choose_quantized_tiling(64, 1, False, 2048)

    def normal(*shape: int) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(sum(shape))
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

    def weight(rows: int, depth: int) -> QuantizedWeight:
        """Other experts, other weights; scales that are no powers of two."""
        data = torch.stack([(64 * normal(rows, depth)).roll(n, 0).to(torch.float8_e4m3fn) for n in range(len(COUNTS))])
        scale = (normal(len(COUNTS), rows // 128, depth // 128).float().abs() + 0.1) / 64 * depth**-0.5
        return pack_fp8(data, scale)

    def layer(hidden: int, intermediate: int, biased: bool = False) -> QuantizedExperts:
        biases = normal(len(COUNTS), 2 * intermediate), normal(len(COUNTS), hidden)
        w13, w2 = weight(2 * intermediate, hidden), weight(hidden, intermediate)
        return QuantizedExperts(w13, w2, biases if biased else None, limit=1.5 if biased else 0)

    def pairs() -> torch.Tensor:
        """The expert of each pair, some of them not here, in a random order."""
        ids = torch.cat([torch.full((count,), expert) for expert, count in enumerate(COUNTS)] + [torch.full((50,), -1)])
        return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))].int().cuda()

    def assert_same_bits(experts: QuantizedExperts, hidden_states: torch.Tensor) -> None:
        ids = pairs()
        rows = torch.arange(len(ids), dtype=torch.int32, device="cuda") % len(hidden_states)
        results = []
        for tiling in (SMALL, WIDE):
            out = torch.full((len(ids), experts.hidden), float("nan"), dtype=hidden_states.dtype, device="cuda")
            results.append(experts.forward(hidden_states, ids, rows, out=out, tiling=tiling))
        assert not results[0][ids >= 0].isnan().any()
        assert torch.equal(results[0].view(torch.int16), results[1].view(torch.int16))

    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize(("hidden", "intermediate"), [(128, 128), (640, 384), (2048, 768), (4096, 2048)])
    def test_bits_are_those_of_the_small_tiles(hidden: int, intermediate: int, biased: bool) -> None:
        experts = layer(hidden, intermediate, biased)
        assert experts.choose_tiling(64 * len(COUNTS)) is WIDE
        assert_same_bits(experts, normal(333, hidden))

    def test_rows_that_are_not_aligned() -> None:
        assert_same_bits(layer(640, 384), normal(333, 640 + 8)[:, 1:641])

    def test_results_go_to_an_address() -> None:
        experts, ids = layer(640, 384), pairs()
        x = normal(len(ids), 640)
        expected = experts.forward(x, ids, tiling=SMALL)
        grouping = experts._grouper.group(ids, None, 1, WIDE.block_m)
        activations, out = normal(len(ids), 384), torch.empty_like(expected)
        experts.ffn(x, grouping, activations, torch.tensor([out.data_ptr()], device="cuda"), WIDE)
        assert torch.equal(out[ids >= 0].view(torch.int16), expected[ids >= 0].view(torch.int16))

    def test_a_list_without_tiles_is_not_read() -> None:
        experts = layer(640, 384)
        numbers = torch.zeros(300, dtype=torch.int32, device="cuda")
        tiles = torch.full((300, TILE_FIELDS.value), 0x7F7F7F7F, dtype=torch.int32, device="cuda")
        grouping = Grouping(numbers, numbers, tiles, torch.zeros_like(numbers[:1]), WIDE.block_m)
        activations, out = torch.zeros(300, 384).bfloat16().cuda(), torch.zeros(300, 640).bfloat16().cuda()
        experts.ffn(normal(300, 640), grouping, activations, out, WIDE)
        torch.cuda.synchronize()
        assert not activations.any() and not out.any()
