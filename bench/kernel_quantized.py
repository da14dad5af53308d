"""fp8 and MXFP4 weights as checkpoints store them, and the peers that compute with them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from bench.kernel_cases import DEVICE, Shape
from bench.kernel_fused_moe import VLLM
from bench.kernel_peers import TritonKernels, interleaved

FP8_BLOCK = 128
MXFP4_BLOCK = 32
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


@dataclass(frozen=True)
class CheckpointWeight:
    """A projection of all local experts.

    fp8: data [experts, rows, depth] float8_e4m3fn, scale [experts, rows / 128, depth / 128] float32. MXFP4: data
    [experts, rows, depth / 2] uint8, the even column in the low nibble; scale [experts, rows, depth / 32] uint8.
    """

    data: torch.Tensor
    scale: torch.Tensor

    @property
    def mxfp4(self) -> bool:
        """Which of the two formats."""
        return self.data.dtype == torch.uint8

    @property
    def nbytes(self) -> int:
        """Data and scales."""
        return self.data.nbytes + self.scale.nbytes

    def __getitem__(self, expert: int) -> torch.Tensor:
        """The weights that the bytes of one expert stand for: [rows, depth] float64."""
        data, scale = self.data[expert], self.scale[expert]
        if self.mxfp4:
            values = torch.tensor(E2M1, dtype=torch.float64, device=data.device)
            both = torch.stack([values[(data & 15).long()], values[(data >> 4).long()]], dim=-1)
            return both.flatten(1) * torch.exp2(scale.double() - 127).repeat_interleave(MXFP4_BLOCK, 1)
        blocks = scale.double().repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
        return data.double() * blocks


def quantized_weights(shape: Shape, kind: str) -> tuple[CheckpointWeight, CheckpointWeight]:
    """Random w13 and w2, "fp8" or "mxfp4"."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def weight(rows: int, depth: int) -> CheckpointWeight:
        if kind == "mxfp4":
            made: Any = dict(generator=generator, dtype=torch.uint8, device=DEVICE)
            data = torch.randint(0, 256, (shape.local, rows, depth // 2), **made)
            return CheckpointWeight(data, torch.randint(118, 122, (shape.local, rows, depth // MXFP4_BLOCK), **made))
        data = torch.empty(shape.local, rows, depth, dtype=torch.float8_e4m3fn, device=DEVICE)
        for expert in range(shape.local):
            data[expert] = torch.randn(rows, depth, generator=generator, device=DEVICE).to(torch.float8_e4m3fn)
        blocks = torch.rand(shape.local, rows // FP8_BLOCK, depth // FP8_BLOCK, generator=generator, device=DEVICE)
        return CheckpointWeight(data, blocks * depth**-0.5)

    return weight(2 * shape.intermediate, shape.hidden), weight(shape.hidden, shape.intermediate)


class TritonKernelsMXFP4(TritonKernels):
    """matmul_ogs on MXFP4 weights, bf16 rows; the layouts that it has for this card, for 4 and for 8 warps."""

    def __init__(self, w13: CheckpointWeight, w2: CheckpointWeight, directory: Path | None) -> None:
        self._import(directory)
        w13 = CheckpointWeight(interleaved(w13.data), interleaved(w13.scale))
        self.choices = {warps: (self._arranged(w13, warps), self._arranged(w2, warps)) for warps in (4, 8)}

    def _arranged(self, weight: CheckpointWeight, warps: int) -> tuple[Any, Any]:
        layout = importlib.import_module("triton_kernels.tensor_details.layout")
        kind, options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        scale_kind, scale_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=warps)
        wrap, convert = self.tensor.wrap_torch_tensor, self.tensor.convert_layout
        data = convert(wrap(weight.data.transpose(1, 2), dtype=self.tensor.FP4), kind, **options)
        scale = convert(wrap(weight.scale.transpose(1, 2)), scale_kind, **scale_options)
        return data, self.ogs.PrecisionConfig(weight_scale=scale)


@triton.jit
def _fp8_rows_kernel(x_ptr, out_ptr, scale_ptr, width, GROUP: tl.constexpr, SILU_MUL: tl.constexpr):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = group * GROUP + tl.arange(0, GROUP)
    if SILU_MUL:
        gate = tl.load(x_ptr + row * 2 * width + column).to(tl.float32)
        value = gate / (1 + tl.exp(-gate)) * tl.load(x_ptr + row * 2 * width + width + column).to(tl.float32)
    else:
        value = tl.load(x_ptr + row * width + column).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value)), 1e-10) / 448  # the largest float8_e4m3fn
    tl.store(out_ptr + row * width + column, (value / scale).to(out_ptr.dtype.element_ty))
    tl.store(scale_ptr + row * tl.num_programs(1) + group, scale)


def fp8_rows(x: torch.Tensor, silu_mul: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, width], or silu(first half of x) * second half, as float8_e4m3fn; scales [rows, width / 128]."""
    width = x.shape[1] // 2 if silu_mul else x.shape[1]
    grid = (x.shape[0], width // FP8_BLOCK)
    out = torch.empty(x.shape[0], width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(grid, dtype=torch.float32, device=x.device)
    _fp8_rows_kernel[grid](x, out, scale, width, GROUP=FP8_BLOCK, SILU_MUL=silu_mul)
    return out, scale


class VLLMFp8(VLLM):
    """vLLM's fused_moe Triton kernel on fp8 weights. Rows are fp8 too, one scale per 128 columns."""

    dtype, block_shape = "fp8_w8a8", (FP8_BLOCK, FP8_BLOCK)
    suffix = ",dtype=fp8_w8a8,block_shape=[128,128]"

    def __init__(self, w13: CheckpointWeight, w2: CheckpointWeight, directory: Path | None) -> None:
        super().__init__(w13.data, w2.data, directory)
        self.scales = w13.scale, w2.scale

    def rows_in(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of hidden states as the first product takes them, and their scales."""
        return fp8_rows(x)

    def activate(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gate and up to what the second product takes; quantised in the same kernel."""
        return fp8_rows(both, silu_mul=True)
