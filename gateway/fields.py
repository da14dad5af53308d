"""Typed reading of fields of a JSON body. Each raises a 400 that names the field; null counts as absent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gateway.errors import bad_request

Body = Mapping[str, Any]


def integer(body: Body, name: str, default: int, low: int, high: int = 1 << 53) -> int:
    """An integer within [low, high]; a float without a fraction counts as one."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise bad_request(f"'{name}' must be an integer", name)
    if not low <= value <= high:
        raise bad_request(f"'{name}' must be between {low} and {high}, got {value}", name)
    return value


def number(body: Body, name: str, default: float, low: float, high: float = math.inf, above: bool = False) -> float:
    """A finite number within [low, high], or (low, high] with `above`."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float):
        raise bad_request(f"'{name}' must be a number", name)
    return finite(value, name, low, high, above)


def finite(value: float, name: str, low: float, high: float, above: bool = False) -> float:
    """`value` if it is finite and in range."""
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result) or not low <= result <= high or (above and result == low):
        bounds = f"{'above' if above else 'at least'} {low:g}" + ("" if high == math.inf else f" and at most {high:g}")
        raise bad_request(f"'{name}' must be {bounds}, got {result:g}", name)
    return result


def boolean(body: Body, name: str, default: bool) -> bool:
    """True or false."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not bool:
        raise bad_request(f"'{name}' must be a boolean", name)
    return value


def mapping(body: Body, name: str) -> dict[str, Any]:
    """An object; empty where absent."""
    value = body.get(name)
    if value is None:
        return {}
    if type(value) is not dict:
        raise bad_request(f"'{name}' must be an object", name)
    return value


def token_ids(value: Any, name: str, vocab_size: int) -> list[int]:
    """A list of token ids that the model has."""
    if type(value) is not list or not all(type(v) is int for v in value):
        raise bad_request(f"'{name}' must be a list of token ids", name)
    if value and not (min(value) >= 0 and max(value) < vocab_size):
        raise bad_request(f"'{name}' holds a token id outside of 0 .. {vocab_size - 1}", name)
    return value
