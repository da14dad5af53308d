"""The kernel for MXFP4 weights and few rows: who gets it, that it compiles for sm_90 without a GPU, and on a Hopper GPU
its bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import triton

from kernels import gluon_mxfp4_tiles
from kernels.quantized_weight import pack_mxfp4
from kernels.triton_grouping import COUNTER_FIELD, PairGrouper
from kernels.triton_quantized_ffn import QuantizedExperts, choose_quantized_tiling
from kernels.triton_small_tiles import Cut, SmallTiling
from kernels.triton_tiling import RingTiling
from tests.kernels.compiled import run_compiled

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
TILINGS = [RingTiling(8, 2, 64, True), RingTiling(16, 2, 64, True), RingTiling(8, 3, 80, False)]


def test_who_gets_it() -> None:
    """qwen 8 rows, dsv3 8, 64 and 256, mixtral 8; not qwen 1, 64 and 256, mixtral 1 and 64, dsv3 384, nor fp8."""
    cells = [(64, 128, 2048), (7, 32, 7168), (62, 32, 7168), (265, 32, 7168), (16, 8, 4096)]
    got = [choose_quantized_tiling(pairs, experts, True, hidden, ring=True) for pairs, experts, hidden in cells]
    deep = RingTiling(8, 3, 80, True)
    assert got == [TILINGS[0], deep, TILINGS[0], TILINGS[1], TILINGS[2]]
    cells = [(8, 128, 2048), (512, 128, 2048), (2048, 128, 2048), (2, 8, 4096), (128, 8, 4096), (384, 32, 7168)]
    got = [choose_quantized_tiling(pairs, experts, True, hidden, ring=True) for pairs, experts, hidden in cells]
    got += [choose_quantized_tiling(64, 128, False, 2048, ring=True), choose_quantized_tiling(64, 128, True, 2048)]
    assert all(isinstance(tiling, SmallTiling) for tiling in got)


@pytest.mark.parametrize(
    ("changed", "admitted"),
    [({}, True), ({"mxfp4": False}, False), ({"is_cuda": False}, False), ({"capability": (10, 0)}, False),
     ({"interpret": True}, False), ({"hidden": 384}, False), ({"intermediate": 384}, False), ({"stored": 768}, False)],
)  # fmt: skip
def test_where_it_can_run(monkeypatch: pytest.MonkeyPatch, changed: dict, admitted: bool) -> None:
    case = SimpleNamespace(
        **{"mxfp4": True, "is_cuda": True, "capability": (9, 0), "interpret": False, "hidden": 512, "intermediate": 256}
        | changed
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case.capability)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", case.interpret)
    data = SimpleNamespace(is_cuda=case.is_cuda, device="cuda:0")
    stored = getattr(case, "stored", case.hidden)
    w13 = SimpleNamespace(mxfp4=case.mxfp4, data=data, shape=(1, 2 * case.intermediate, stored))
    w2 = SimpleNamespace(shape=(1, case.hidden, case.intermediate))
    assert gluon_mxfp4_tiles.admits(w13, w2) == admitted


COMPILE = """
from kernels.gluon_mxfp4_tiles import WORDS, mxfp4_kernel as kernel
from tests.kernels.compiled import compile_gluon, disassembled

