"""From a row of logits to a token, by numpy in float64, one row at a time: a row's result depends on no other row.

The steps, in vLLM's order: stop ids masked below `min_tokens`, logit bias, repetition, frequency and presence
penalties; then greedy (the lowest id of the largest logits) at temperature 0, else temperature, min-p, top-k, top-p.
Filters rank tokens by (weight descending, id ascending), so ties are cut in a fixed way.

A draw is one uniform number u from Philox4x64 with key (seed, choice) and counter (position, 0, 0, 0), and the first
token, by id, at which the cumulative weight exceeds u × the total. Position counts generated tokens, so a request that
is resumed elsewhere draws what it would have drawn.

Nothing sorts the whole vocabulary: top-k selects, top-p counts mass in buckets and sorts one of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from moering.protocol import Sampling
from router.sequence import Sequence

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]

_UINT64 = (1 << 64) - 1
_ONE_BITS, _BUCKET_SHIFT = 0x3FF0_0000_0000_0000, 46  # float64 bits of 1.0; 52 - 46 bits of mantissa are kept


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token. Log-probabilities are those of the raw logits (before bias, penalties and temperature)."""

    token_id: int
    logprob: float | None = None  # None unless asked for
    top_ids: list[int] = field(default_factory=list)  # the likeliest tokens, best first
    top_logprobs: list[float] = field(default_factory=list)
    logits_digest: str | None = None  # BLAKE2b-8 of the raw float32 row, hexadecimal


