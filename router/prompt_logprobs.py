"""Log-probabilities of a prompt's own tokens, for requests that ask for them: from the rows that its prefill computes.

Row i of a prompt predicts its token i + 1, so the first token has none. The head runs over these rows only for such
requests, few at a time, as a row of logits is as long as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moering.protocol import PromptLogprobs
from router.sampler import logprobs
from router.scheduler import ScheduledChunk

ROWS = 64
"""Rows of logits at a time: 39 MB for a vocabulary of 152,000."""


def parts(item: ScheduledChunk) -> Iterator[range]:
    """The rows of a chunk that are to be scored, counted from its first one, in parts."""
    sequence = item.sequence
    if sequence.scores_prompt:
        end = min(item.length, len(sequence.prompt) - 1 - item.start)
        for begin in range(0, end, ROWS):
            yield range(begin, min(begin + ROWS, end))


def score(logits: torch.Tensor, item: ScheduledChunk, rows: range) -> PromptLogprobs | None:
    """What the gateway is told; `logits` [len(rows), vocabulary] float32. None where they are not finite."""
    sequence, start = item.sequence, item.start + rows.start + 1
    tokens = sequence.prompt[start : start + len(rows)]
    scored = [
        logprobs(row, token, sequence.sampling.logprobs)
        for row, token in zip(logits.detach().cpu().numpy(), tokens, strict=True)
    ]
    found = [s for s in scored if s is not None]
    if len(found) < len(scored):
        return None
    own, top_ids, top_logprobs = (list(column) for column in zip(*found, strict=True))
    return PromptLogprobs(sequence.request_id, sequence.attempt, start, own, top_ids, top_logprobs)
