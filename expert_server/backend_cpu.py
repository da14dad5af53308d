"""Experts on the CPU: from checkpoint bytes to packed weights, from received rows to the grouped kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from expert_server.memory import release_free_memory
from expert_server.standby import NoReplicas
from kernels.expert_ffn import ExpertFFN, grouped_expert_ffn, numerics_fingerprint
from kernels.linear import Backend, row_multiple
from kernels.tensors import as_packable
from moering.checkpoint import ExpertWeights
from moering.protocol import MAX_TENSOR_BYTES
from moering.shared_rows import SLOT_BYTES

RELEASE_BYTES = 32 << 20
"""Of experts loaded: then malloc returns what it has free. Packed weights lie where larger buffers were, and the next
such buffer does not fit into what is left of that: by the end of loading these gaps would be half of what is loaded."""


class CpuBackend:
    """Experts on the CPU."""

    def __init__(self, arithmetic: Backend, threads: int) -> None:
        """`arithmetic`: see `kernels.linear`."""
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self._arithmetic = arithmetic
        self.host_replicas = NoReplicas()
        self.pin = None
        self._loaded_bytes = 0  # since memory was last released

    @property
    def fingerprint(self) -> str:
        """The numerics probe: equal in all processes whose rows have equal bits."""
        return numerics_fingerprint(self._arithmetic)

    @property
    def capacity(self) -> int:
        """No limit but the process's memory."""
        return 0

    @property
    def row_multiple(self) -> int:
        """See `kernels.linear.row_multiple`."""
        return row_multiple(self._arithmetic)

    @property
    def dtype(self) -> str:
        """What rows have, whatever the weights are stored in."""
        return "float32"

    @property
    def max_tensor_bytes(self) -> int:
        """What keeps a long prompt from holding up decoding."""
        return MAX_TENSOR_BYTES

    @property
    def slot_bytes(self) -> int:
        """See `moering.shared_rows.SLOT_BYTES`."""
        return SLOT_BYTES

    @property
    def spin_s(self) -> float:
        """Never: its cores are the ones that compute."""
        return 0.0

    def load(self, weights: ExpertWeights) -> ExpertFFN:
        """One expert, packed; the checkpoint's bytes are not kept."""
        gate, up, down = map(as_packable, weights.parts)
        expert = ExpertFFN(gate, up, down, self._arithmetic)
        self._loaded_bytes += expert.nbytes
        if self._loaded_bytes >= RELEASE_BYTES:
            self._loaded_bytes = 0
            release_free_memory()
        return expert

    def compute(
        self, hidden: np.ndarray, rows: np.ndarray | None, counts: list[int], experts: list[Any], out: np.ndarray
    ) -> None:
        """See `expert_server.backend.Backend`."""
        index = None if rows is None else torch.from_numpy(rows)
        grouped_expert_ffn(torch.from_numpy(hidden), index, counts, experts, torch.from_numpy(out))
