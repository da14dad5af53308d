"""The rows of one layer's experts on their way out and back: what connections take from a micro-batch, and give it."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from router.instructions import Dispatch


class Reading(Protocol):
    """Something still reads the memory that it was given; a `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether that is over."""
        ...

    def synchronize(self) -> None:
        """Wait until it is."""
        ...


class ExpertRows(Protocol):
    """Of one micro-batch. Rows are arrays of the types in `moering.shared_rows.ARRAYS`."""

    at_once: bool
    """Whether what `pack` writes is there when it returns; else only after `settle`."""

    def pack(self, d: Dispatch, out: np.ndarray) -> tuple[int, bytes]:
        """Write the rows of a dispatch to `out` [at least its pairs, hidden]: how many, and its message's `pairs`."""
        ...

    def settle(self) -> None:
        """Wait until everything that was packed, of whatever micro-batch, is there."""
        ...

    def frame(self, d: Dispatch, dtype: str) -> np.ndarray:
        """The rows of a dispatch, each once, as a contiguous array to be sent as it is."""
        ...

    def put(self, slots: np.ndarray, rows: np.ndarray) -> Reading | None:
        """The outputs of these slots (int64 [pairs]) have come, `rows` [pairs, hidden]; once for each in a layer.

        None: they have been read.
        """
        ...

    def clear(self, slots: np.ndarray) -> None:
        """The outputs of these slots are zeros."""
        ...


class HostRows:
    """Rows in host memory: `hidden` float32 [n, hidden], `output` float32 [n × k, hidden]."""

    at_once = True

    def __init__(self, hidden: np.ndarray, output: np.ndarray) -> None:
        """Arrays that share memory with the micro-batch's tensors."""
        self._hidden, self._output = hidden, output

    def pack(self, d: Dispatch, out: np.ndarray) -> tuple[int, bytes]:
        """One row for each pair: the server need not look for them."""
        pairs = len(d.experts)
        self._hidden.take(d.pair_rows, 0, out[:pairs], "clip")
        return pairs, d.experts.astype(np.uint16).tobytes()

    def settle(self) -> None:
        """All is there."""

    def frame(self, d: Dispatch, dtype: str) -> np.ndarray:
        """See `ExpertRows`; float32, which is all that this side asks for."""
        return self._hidden if len(d.rows) == len(self._hidden) else self._hidden[d.rows]

    def put(self, slots: np.ndarray, rows: np.ndarray) -> None:
        """See `ExpertRows`."""
        self._output[slots] = rows

    def clear(self, slots: np.ndarray) -> None:
        """See `ExpertRows`; what lies there was never written."""
        self._output[slots] = 0.0
