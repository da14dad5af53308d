"""The rows of one layer's experts on their way out and back: what connections take from a micro-batch, and give it."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from router.instructions import Dispatch


class Reading(Protocol):
    """Something still reads the memory that it was given; a `weakref.ref`."""

    def __call__(self) -> object | None:
        """None when that is over."""
        ...


class ExpertRows(Protocol):
    """Of one micro-batch. Rows are arrays of the types in `moering.shared_rows.ARRAYS`."""

    def begin_layer(self) -> None:
        """The inputs of a layer are there; nothing reads the outputs of the one before any more."""
        ...

    def pack(self, d: Dispatch, out: np.ndarray) -> tuple[int, bytes]:
        """Write the rows of a dispatch to `out` [at least its pairs, hidden]: how many, and its message's `pairs`."""
        ...

    def frame(self, d: Dispatch, dtype: str) -> np.ndarray:
        """The rows of a dispatch, each once, as a contiguous array to be sent as it is."""
        ...

    def put(self, slots: np.ndarray, rows: np.ndarray, memory: object | None = None) -> Reading | None:
        """The outputs of these slots (int64 [pairs]) have come, `rows` [pairs, hidden]; once for each in a layer.

        `memory` keeps them where they are for as long as it is held, and a GPU can read them there; without it they are
        there until this returns. None: they have been read.
        """
        ...

    def keep(self) -> None:
        """What has come so far will be read much later: have it elsewhere."""
        ...

    def clear(self, slots: np.ndarray) -> None:
        """The outputs of these slots are zeros."""
        ...


class HostRows:
    """Rows in host memory: `hidden` float32 [n, hidden], `output` float32 [n × k, hidden]."""

    def __init__(self, hidden: np.ndarray, output: np.ndarray) -> None:
        """Arrays that share memory with the micro-batch's tensors."""
        self._hidden, self._output = hidden, output

    def begin_layer(self) -> None:
        """All outputs will be written again."""

    def pack(self, d: Dispatch, out: np.ndarray) -> tuple[int, bytes]:
        """One row for each pair: the server need not look for them."""
        pairs = len(d.experts)
        self._hidden.take(d.pair_rows, 0, out[:pairs], "clip")
        return pairs, d.experts.astype(np.uint16).tobytes()

    def frame(self, d: Dispatch, dtype: str) -> np.ndarray:
        """See `ExpertRows`; float32, which is all that this side asks for."""
        return self._hidden if len(d.rows) == len(self._hidden) else self._hidden[d.rows]

    def put(self, slots: np.ndarray, rows: np.ndarray, memory: object | None = None) -> None:
        """See `ExpertRows`."""
        self._output[slots] = rows

    def keep(self) -> None:
        """It is."""

    def clear(self, slots: np.ndarray) -> None:
        """See `ExpertRows`; what lies there was never written."""
        self._output[slots] = 0.0
