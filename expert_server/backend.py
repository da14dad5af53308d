"""Where and how a server computes its experts: what the service needs of a backend, and which one a device gets."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from expert_server.standby import HostReplicas
from moering.checkpoint import Checkpoint, ExpertWeights
from moering.errors import ConfigError, MoeringError
from moering.shared_rows import Pin


class NoRoom(MoeringError):
    """All the room for experts is taken: a plan in transition may name more than fit, for as long as moves take."""


class Backend(Protocol):
    """Loads experts and computes them. `load` runs on the loading thread while `compute` runs on another."""

    @property
    def fingerprint(self) -> str:
        """The numerics probe: equal in all processes whose rows have equal bits."""
        ...

    @property
    def capacity(self) -> int:
        """Experts that it has room for; 0 where only the process's memory limits them."""
        ...

    @property
    def row_multiple(self) -> int:
        """In memory a row of a weight is filled up to a multiple of so many values."""
        ...

    @property
    def dtype(self) -> str:
        """What it computes in, so that rows of this type lose nothing: a name of `moering.expert_frames.ITEM_BYTES`."""
        ...

    @property
    def max_tensor_bytes(self) -> int:
        """Rows that one message may bring: what a call should not be larger than, since it holds up the others."""
        ...

    @property
    def slot_bytes(self) -> int:
        """Of these, what a slot of shared memory holds; larger messages travel in frames."""
        ...

    @property
    def spin_s(self) -> float:
        """For how long the computing thread looks for the next message before it sleeps."""
        ...

    @property
    def pin(self) -> Pin | None:
        """Prepares shared memory for copies to and from its GPU; None where there is none."""
        ...

    @property
    def host_replicas(self) -> HostReplicas:
        """Further experts in host memory, where that is not where they are computed."""
        ...

    def load(self, weights: ExpertWeights) -> Any:
        """One expert, ready to compute; its room is free again when nobody refers to it any more. Or `NoRoom`."""
        ...

    def compute(
        self, hidden: np.ndarray, rows: np.ndarray | None, counts: list[int], experts: list[Any], out: np.ndarray
    ) -> None:
        """`out[i]` = expert of pair i applied to `hidden[rows[i]]`; pairs are sorted by expert, `counts` of each.

        Without `rows` pair i has row i.
        `hidden` and `out` are [n, hidden size] and [pairs, hidden size], both float32 or both of `dtype` (as arrays:
        `moering.shared_rows.ARRAYS`).
        """
        ...


def make_backend(
    device: str, arithmetic: str, threads: int, checkpoint: Checkpoint, capacity: int, host_replicas: int = 0
) -> Backend:
    """The backend of `device`, "cpu" or "cuda"; imports torch. `capacity`: experts, 0 to go by the memory at hand.

    `host_replicas`: further ones in pinned host memory. Raises `ConfigError` where the device is not there, has no room
    for an expert or no kernels for its weights.
    """
    if device == "cpu":
        from expert_server.lean_torch import import_torch

        import_torch()
        from expert_server.backend_cpu import CpuBackend

        return CpuBackend(arithmetic, threads)  # type: ignore[arg-type]
    try:
        from expert_server.backend_cuda import CudaBackend
        from expert_server.formats_cuda import format_of
    except ImportError as e:
        raise ConfigError(f"--device cuda needs PyTorch for CUDA and Triton 3.6: {e}") from e

    return CudaBackend(format_of(checkpoint), capacity, threads, host_replicas)
