"""Adapters to vLLM's and SGLang's fused MoE kernels: their own Triton source and host functions.

Neither package is imported (each needs an installation of its own): the named functions are cut out of the file that
--peers points to, with the tile choices they ship beside it.
"""

from __future__ import annotations

import ast
import glob
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from bench.kernel_cases import DEVICE, Case
from bench.kernel_peers import Absent, Run, interleaved, poisoned, silu_mul


def extract(path: Path, names: Sequence[str], preamble: str) -> Any:
    """A module made of the named functions of a source file, without the imports that it could not resolve here."""
    source = path.read_text()
    parts = [preamble]
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            parts.append("\n".join(source.splitlines()[first - 1 : node.end_lineno]))
    target = Path(tempfile.mkdtemp()) / f"extracted_{path.stem}.py"  # Triton reads a kernel's source from its file
    target.write_text("\n\n\n".join(parts))
    spec = importlib.util.spec_from_file_location(target.stem, target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_PREAMBLE = """
import functools
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, Dict, List, Optional
import torch, triton, triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
envs = SimpleNamespace(VLLM_BATCH_INVARIANT=False)
current_platform = SimpleNamespace(is_rocm=lambda: False)
padding_size, _B_DESC_CACHE, _B_DESC_CACHE_MAX, _TMA_ALLOCATOR_SET = 0, OrderedDict(), 64, False
is_arch_support_pdl = lambda: True
_use_low_smem_fp8_default = lambda: False
_is_hip = False
get_exec = lambda: SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=False))
"""


class FusedMoe:
    """What vLLM's and SGLang's Triton kernels share: alignment of pairs to blocks and the tile choices they ship."""

    suffix = ""  # of the names of tile choices, where weights are quantised

    def __init__(self, directory: Path | None, name: str, source: str, functions: Sequence[str]) -> None:
        root = (directory or Path("/nonexistent")) / name
        if not (root / source).exists():
            raise Absent(f"no {name}/{source} under --peers")
        self.root = root
        self.module = extract(root / source, functions, _PREAMBLE)
        self.align_op = self._load_ops(directory)

    @staticmethod
    def _load_ops(directory: Path | None) -> Any:
        library = (directory or Path("/nonexistent")) / "_moe_C.abi3.so"
        if not library.exists():
            return None
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return None
        return torch.ops._moe_C

    def tile_choices(self, case: Case, default: dict[str, Any]) -> list[dict[str, Any]]:
        """The shipped choice for this shape and card, else the default and those shipped for Qwen's at like loads."""
        card = torch.cuda.get_device_name().replace(" ", "_")
        shape, rows = case.shape, case.hidden.shape[0]
        exact = self._shipped(shape.local, shape.intermediate, card)
        if exact:
            return [exact[min(exact, key=lambda key: abs(key - rows))]]
        choices = [default]
        for key, choice in self._near_load(case, card):
            if choice not in choices and key is not None:
                choices.append(choice)
        return choices

    def _near_load(self, case: Case, card: str) -> list[tuple[int, dict[str, Any]]]:
        like = self._shipped(128, 768, card) or self._shipped(128, 768, "NVIDIA_H200")
        touched = max(sum(1 for count in case.counts if count), 1)
        load = case.pairs / touched * 128 / 8 if case.pairs > touched else 1
        keys = sorted(like, key=lambda key: abs(key - load))[:2]
        return [(key, like[key]) for key in keys]

    def _shipped(self, experts: int, intermediate: int, card: str) -> dict[int, dict[str, Any]]:
        name = glob.escape(f"E={experts},N={intermediate},device_name={card}{self.suffix}.json")
        files = sorted(self.root.glob(f"configs/**/{name}"))
        if not files:
            return {}
        table = json.loads(files[-1].read_text())
        return {int(key): value for key, value in table.items() if key.isdigit()}

    def align(self, case: Case, block_m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """sorted_token_ids, expert_ids, num_tokens_post_padded, made on the host: not part of the core."""
        order, slots, sentinel = case.order.cpu(), case.slots.cpu(), case.ids.numel()
        blocks, experts, done = [], [], 0
        for expert, count in enumerate(case.counts):
            if count:
                padded = -(-count // block_m) * block_m
                block = torch.full((padded,), sentinel, dtype=torch.int32)
                block[:count] = slots[order[done : done + count]].to(torch.int32)
                blocks.append(block)
                experts += [expert] * (padded // block_m)
            done += count
        ids = torch.cat(blocks)
        total = torch.tensor([ids.numel()], dtype=torch.int32)
        return ids.to(DEVICE), torch.tensor(experts, dtype=torch.int32, device=DEVICE), total.to(DEVICE)

    def align_on_device(self, case: Case, block_m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same by vLLM's own operator, as the full path needs it."""
        local, pairs = case.shape.local, case.ids.numel()
        size = pairs + local * (block_m - 1)
        size = min(pairs * block_m, size) if pairs < local else size
        ids = torch.empty(size, dtype=torch.int32, device=DEVICE)
        experts = torch.empty(triton.cdiv(size, block_m), dtype=torch.int32, device=DEVICE)
        total = torch.empty(1, dtype=torch.int32, device=DEVICE)
        self.align_op.moe_align_block_size(case.ids, local, block_m, ids, experts, total, None)
        return ids, experts, total


class VLLM(FusedMoe):
    """vLLM's fused_moe Triton kernel."""

    dtype: str | None = None
    block_shape: tuple[int, int] | None = None

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor, directory: Path | None) -> None:
        names = ("write_zeros_to_output", "fused_moe_kernel", "invoke_fused_moe_triton_kernel", "get_default_config")
        super().__init__(directory, "vllm", "fused_moe.py", names)
        self.w13, self.w2 = w13, w2
        self.scales: tuple[torch.Tensor | None, torch.Tensor | None] = None, None

    def rows_in(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of hidden states as the first product takes them, and their scales."""
        return x, None

    def activate(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gate and up to what the second product takes."""
        act = torch.empty(both.shape[0], both.shape[1] // 2, dtype=torch.bfloat16, device=both.device)
        silu_mul(both, act)
        return act, None

    def variants(self, case: Case) -> Sequence[Any]:
        """Tile choices to try; the fastest counts."""
        shape, rows = case.shape, case.hidden.shape[0]
        default = self.module.get_default_config(
            rows, shape.local, shape.intermediate, shape.hidden, shape.top_k, self.dtype, self.block_shape
        )
        naive = case.pairs == case.ids.numel() and case.pairs * 4 <= shape.local
        return [
            (choice, n) for choice in self.tile_choices(case, default) for n in ([False, True] if naive else [False])
        ]

    def prepare(self, case: Case, variant: Any) -> Run:
        """Inputs and outputs of one batch, and the calls to time."""
        choice = {key: value for key, value in variant[0].items() if key != "SPLIT_K"}
        block, top_k, pairs = choice["BLOCK_SIZE_M"], case.shape.top_k, case.ids.numel()
        both, out = poisoned(pairs, 1, self.w13.shape[1]), poisoned(pairs, 1, self.w2.shape[1])
        total, rows = poisoned(case.hidden.shape[0], self.w2.shape[1]), self.rows_in(case.hidden)
        host: Any = self.align(case, block)
        if variant[1]:
            host = (None, case.ids.view(-1), torch.tensor([pairs * block], dtype=torch.int32, device=DEVICE))

        def products(rows: Any, aligned: Any, weights: torch.Tensor | None) -> None:
            common = dict(compute_type=tl.bfloat16, use_fp8_w8a8=self.dtype is not None, use_int8_w8a8=False,
                          use_int8_w8a16=False, use_int4_w4a16=False, per_channel_quant=False,
                          block_shape=self.block_shape)  # fmt: skip
            invoke, (scale13, scale2) = self.module.invoke_fused_moe_triton_kernel, self.scales
            invoke(rows[0], self.w13, both, rows[1], scale13, None, *aligned, False, top_k, choice, **common)
            act, scale = self.activate(both.view(pairs, -1))
            invoke(act, self.w2, out, scale, scale2, weights, *aligned, weights is not None, 1, choice, **common)

        def full() -> None:
            aligned = host if variant[1] else self.align_on_device(case, block)
            products(self.rows_in(case.hidden), aligned, case.weights)
            self.align_op.moe_sum(out.view(case.hidden.shape[0], top_k, -1), total)

        whole = full if self.align_op is not None and case.pairs == pairs else None
        return Run(lambda: products(rows, host, None), lambda: out.view(pairs, -1)[case.slots], whole)


class SGLang(FusedMoe):
    """SGLang's fused_moe Triton kernel with SwiGLU in the first GEMM's epilogue (w13 interleaved) and PDL."""

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor, directory: Path | None) -> None:
        names = ("write_zeros_to_output", "fused_moe_kernel", "invoke_fused_moe_kernel", "_set_triton_tma_allocator",
                 "_get_b_tma_desc_cached", "_moe_sum_reduce_kernel", "moe_sum_reduce_triton")  # fmt: skip
        super().__init__(directory, "sglang", "fused_moe_triton_kernels.py", names)
        self.w13, self.w2 = interleaved(w13), w2

    def variants(self, case: Case) -> Sequence[Any]:
        """Tile choices to try; the fastest counts."""
        default = dict(BLOCK_SIZE_M=64, BLOCK_SIZE_N=64, BLOCK_SIZE_K=32, GROUP_SIZE_M=8)
        if case.hidden.shape[0] <= case.shape.local:
            default = dict(BLOCK_SIZE_M=16, BLOCK_SIZE_N=32, BLOCK_SIZE_K=64, GROUP_SIZE_M=1)
        return self.tile_choices(case, default)

    def prepare(self, case: Case, variant: Any) -> Run:
        """Inputs and outputs of one batch, and the calls to time."""
        choice = {key: value for key, value in variant.items() if key != "USE_TMA"}
        tma, block, top_k, pairs = (
            bool(variant.get("USE_TMA")),
            choice["BLOCK_SIZE_M"],
            case.shape.top_k,
            case.ids.numel(),
        )
        act, out = poisoned(pairs, self.w2.shape[2]), poisoned(pairs, self.w2.shape[1])
        total = poisoned(case.hidden.shape[0], self.w2.shape[1])
        host = self.align(case, block)

        def products(aligned: Any, weighted: bool) -> None:
            common = dict(compute_type=tl.bfloat16, use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False,
                          use_int4_w4a16=False, per_channel_quant=False, b_use_tma=tma)  # fmt: skip
            invoke = self.module.invoke_fused_moe_kernel
            none = (None,) * 3
            invoke(case.hidden, self.w13, None, act, *none, case.weights, case.ids, *aligned, False, top_k, choice,
                   fuse_swiglu=True, **common)  # fmt: skip
            invoke(act, self.w2, None, out, *none, case.weights, case.ids, *aligned, weighted, 1, choice, **common)

        def full() -> None:
            products(self.align_on_device(case, block), True)
            self.module.moe_sum_reduce_triton(out.view(case.hidden.shape[0], top_k, -1), total, 1.0)

        whole = full if self.align_op is not None and case.pairs == pairs else None
        return Run(lambda: products(host, False), lambda: out[case.slots], whole)
