"""A model that costs nothing: every token is a pure function of the prompt, and shows any row that went wrong.

An expert maps a number below `P` to another; a position's value goes through all layers and the next token comes from
the values of all positions. One row that is lost, stale or counted twice changes every later token.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

P = 4093
TOP_K = 2
WEIGHTS = (5, 7)


@lru_cache(maxsize=64)
def coefficients(layers: int, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each expert: it maps x to (a × x + b) mod P."""
    number = np.arange(layers * experts, dtype=np.int64).reshape(layers, experts)
    return 17 + number * 101 % 3001, 29 + number * 577 % 3989


def embed(token: int, position: int) -> int:
    """The value that a position starts with."""
    return (token * 131 + position * 17 + 1) % P


def gate(x: np.ndarray, experts: int) -> np.ndarray:
    """The two experts of each row, int64 [rows, 2], never equal."""
    first = x % experts
    return np.stack([first, (first + 1 + x // experts % (experts - 1)) % experts], axis=1)


def combine(x: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """The rows after a layer; `outputs` int64 [rows, 2]."""
    return (3 * x + WEIGHTS[0] * outputs[:, 0] + WEIGHTS[1] * outputs[:, 1]) % P


def next_token(values: list[int]) -> int:
    """The token that follows, from the values of all positions before it."""
    total = 0
    for position, value in enumerate(values):
        total += value * (2 * position + 1)
    return total % P


@lru_cache(maxsize=100_000)
def _value(token: int, position: int, layers: int, experts: int) -> int:
    a, b = coefficients(layers, experts)
    x = embed(token, position)
    for layer in range(layers):
        first = x % experts
        second = (first + 1 + x // experts % (experts - 1)) % experts
        outputs = [(int(a[layer, e]) * x + int(b[layer, e])) % P for e in (first, second)]
        x = (3 * x + WEIGHTS[0] * outputs[0] + WEIGHTS[1] * outputs[1]) % P
    return x


def reference(prompt: list[int], count: int, layers: int, experts: int) -> list[int]:
    """The tokens of a run without failures."""
    tokens = list(prompt)
    values = [_value(t, i, layers, experts) for i, t in enumerate(prompt)]
    while len(tokens) < len(prompt) + count:
        tokens.append(next_token(values))
        values.append(_value(tokens[-1], len(tokens) - 1, layers, experts))
    return tokens[len(prompt) :]
