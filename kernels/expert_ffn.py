"""One expert's feed-forward network on a CPU, and many of them over rows grouped by expert; both batch-invariant."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from kernels.linear import Backend, PackedLinear
from kernels.native_linear import expert_ffn as native_ffn
from kernels.threads import one_thread

PROBE_ROWS = (1, 2, 5, 64)


class ExpertFFN:
    """`down(silu(gate(x)) * up(x))` of one expert, fp32 activations."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, backend: Backend = "auto") -> None:
        """Take gate and up [intermediate, hidden] and down [hidden, intermediate], in fp32, fp16 or bf16."""
        if gate.shape != up.shape or down.shape != gate.shape[::-1]:
            raise ValueError(f"gate {list(gate.shape)}, up {list(up.shape)} and down {list(down.shape)} do not match")
        self._inter = gate.shape[0]
        self._w13 = PackedLinear(torch.cat((gate, up)), backend)
        self._w2 = PackedLinear(down, backend)
        self.nbytes = self._w13.nbytes + self._w2.nbytes
        gate_up, native_down = self._w13.native, self._w2.native
        self._native: Callable[[torch.Tensor], torch.Tensor] | None = None
        if gate_up and native_down:
            self._native = functools.partial(native_ffn, gate_up, native_down)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[n, hidden] float32 → [n, hidden] float32."""
        if self._native is not None:
            return self._native(x)
        both = self._w13(x)
        gate, up = both.narrow(1, 0, self._inter), both.narrow(1, self._inter, self._inter)
        # silu's bits depend on where its vector loop ends. As a slice the gate's rows are walked one by one, each with
        # the same end; threads would cut within rows
        with one_thread():
            activated = torch.mul(F.silu(gate, inplace=True), up)
        return self._w2(activated)


def grouped_expert_ffn(
    hidden: torch.Tensor,
    rows: torch.Tensor | None,
    counts: Sequence[int],
    experts: Sequence[ExpertFFN],
    out: torch.Tensor,
) -> None:
    """Compute (row, expert) pairs sorted by expert: pair i reads hidden[rows[i]] and its result goes to out[i].

    `hidden` is [n, hidden], `rows` int64 [pairs] (None: row i for pair i), `out` [pairs, hidden] float32; `counts[e]`
    pairs are expert e's.
    """
    gathered = hidden if rows is None else hidden.index_select(0, rows)
    if not sum(counts) == gathered.shape[0] == out.shape[0] or len(counts) != len(experts):
        raise ValueError(f"{list(counts)} pairs of {len(experts)} experts do not match {gathered.shape[0]} rows")
    start = 0
    for count, expert in zip(counts, experts, strict=True):
        if count:
            out[start : start + count] = expert(gathered[start : start + count])
            start += count


def numerics_fingerprint(backend: Backend = "auto") -> str:
    """Hash of a fixed expert's output at 1, 2, 5 and 64 rows: equal where results can replace each other bit by bit."""
    hidden, inter = 576, 800  # sums long enough that two ways of splitting them differ
    gate, up, down = (fixed_values(i, (inter, hidden)) for i in range(3))
    expert = ExpertFFN(gate.half(), up.half(), down.T.half(), backend)
    x = fixed_values(3, (max(PROBE_ROWS), hidden)) * 16
    digest = hashlib.blake2b(digest_size=16)
    for rows in PROBE_ROWS:
        digest.update(expert(x[:rows]).numpy().tobytes())
    return digest.hexdigest()


def fixed_values(stream: int, shape: tuple[int, int]) -> torch.Tensor:
    """Values in [-1/16, 1/16) that no random generator's version can change."""
    index = torch.arange(shape[0] * shape[1], dtype=torch.int64) + stream * 1_000_003
    mixed = (index * 2654435761 % 2**32) * 40503 % 65521
    return ((mixed.float() / 65521 - 0.5) / 8).view(shape)
