"""Sampling from logits that lie on a GPU: the plain greedy choice is made there, every other row by `router.sampler`.

So a greedy step copies one id per row to the host, and not the whole row.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from router import sampler
from router.sampler import Sampled
from router.sequence import Sequence


class Sampler:
    """Draws the next token of each row, the same one that `router.sampler.Sampler` draws."""

    def __init__(self) -> None:
        self._on_host = sampler.Sampler()

    def __call__(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> list[Sampled | None]:
        """See `router.sampler.Sampler`; `logits` [n, vocabulary] float32 may lie on any device."""
        greedy = [i for i, sequence in enumerate(sequences) if _takes_the_largest(sequence)]
        others = [i for i in range(len(sequences)) if i not in set(greedy)]
        result: list[Sampled | None] = [None] * len(sequences)
        best = logits.argmax(-1, keepdim=True)  # the first of equal ones, and the first NaN if there is one
        finite = logits.gather(1, best).isfinite()
        for i, token in zip(greedy, torch.where(finite, best, -1)[greedy].flatten().tolist(), strict=True):
            result[i] = Sampled(token) if token >= 0 else None
        if others:
            rows = logits[others].cpu()
            for i, sampled in zip(others, self._on_host(rows, [sequences[i] for i in others]), strict=True):
                result[i] = sampled
        return result


def _takes_the_largest(sequence: Sequence) -> bool:
    s = sequence.sampling
    asks = s.logprobs >= 0 or s.logits_digest
    return s.temperature == 0 and not asks and not sampler.changes_logits(sequence)
