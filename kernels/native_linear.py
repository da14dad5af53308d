"""`kernels._native` over tensors: packed weights, products and experts."""

from __future__ import annotations

import ctypes

import torch

try:
    from kernels import _native
except ImportError:  # no C compiler at the installation, or a processor without the instructions
    _native = None  # type: ignore[assignment]


def available() -> bool:
    """Whether this machine has it."""
    return _native is not None


class Weight(ctypes.Structure):
    """`struct weight` of `csrc/native.c`: a packed weight [n, k]."""

    _fields_ = (("panels", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("n", "k", "fp32")))


class NativeLinear:
    """`x @ weight.T` for fp32 rows and fp16 or fp32 weights; each output is a sum over the inputs in their order."""

    def __init__(self, weight: torch.Tensor) -> None:
        """`weight` is [out, in] in fp16 or fp32, and is copied."""
        weight = weight.contiguous()
        n, k = weight.shape
        self._packed = torch.empty(-(-n // _native.PANEL), k, _native.PANEL, dtype=weight.dtype)
        pack = _native.pack_fp16 if weight.dtype == torch.float16 else _native.pack_fp32
        pack(weight.data_ptr(), n, k, self._packed.data_ptr())
        self.weight = Weight(self._packed.data_ptr(), n, k, weight.dtype == torch.float32)
        self.address, self.nbytes = ctypes.addressof(self.weight), self._packed.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[n, in] float32 → [n, out] float32, contiguous."""
        _check(x, self.weight.k)
        if x.stride(1) != 1:
            x = x.contiguous()
        rows, columns = x.shape[0], self.weight.n
        out, threads = torch.empty(rows, columns), torch.get_num_threads()
        _native.linear(self.address, x.data_ptr(), x.stride(0), rows, out.data_ptr(), columns, threads)
        return out


def expert_ffn(gate_up: NativeLinear, down: NativeLinear, x: torch.Tensor) -> torch.Tensor:
    """`down(silu(gate(x)) * up(x))`: [n, hidden] float32 → [n, hidden] float32, contiguous."""
    _check(x, gate_up.weight.k)
    x = x.contiguous()
    rows, threads = x.shape[0], torch.get_num_threads()
    out, both = torch.empty_like(x), torch.empty(rows, gate_up.weight.n)
    addresses = gate_up.address, down.address, x.data_ptr(), rows, both.data_ptr(), out.data_ptr()
    _native.expert_ffn(*addresses, threads)
    return out


def _check(x: torch.Tensor, columns: int) -> None:
    if x.dtype != torch.float32 or x.shape[1] != columns:
        raise ValueError(f"rows of {x.shape[1]} {x.dtype} where {columns} float32 are needed")
