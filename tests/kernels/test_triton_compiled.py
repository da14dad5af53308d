"""What Triton makes of the MXFP4 kernels for sm_90: no value shows it, only the time does. Needs no GPU."""

from __future__ import annotations

import pytest

from tests.kernels.compiled import run_compiled

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.triton_small_tiles import small_tiles_kernel as kernel

runs = int(sys.argv[1])
types = dict.fromkeys(("x_ptr", "act_ptr", "out_ptr"), "*bf16")
lists = "bias13_ptr", "bias2_ptr", "experts_ptr", "rows_ptr", "order_ptr", "tiles_ptr", "num_tiles_ptr"
types |= dict.fromkeys(lists, "*i32")
types |= dict.fromkeys(("x_stride", "out_stride", "pairs", "top_k"), "i32")
types |= {"w13_desc": "tensordesc<i32[2, 64, 16]>", "scales13": "tensordesc<i32[2, 64]>"}
types |= {"w2_desc": f"tensordesc<i32[{runs}, 128, 16]>", "scales2": f"tensordesc<i32[{runs}, 128]>"}
chosen = {"HIDDEN": 2048, "INTERMEDIATE": 768, "KIND": "mxfp4", "LISTED": True, "DOWN": True}
chosen |= {"BLOCK_M": 16, "GROUP_M": 8, "GATE_UP_N": 64, "GATE_UP_K": 128, "GATE_UP_STAGES": 3}
chosen |= {"DOWN_N": 128, "DOWN_K": 128 * runs, "DOWN_STAGES": 3}
chosen |= {"GATE_UP": sys.argv[2] == "one", "BIAS": False, "LIMIT": 0.0, "OUT_AT": False, "ASM": True}
names = kernel.arg_names
unaligned = "pairs", "top_k"
source = ASTSource(
    fn=kernel,
    signature={name: types.get(name, "constexpr") for name in names},
    constexprs={(names.index(name),): value for name, value in chosen.items()},
    attrs={
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if "desc" not in kind and name not in unaligned
    },
)
options = {"num_warps": 4}
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"])
"""


@pytest.mark.parametrize("launches", ["one", "two"])
@pytest.mark.parametrize("runs", [1, 2])
def test_a_step_waits_for_one_product_and_moves_no_operand_between_threads(runs: int, launches: str) -> None:
    compiled = run_compiled(COMPILE, str(runs), launches)
    loops = [part.split("scf.yield")[0] for part in compiled.split("scf.for")[1:]]
    assert len(loops) == (2 if launches == "one" else 1)
    for loop in loops:
        assert loop.count("ttng.warp_group_dot ") == 1  # not one for each 16 columns: see `_awaited`
        assert loop.count("ttng.warp_group_dot_wait") == 1
        assert loop.count("ttng.async_tma_copy_global_to_local") == 2  # the scales are staged with the weights
        assert "ttg.convert_layout" not in loop
    # the rows that are waited for are staged too: nothing that the wait is may end the pipeline
    assert ("ld.acquire.gpu" in loops[-1]) == (launches == "one")
    assert loops[-1].count("ttg.async_copy_global_to_local") == 1
