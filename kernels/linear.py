"""Batch-invariant linear layers on a CPU.

`F.linear` in fp32 gives a row other bits at 1, at 2–3 and from 4 rows on, and again others with several threads.
fbgemm's product with fp16 weights (fp32 activations and accumulation) gives the same bits at every row and thread
count, reads half the bytes, and is exact in the weights when they are fp16 values: the *packed* backend. Where the
processor or the weights do not allow it, the *portable* backend is `F.linear` on a multiple of 4 rows and one thread,
and on no more at once than `kernels.row_blocks` allows.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from kernels.row_blocks import MULTIPLE, PROBE_ROWS, largest_block
from kernels.threads import one_thread

Backend = Literal["auto", "packed", "portable"]
BACKENDS = get_args(Backend)

_LINEAR_FP16 = torch.ops.quantized.linear_dynamic_fp16.default

_PROBE_COLUMNS = 1024
"""Of the result; more take long to probe, and are computed piece by piece anyway."""
MAX_PACK_ERROR = 2.0**-25  # largest absolute rounding error of a weight that packing may cause


class PackedLinear:
    """`x @ weight.T` for fp32 rows; a row's result does not depend on the other rows or on the number of threads."""

    def __init__(self, weight: torch.Tensor, backend: Backend = "auto") -> None:
        """`weight` is [out, in] in fp32, fp16 or bf16; `backend` packs only weights that fp16 holds well enough.

        Raise `ValueError` for "packed" on a machine that cannot, and for an unknown backend.
        """
        self.out_features, self.in_features = weight.shape
        # rounded here, so that the bits do not depend on how the library rounds
        rounded = rounded_to_fp16(weight) if resolve_backend(backend) == "packed" else None
        self.backend = "portable" if rounded is None else "packed"
        self._packed: Any = None
        self._weight: torch.Tensor | None = None
        if rounded is not None:
            self._packed = torch.ops.quantized.linear_prepack_fp16(rounded, None)
            self.nbytes = weight.numel() * 2
        else:
            self._weight = weight.float().contiguous()
            self.nbytes = weight.numel() * 4

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[n, in] float32 → [n, out] float32, contiguous."""
        if self._weight is None:
            return _linear_fp16(x, self._packed)
        with one_thread():
            return _linear_portable(x, self._weight)


@functools.cache
def resolve_backend(backend: Backend) -> Literal["packed", "portable"]:
    """What `backend` means on this machine."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "portable":
        return "portable"
    try:
        probe = torch.ops.quantized.linear_prepack_fp16(torch.ones(4, 4), None)
        works = bool((_linear_fp16(torch.ones(1, 4), probe) == 4).all())
    except (RuntimeError, AttributeError):  # no fbgemm in this build, or a processor it does not know
        works = False
    if works:
        return "packed"
    if backend == "packed":
        raise ValueError(
            "this processor or build of PyTorch has no fp16-packed linear layers; use the portable backend"
        )
    return "portable"


def rounded_to_fp16(weight: torch.Tensor) -> torch.Tensor | None:
    """`weight` with the values that fp16 has for it, in fp32 and contiguous.

    None when a weight overflows fp16 or moves by more than `MAX_PACK_ERROR`.
    """
    exact = weight.float().contiguous()
    rounded = exact if weight.dtype == torch.float16 else exact.half().float()
    # NaN and infinity are extremes too; of float32 this is faster than isfinite()
    finite = all(math.isfinite(extreme) for extreme in torch.aminmax(rounded))
    if not finite or (rounded is not exact and float((rounded - exact).abs().max()) > MAX_PACK_ERROR):
        return None
    return rounded


def _linear_fp16(x: torch.Tensor, packed: Any) -> torch.Tensor:
    return _LINEAR_FP16(x, packed)


def _linear_portable(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows = x.shape[0]
    missing = -rows % MULTIPLE
    padded = F.pad(x, (0, 0, 0, missing)) if missing else x
    block = _row_block(min(weight.shape[0], _PROBE_COLUMNS), weight.shape[1])
    if len(padded) <= block:
        return F.linear(padded, weight)[:rows]
    return torch.cat([F.linear(part, weight) for part in padded.split(block)])[:rows]


@functools.cache
def _row_block(out_features: int, in_features: int) -> int:
    """The most rows of a product with such a weight; to be called with one thread."""
    generator = torch.Generator().manual_seed(in_features)
    x = torch.randn(PROBE_ROWS, in_features, generator=generator)
    weight = torch.randn(out_features, in_features, generator=generator)
    in_fours = torch.cat([F.linear(part, weight) for part in x.split(MULTIPLE)])
    return largest_block(lambda n: torch.equal(F.linear(x[:n], weight), in_fours[:n]))
