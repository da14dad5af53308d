"""One safetensors file: its header is parsed and checked at open, its payload is read by byte range.

The file is 8 bytes (little-endian length of the header), the header (a JSON object: tensor name → dtype, shape and
``data_offsets`` relative to the end of the header), then the payload. Our own reader, because the safetensors library
cannot read one expert's slice of a fused tensor without mapping the file, nor count what it read.
"""

from __future__ import annotations

import json
import math
import os
import stat
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from moering.errors import CheckpointError

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class RawTensor:
    """A tensor as in the file: `data` is its bytes, little-endian, row-major, in a writable array of its own.

    `scale`: of a quantised matrix the tensor with its scales (`moering.quantization`).
    """

    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]
    scale: RawTensor | None = None


@dataclass(frozen=True)
class TensorSlice:
    """A tensor, or consecutive leading rows of one, in a shard; `offset` counts from the start of the file."""

    shard: Shard
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of payload."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def rows(self, start: int, stop: int) -> TensorSlice:
        """Rows [start, stop) of the leading dimension."""
        row_bytes = math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]
        shape = (stop - start, *self.shape[1:])
        return TensorSlice(self.shard, self.name, self.dtype, shape, self.offset + start * row_bytes)

    def reshape(self, *shape: int) -> TensorSlice:
        """The same bytes under another shape of the same size."""
        assert math.prod(shape) == math.prod(self.shape), f"{self.name}: {self.shape} is not {shape}"
        return TensorSlice(self.shard, self.name, self.dtype, shape, self.offset)

    def read(self) -> RawTensor:
        """Read the payload; raise `CheckpointError` when the file has become shorter since it was opened."""
        return RawTensor(self.dtype, self.shape, self.shard.read(self.name, self.offset, self.nbytes))


class Shard:
    """An open safetensors file. Reading is thread-safe (`pread` keeps no position)."""

    def __init__(self, path: Path) -> None:
        """Open the file and check its header; raise `CheckpointError` naming the file and the tensor."""
        self.path = path
        try:
            # O_NONBLOCK: a named pipe in place of a shard is an error below, not a hang here.
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            raise CheckpointError(f"{path}: cannot open this shard: {e.strerror}") from e
        self._close = weakref.finalize(self, os.close, self._fd)
        status = os.fstat(self._fd)
        self.size = status.st_size
        try:
            if not stat.S_ISREG(status.st_mode):
                raise self._error("not a regular file")
            self.header = self._read_header()
            self.tensors = self._parse_header()
        except CheckpointError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; harmless when called twice."""
        self._close()

    def read(self, what: str, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """`nbytes` from `offset` of the file; `what` names them in an error."""
        data = np.empty(nbytes, dtype=np.uint8)
        view, done = data.data, 0
        while done < nbytes:  # the kernel returns at most 2 GiB at once
            try:
                got = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as e:
                raise self._error(f"cannot read {what}: {e.strerror}") from e
            if got == 0:
                raise self._error(f"truncated: {what} ends at byte {offset + nbytes}, the file at {offset + done}")
            done += got
        return data

    def _error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {text}")

    def _read_header(self) -> bytes:
        if self.size < 8:
            raise self._error(f"truncated: {self.size} bytes are no safetensors file")
        length = int.from_bytes(self.read("the header's length", 0, 8).tobytes(), "little")
        if length > MAX_HEADER_BYTES:
            raise self._error(f"not a safetensors file: its header would have {length} bytes")
        if 8 + length > self.size:
            raise self._error(f"truncated: the header ends at byte {8 + length}, the file at {self.size}")
        return self.read("the header", 8, length).tobytes()

    def _parse_header(self) -> dict[str, TensorSlice]:
        try:
            header = json.loads(self.header)
        except (ValueError, RecursionError) as e:
            raise self._error(f"the header is not JSON: {e}") from e
        if not isinstance(header, dict):
            raise self._error("the header is not a JSON object")
        return {name: self._parse_entry(name, entry) for name, entry in header.items() if name != "__metadata__"}

    def _parse_entry(self, name: str, entry: Any) -> TensorSlice:
        if not isinstance(entry, dict):
            raise self._error(f"tensor {name}: its header entry is not an object")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise self._error(f"tensor {name}: unknown dtype {dtype!r}")
        if not _is_sizes(shape):
            raise self._error(f"tensor {name}: {shape!r} is not a shape")
        if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._error(f"tensor {name}: {offsets!r} are not data offsets")
        start = 8 + len(self.header)
        tensor = TensorSlice(self, name, dtype, tuple(shape), start + offsets[0])
        if offsets[1] - offsets[0] != tensor.nbytes:
            raise self._error(f"tensor {name}: {dtype} {shape} is {tensor.nbytes} bytes, its offsets are {offsets}")
        if start + offsets[1] > self.size:
            raise self._error(
                f"truncated: tensor {name} ends at byte {start + offsets[1]}, the file has {self.size} bytes"
            )
        return tensor


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