for BLOCK_M, STAGES, registers, BIAS in ((8, 2, 64, False), (16, 2, 64, True), (8, 3, 80, True)):
    types = dict.fromkeys(("x_ptr", "bias13_ptr", "bias2_ptr", "act_ptr", "out_ptr"), "*bf16")
    types |= dict.fromkeys(("rows_ptr", "order_ptr", "tiles_ptr", "num_tiles_ptr", "scales13", "scales2"), "*i32")
    types |= dict.fromkeys(("x_stride", "out_stride"), "i32")
    types |= {f"{w}_desc": f"tensordesc<i32[{rows}, 16],{WORDS.value!r}>" for w, rows in (("w13", 64), ("w2", 128))}
    chosen = {"HIDDEN": 2048, "INTERMEDIATE": 768, "GATE_UP": True, "DOWN": True, "BLOCK_M": BLOCK_M}
    chosen |= {"STAGES": STAGES, "GROUP_M": 8, "BIAS": BIAS, "LIMIT": 7.0 if BIAS else 0.0, "OUT_AT": False}
    compiled = compile_gluon(kernel, types, chosen, maxnreg=registers)
    usage, sass = (disassembled(compiled, option) for option in ("-res-usage", "-sass"))
    programs = 65536 // (256 * registers)
    print((compiled.metadata.shared + 1024) * programs <= 228 * 1024, "STACK:0 " in usage,
          "shfl.sync.bfly" in compiled.asm["ptx"], sass.count("HMUL2") // (BLOCK_M // 8), sass.count("HMMA"))
"""


def test_it_compiles_without_a_gpu_and_its_programs_fit_a_multiprocessor() -> None:
    """Nor is anything spilt, nor does a word travel between threads; a step's 256 weights of a thread take 128
    multiplications in each loop, two loops for each height."""
    lines = run_compiled(COMPILE).splitlines()
    assert [line.split()[:4] for line in lines] == [["True", "True", "False", "256"]] * 3
    assert [int(line.split()[4]) for line in lines] == [64, 64 + 128, 64]


if HOPPER:
    COUNTS = [0, 1, 7, 8, 9, 15, 16, 17, 24, 0, 33]
    SMALL = SmallTiling(16, Cut(64, 128, 3), Cut(128, 128, 3), one_launch=False)

    @pytest.mark.parametrize("clamped", [False, True])
    def test_the_bits_are_those_of_the_small_tiles(clamped: bool) -> None:
        """Twice on the same tiles, whose counters are then zero; with biases, the clamp, and to an address."""
        hidden, intermediate, pairs = 512, 768, sum(COUNTS)
        generator = torch.Generator().manual_seed(3)
        w13, w2 = (
            pack_mxfp4(
                torch.randint(0, 256, (len(COUNTS), rows, depth // 2), generator=generator, dtype=torch.uint8).cuda(),
                torch.randint(
                    116, 122, (len(COUNTS), rows, depth // 32), generator=generator, dtype=torch.uint8
                ).cuda(),
            )
            for rows, depth in ((2 * intermediate, hidden), (hidden, intermediate))
        )
        biases = tuple(torch.randn(len(COUNTS), n, generator=generator).cuda() for n in (2 * intermediate, hidden))
        experts = QuantizedExperts(w13, w2, biases, limit=2.5) if clamped else QuantizedExperts(w13, w2)
        x = torch.randn(40, hidden, generator=generator).bfloat16().cuda()
        in_order = torch.arange(len(COUNTS), dtype=torch.int32).repeat_interleave(torch.tensor(COUNTS))
        in_order = torch.cat([in_order, in_order.new_tensor([-1])])
        ids = in_order[torch.randperm(pairs + 1, generator=generator)].cuda()
        rows = torch.randint(0, 40, (pairs + 1,), generator=generator, dtype=torch.int32).cuda()
        wanted = torch.full((pairs + 1, hidden), -1.0, dtype=torch.bfloat16, device="cuda")
        experts.forward(x, ids, rows, out=wanted, tiling=SMALL)
        for tiling in TILINGS[1:2] if clamped else TILINGS:
            grouping = PairGrouper(len(COUNTS), x.device).group(ids, rows, 1, tiling.block_m)
            activations = torch.empty(pairs + 1, intermediate, dtype=torch.bfloat16, device="cuda")
            out = torch.full_like(wanted, -1.0)
            target = torch.tensor([out.data_ptr()], dtype=torch.int64, device="cuda") if clamped else out
            for _ in range(2):
                out.fill_(-1.0)
                experts.ffn(x, grouping, activations, target, tiling)
                assert torch.equal(out.view(torch.int16), wanted.view(torch.int16)), tiling
                assert not grouping.tiles[: int(grouping.num_tiles), COUNTER_FIELD.value].any()
