"""Raw bytes as torch tensors: of checkpoints, and of rows on their way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def as_tensor(dtype: str, shape: Sequence[int], data: Any) -> torch.Tensor:
    """The tensor whose little-endian, row-major bytes `data` (a writable uint8 array) holds; no copy is made."""
    return torch.from_numpy(data).view(_DTYPES[dtype]).view(*shape)


def rows_tensor(rows: np.ndarray) -> torch.Tensor:
    """Rows as a tensor over the same memory: float32, or bf16 where they are int16, its bits (numpy has no bf16)."""
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
