"""Triton kernels compiled for Hopper without a GPU, in a process of its own: in the tests' own they are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget


def run_compiled(code: str, *arguments: str) -> str:
    """What Python code that may call `compile_gluon` prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, check=True, capture_output=True, text=True
    ).stdout


def compile_gluon(kernel: Any, types: dict[str, str], chosen: dict[str, Any], **options: int) -> Any:
    """`types`: those of all arguments but the constants `chosen`; pointers and numbers are multiples of 16."""
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    source = GluonASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in chosen.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if "desc" not in kind},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, **options})


def disassembled(compiled: Any, option: str) -> str:
    """What `cuobjdump` says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
