"""What Triton makes of the MXFP4 kernels for sm_90: no value shows it, only the time does. Needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.triton_quantized_gemm import quantized_down_kernel as kernel

runs = int(sys.argv[1])
types = dict.fromkeys(("act_ptr", "out_ptr"), "*bf16")
types |= dict.fromkeys(("bias_ptr", "order_ptr", "tiles_ptr", "num_tiles_ptr"), "*i32")
types |= dict.fromkeys(("out_stride", "hidden", "intermediate"), "i32")
types |= {"w_desc": f"tensordesc<i32[{runs}, 128, 16]>", "scales": f"tensordesc<i32[{runs}, 128]>"}
chosen = {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 128 * runs, "GROUP_M": 8, "MXFP4": True, "ASM": True}
chosen |= {"BIAS": False, "OUT_AT": False}
names = kernel.arg_names
source = ASTSource(
    fn=kernel,
    signature={name: types.get(name, "constexpr") for name in names},
    constexprs={(names.index(name),): value for name, value in chosen.items()},
    attrs={(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if "desc" not in kind},
)
options = {"num_warps": 4, "num_stages": 3}
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"])
"""


@pytest.mark.parametrize("runs", [1, 2])
def test_a_step_waits_for_one_product_and_moves_no_operand_between_threads(runs: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    compiled = subprocess.run(
        [sys.executable, "-c", COMPILE, str(runs)], env=environment, check=True, capture_output=True, text=True
    )
    loop = compiled.stdout.split("scf.for")[1].split("scf.yield")[0]
    assert loop.count("ttng.warp_group_dot ") == 1  # not one for each 16 columns: see `_awaited`
    assert loop.count("ttng.warp_group_dot_wait") == 1
    assert loop.count("ttng.async_tma_copy_global_to_local") == 2  # the scales are staged with the weights
    assert "ttg.convert_layout" not in loop
