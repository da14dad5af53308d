"""Without a GPU the Triton kernels run in Triton's interpreter. Import this before any of them.

Two repairs to the interpreter of Triton 3.6: numpy 2.4 refuses int() of the one-element arrays in which it keeps
scalars, and it multiplies bf16 matrices as if their bits were integers.
"""

from __future__ import annotations

import os

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

_patch_lang_tensor = interpreter._patch_lang_tensor
_create_dot = interpreter.InterpreterBuilder.create_dot


def _patch_with_item(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _widened(operand):
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _dot_of_floats(builder, a, b, d, input_precision, max_num_imprecise_acc):
    return _create_dot(builder, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)


interpreter._patch_lang_tensor = _patch_with_item
interpreter.InterpreterBuilder.create_dot = _dot_of_floats
