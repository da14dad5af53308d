"""Raw checkpoint bytes as torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def as_tensor(dtype: str, shape: Sequence[int], data: Any) -> torch.Tensor:
    """The tensor whose little-endian, row-major bytes `data` (a writable uint8 array) holds; no copy is made."""
    return torch.from_numpy(data).view(_DTYPES[dtype]).view(*shape)
