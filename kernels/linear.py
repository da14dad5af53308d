"""Batch-invariant linear layers on a CPU.

`F.linear` in fp32 gives a row other bits at 1, at 2–3 and from 4 rows on, and again others with several threads. So:

* *native*: `kernels._native`, with weights in fp16 where that holds them, else in fp32;
* *packed*: fbgemm's product with fp16 weights (fp32 activations and accumulation), which gives the same bits at every
  row and thread count, reads half the bytes, and is exact in the weights when they are fp16 values;
* *portable*: `F.linear` on a multiple of 4 rows and one thread, and on no more at once than `kernels.row_blocks`
  allows. Also in place of *packed* for weights that fp16 does not hold.

Each has bits of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from kernels.native_linear import NativeLinear, available
from kernels.row_blocks import MULTIPLE, PROBE_ROWS, largest_block
from kernels.threads import one_thread

Backend = Literal["auto", "native", "packed", "portable"]
BACKENDS = get_args(Backend)

_LINEAR_FP16 = torch.ops.quantized.linear_dynamic_fp16.default

_PROBE_COLUMNS = 1024
"""Of the result; more take long to probe, and are computed piece by piece anyway."""
MAX_PACK_ERROR = 2.0**-25  # largest absolute rounding error of a weight that packing may cause
_EXPONENT = 0x7C00  # of fp16


class PackedLinear:
    """`x @ weight.T` for fp32 rows; a row's result does not depend on the other rows or on the number of threads."""

    def __init__(self, weight: torch.Tensor, backend: Backend = "auto") -> None:
        """`weight` is [out, in] in fp32, fp16 or bf16; only what fp16 holds well enough is kept as that.

        Raise `ValueError` for a backend that this machine does not have, and for an unknown one.
        """
        self.backend = resolve_backend(backend)
        self.native = native_linear(weight) if self.backend == "native" else None
        # rounded here, so that the bits do not depend on how the library rounds
        rounded = rounded_to_fp16(weight) if self.backend == "packed" else None
        self._product: Callable[[torch.Tensor], torch.Tensor]
        if self.native is not None:
            self._product, self.nbytes = self.native, self.native.nbytes
        elif rounded is not None:
            packed = torch.ops.quantized.linear_prepack_fp16(rounded.float(), None)
            self._product, self.nbytes = functools.partial(_linear_fp16, packed=packed), weight.numel() * 2
        else:
            self.backend, exact = "portable", weight.float().contiguous()
            self._product, self.nbytes = functools.partial(_linear_portable, weight=exact), weight.numel() * 4

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[n, in] float32 → [n, out] float32, contiguous."""
        return self._product(x)


def native_linear(weight: torch.Tensor) -> NativeLinear:
    """`weight` [out, in] in fp16 where that holds it well enough, else in fp32."""
    rounded = rounded_to_fp16(weight)
    return NativeLinear(weight.float() if rounded is None else rounded)


@functools.cache
def resolve_backend(backend: Backend) -> Literal["native", "packed", "portable"]:
    """What `backend` means on this machine."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "portable":
        return "portable"
    if backend != "packed" and available():
        return "native"
    if backend == "native":
        raise ValueError(
            "the native kernels are not there: no C compiler at the installation, or a processor without AVX2"
        )
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


def available_backends() -> list[Backend]:
    """Those that this machine has, without "auto"."""
    found: list[Backend] = []
    for name in BACKENDS:
        try:
            if resolve_backend(name) == name:
                found.append(name)
        except ValueError:
            continue
    return found


def row_multiple(backend: Backend) -> int:
    """A packed row of inputs takes the memory of a multiple of so many values: what is added fbgemm never reads."""
    return 512 if resolve_backend(backend) == "packed" else 1


def rounded_to_fp16(weight: torch.Tensor) -> torch.Tensor | None:
    """`weight` in fp16, contiguous; None when a weight overflows that or moves by more than `MAX_PACK_ERROR`."""
    rounded = weight.half().contiguous()
    # of NaN and infinity all bits of the exponent are set; this is faster than isfinite()
    finite = int(rounded.view(torch.int16).bitwise_and(_EXPONENT).max()) < _EXPONENT
    if not finite or (rounded.dtype != weight.dtype and float((rounded - weight.float()).abs().max()) > MAX_PACK_ERROR):
        return None
    return rounded


def _linear_fp16(x: torch.Tensor, packed: Any) -> torch.Tensor:
    return _LINEAR_FP16(x, packed)


def _linear_portable(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with one_thread():
        return _in_blocks(x, weight)


def _in_blocks(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
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