class Sampler:
    """Draws the next token of each row."""

    def __call__(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> list[Sampled | None]:
        """One token per row of `logits` [n, vocabulary] float32; row i belongs to sequences[i].

        None where a row has no finite maximum (a NaN, or everything masked): that request can only fail.
        """
        rows = logits.detach().cpu().numpy()
        return [_sample_row(row, sequence) for row, sequence in zip(rows, sequences, strict=True)]


def _sample_row(row: NDArray[np.float32], sequence: Sequence) -> Sampled | None:
    sampling = sequence.sampling
    token = _token(row, sequence)
    if token is None:
        return None
    digest = hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() if sampling.logits_digest else None
    found = logprobs(row, token, sampling.logprobs) if sampling.logprobs >= 0 else None
    return Sampled(token, logits_digest=digest) if found is None else Sampled(token, *found, digest)


def logprobs(row: NDArray[np.float32], token: int, alternatives: int) -> tuple[float, list[int], list[float]] | None:
    """Log-probability of `token`, and the likeliest tokens with theirs, best first. None where it is not finite."""
    values = _log_softmax(row)
    if not np.isfinite(values[token]):
        return None
    top = _largest(values, alternatives)
    top = top[np.argsort(-values[top], kind="stable")]
    return float(values[token]), top.tolist(), values[top].tolist()


def _token(row: NDArray[np.float32], sequence: Sequence) -> int | None:
    sampling = sequence.sampling
    logits: NDArray[np.float32] | Floats = row
    if changes_logits(sequence):
        logits = row.astype(np.float64)
        _change_logits(logits, sequence)
    best = int(logits.argmax())  # the first NaN, if there is one
    if not np.isfinite(logits[best]):
        return None
    if sampling.temperature == 0:
        return best
    weights = np.exp((logits.astype(np.float64) - float(logits[best])) / sampling.temperature)
    ids = allowed(weights, sampling)
    u = uniform(sampling.seed, sampling.choice, len(sequence.output))
    return inverse_cdf(weights, u) if ids is None else int(ids[inverse_cdf(weights[ids], u)])


def changes_logits(sequence: Sequence) -> bool:
    """Whether anything is to be masked, added or penalised before the draw."""
    s = sequence.sampling
    penalizes = (s.repetition_penalty, s.frequency_penalty, s.presence_penalty) != (1, 0, 0)
    return penalizes or bool(s.logit_bias) or len(sequence.output) < s.min_tokens


def _change_logits(logits: Floats, sequence: Sequence) -> None:
    """Apply mask, bias and penalties to `logits` [vocabulary], in place."""
    s = sequence.sampling
    if len(sequence.output) < s.min_tokens:
        logits[s.stop_token_ids] = -np.inf
    for token, bias in s.logit_bias.items():
        logits[token] += bias
    if s.repetition_penalty != 1:
        seen = np.array(sequence.prompt + sequence.output)  # a repeated id is written repeatedly, with the same value
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
    if sequence.output and (s.frequency_penalty or s.presence_penalty):
        seen, counts = np.unique(sequence.output, return_counts=True)
        logits[seen] -= s.frequency_penalty * counts + s.presence_penalty


def allowed(weights: Floats, sampling: Sampling) -> Ints | None:
    """Ids that min-p, top-k and top-p leave, ascending; None for all. The largest of `weights` [vocabulary] is 1."""
    ids: Ints | None = None
    if sampling.min_p > 0:
        ids = np.flatnonzero(weights >= sampling.min_p)
    if 0 < sampling.top_k < (weights.size if ids is None else ids.size):
        ids = _select(ids, _largest(weights if ids is None else weights[ids], sampling.top_k))
    if sampling.top_p < 1:
        ids = _select(ids, _nucleus(weights if ids is None else weights[ids], sampling.top_p))
    return ids


def _select(ids: Ints | None, chosen: Ints) -> Ints:
    return chosen if ids is None else ids[chosen]


def _largest(values: Floats, k: int) -> Ints:
    """Indices, ascending, of the `k` largest of `values`; of equal ones the first."""
    if k == 0:
        return np.empty(0, np.int64)
    if k >= values.size:
        return np.arange(values.size)
    smallest = np.partition(values, values.size - k)[values.size - k]
    chosen = np.flatnonzero(values >= smallest)
    surplus = chosen.size - k
    if surplus > 0:
        ties = np.flatnonzero(values[chosen] == smallest)
        chosen = np.delete(chosen, ties[-surplus:])
    return chosen


def _nucleus(weights: Floats, top_p: float) -> Ints:
    """Indices, ascending, of the fewest largest weights that hold `top_p` of the total. No weight is over 1.

    Positive floats order like their bits, whose upper ones therefore name buckets, 64 to an octave: only the bucket in
    which the mass is reached needs sorting.
    """
    bucket = (_ONE_BITS >> _BUCKET_SHIFT) - (weights.view(np.int64) >> _BUCKET_SHIFT)  # 0 holds the largest
    mass = np.cumsum(np.bincount(bucket, weights))
    wanted = top_p * mass[-1]
    last = int(np.searchsorted(mass, wanted))
    edge = np.flatnonzero(bucket == last)
    edge = edge[np.argsort(-weights[edge], kind="stable")]
    above = mass[last - 1] if last else 0.0
    count = int(np.searchsorted(above + np.cumsum(weights[edge]), wanted)) + 1
    chosen = bucket < last
    chosen[edge[:count]] = True
    return np.flatnonzero(chosen)


def inverse_cdf(weights: Floats, u: float) -> int:
    """The first index at which the cumulative weight exceeds `u` × the total; never one without weight."""
    mass = np.cumsum(weights)
    index = np.searchsorted(mass, u * mass[-1], side="right")
    return int(min(index, np.searchsorted(mass, mass[-1])))  # u × total may round up to the total


def uniform(seed: int, choice: int, position: int) -> float:
    """The number in [0, 1) for this position: a pure function, whatever was drawn before."""
    key = np.array([seed & _UINT64, choice & _UINT64], dtype=np.uint64)
    raw = int(np.random.Philox(key=key, counter=position).random_raw())
    return (raw >> 11) * 2.0**-53


def _log_softmax(row: NDArray[np.float32]) -> Floats:
    shifted = row.astype(np.float64) - float(row.max())
    total: np.float64 = np.exp(shifted).sum()
    return shifted - float(np.log(total))
