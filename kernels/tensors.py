"""Raw bytes as torch tensors: of checkpoints, and of rows on their way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from kernels.dequantize import dequantize, to_fp16

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}


class Stored(Protocol):
    """A tensor as a checkpoint has it: little-endian, row-major bytes in a writable uint8 array."""

    @property
    def dtype(self) -> str:
        """A key of `_DTYPES`."""
        ...

    @property
    def shape(self) -> Sequence[int]:
        """Sizes."""
        ...

    @property
    def data(self) -> Any:
        """The bytes."""
        ...

    @property
    def scale(self) -> Stored | None:
        """A quantised matrix's scales."""
        ...


def stored_tensor(stored: Stored) -> torch.Tensor:
    """The tensor of these bytes, without its scales; no copy is made."""
    return torch.from_numpy(stored.data).view(_DTYPES[stored.dtype]).view(*stored.shape)


def as_tensor(stored: Stored) -> torch.Tensor:
    """What is stored, without a copy; of a quantised matrix its weights in float32."""
    tensor = stored_tensor(stored)
    return tensor if stored.scale is None else dequantize(tensor, stored_tensor(stored.scale))


def as_packable(stored: Stored) -> torch.Tensor:
    """`as_tensor`, but the weights of a quantised matrix as fp16, which `kernels.linear` packs (see `to_fp16`)."""
    tensor = as_tensor(stored)
    return tensor if stored.scale is None else to_fp16(tensor)


def rows_tensor(rows: np.ndarray) -> torch.Tensor:
    """Rows as a tensor over the same memory: float32, or bf16 where they are int16, its bits (numpy has no bf16)."""
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
