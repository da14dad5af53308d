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
from kernels.triton_quantized_ffn import RING, RING_ONE_WAVE, QuantizedExperts, choose_quantized_tiling
from kernels.triton_small_tiles import Cut, SmallTiling
from kernels.triton_tiling import RingTiling
from tests.kernels.compiled import run_compiled

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
TILINGS = [*(tiling for _, tiling in RING), RING_ONE_WAVE]


def test_who_gets_it() -> None:
    """qwen 8 to 384 rows, dsv3 8 to 512, mixtral 8 and 16; not qwen 1 and 512, mixtral 1, 32 and 64, nor fp8."""
    cells = [(64, 128, 2048), (384, 128, 2048), (62, 32, 7168), (16, 8, 4096), (32, 8, 4096), (512, 128, 2048)]
    cells += [(265, 32, 7168), (2048, 128, 2048), (512, 32, 7168), (3072, 128, 2048)]
    got = [_choose(*cell) for cell in cells]
    assert got == [TILINGS[i] for i in (0, 0, 0, 0, 0, 1, 2, 2, 2, 3)]
    assert _choose(7, 32, 7168) == RING_ONE_WAVE
    cells = [(8, 128, 2048), (4096, 128, 2048), (2, 8, 4096), (64, 8, 4096), (128, 8, 4096)]
    got = [_choose(*cell) for cell in cells]
    got += [choose_quantized_tiling(64, 128, False, 2048, ring=True), choose_quantized_tiling(64, 128, True, 2048)]
    assert not any(isinstance(tiling, RingTiling) for tiling in got)


def _choose(pairs: int, experts: int, hidden: int) -> object:
    return choose_quantized_tiling(pairs, experts, True, hidden, wide=True, ring=True)


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
from kernels.triton_quantized_ffn import RING, RING_ONE_WAVE
from tests.kernels.compiled import compile_gluon, disassembled

for BIAS, tiling in enumerate((RING_ONE_WAVE, *(tiling for _, tiling in RING))):
    types = dict.fromkeys(("x_ptr", "bias13_ptr", "bias2_ptr", "act_ptr", "out_ptr"), "*bf16")
    pointers = ("rows_ptr", "order_ptr", "tiles_ptr", "num_tiles_ptr", "claims_ptr", "scales13", "scales2")
    types |= dict.fromkeys(pointers, "*i32") | dict.fromkeys(("x_stride", "out_stride", "sms"), "i32")
    boxes = {"w13": tiling.block // 2, "w2": tiling.block}
    types |= {f"{w}_desc": f"tensordesc<i32[{rows}, 16],{WORDS.value!r}>" for w, rows in boxes.items()}
    chosen = {"HIDDEN": 2048, "INTERMEDIATE": 768, "BLOCK": tiling.block, "HEIGHTS": tiling.block_m // 8}
    chosen |= {"STAGES": tiling.stages, "GROUP_M": 8, "BIAS": bool(BIAS), "LIMIT": 7.0 * BIAS, "OUT_AT": False}
    compiled = compile_gluon(kernel, types, chosen, maxnreg=tiling.registers)
    usage, sass = (disassembled(compiled, option) for option in ("-res-usage", "-sass"))
    spilt = int(usage.split("STACK:")[1].split()[0])
    print((compiled.metadata.shared + 1024) * tiling.programs <= 228 * 1024, spilt <= 24, sass.count("HMUL2"),
          sass.count("HMMA"))
"""


def test_it_compiles_without_a_gpu_and_its_programs_fit_a_multiprocessor() -> None:
    """Nor are more than six words of a thread spilt. For each height there are two loops, in each of whose steps a
    thread multiplies 128 weights by scales, two at a time, and takes part in 16 products for each 8 rows."""
    lines = [line.split() for line in run_compiled(COMPILE).splitlines()]
    assert [line[:2] for line in lines] == [["True", "True"]] * 5
    heights = [1, 1, 2, 3, 4]
    assert [int(line[2]) for line in lines] == [128 * height for height in heights]
    assert [int(line[3]) for line in lines] == [2 * 16 * sum(range(height + 1)) for height in heights]


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
                assert not experts._claims.any()
