"""Dataclasses to maps and back, every field checked against its annotation before anything sees it.

Annotations may be int, str, bytes, bool, float, `list[T]`, `dict[K, V]`, `T | None` and other dataclasses. No coercion:
a bool is no int, and a float must be finite. Messages of the hot path (flat, no floats) take a short way that leads to
the long one whenever something is off, since only the long one can say what.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Any

from moering.errors import ProtocolError

Check = Callable[[Any, str], Any]
"""(value, where) → the value, or a `ProtocolError` that begins with `where`."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Shape:
    """What is known of a dataclass."""

    names: tuple[str, ...]
    keys: frozenset[str]
    checks: dict[str, tuple[Check, bool]]  # by field, with whether it is required
    nested: bool  # some field holds other dataclasses
    flat_types: list[type] | None  # of the fields, where all are plain; None: the short way does not apply
    int_lists: tuple[int, ...]  # which fields are list[int]


def to_map(message: Any) -> dict[str, Any]:
    """The fields by name; dataclasses in them become maps as well."""
    shape = _shape(message.__class__)
    if not shape.nested:
        return {name: getattr(message, name) for name in shape.names}
    return {name: _plain(getattr(message, name)) for name in shape.names}


def from_map(cls: Any, fields: Any, where: str) -> Any:
    """An instance of dataclass `cls` from the map `fields`, or a `ProtocolError` that names the field."""
    if not isinstance(fields, dict):
        raise ProtocolError(f"{where}: not a map")
    shape = _shape(cls)
    if shape.flat_types is not None and fields.keys() == shape.keys:
        values = [fields[name] for name in shape.names]
        if [type(v) for v in values] == shape.flat_types and all(_all_ints(values[i]) for i in shape.int_lists):
            return cls(*values)
    return _explain(cls, shape, fields, where)


def shown(value: Any) -> str:
    """A value for an error text. Of a list or map only its type: `repr` of a deep one overflows the stack."""
    return type(value).__name__ if isinstance(value, list | dict) else f"{value!r:.60}"


def _explain(cls: Any, shape: _Shape, fields: dict[Any, Any], where: str) -> Any:
    """The long way of `from_map`: field by field."""
    for name in fields:
        if name not in shape.checks:
            raise ProtocolError(f"{where}: unknown field {name!r:.60}")
    values = {}
    for name, (check, required) in shape.checks.items():
        if name in fields:
            values[name] = check(fields[name], f"{where}.{name}")
        elif required:
            raise ProtocolError(f"{where}.{name}: missing")
    return cls(**values)


@functools.cache
def _shape(cls: Any) -> _Shape:
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    names = tuple(f.name for f in fields)
    plain = [list if hints[n] == list[int] else hints[n] for n in names]
    flat = all(t in (int, str, bytes, bool, list) for t in plain)
    return _Shape(
        names,
        frozenset(names),
        {f.name: (_check(hints[f.name]), _required(f)) for f in fields},
        any(_holds_dataclass(h) for h in hints.values()),
        plain if flat else None,
        tuple(i for i, t in enumerate(plain) if t is list),
    )


def _holds_dataclass(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or any(_holds_dataclass(a) for a in typing.get_args(hint))


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_map(value)
    if isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
        return [to_map(v) for v in value]
    return value


def _all_ints(values: list[Any]) -> bool:
    return all(type(v) is int for v in values)


def _check(hint: Any) -> Check:
    """A function that returns a value of type `hint` or raises `ProtocolError`."""
    if dataclasses.is_dataclass(hint):
        return lambda value, where: from_map(hint, value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        inner = _check(next(a for a in args if a is not type(None)))
        return lambda value, where: None if value is None else inner(value, where)
    if origin is list:
        return _check_list(args[0])
    if origin is dict:
        return _check_dict(*args)
    if hint is float:
        return _check_float

    def exact(value: Any, where: str) -> Any:
        if type(value) is not hint:
            raise ProtocolError(f"{where}: {type(value).__name__} where {hint.__name__} is expected")
        return value

    return exact


def _check_float(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ProtocolError(f"{where}: {shown(value)} is not a finite number")
    return float(value)


def _check_list(item_hint: Any) -> Check:
    item = _check(item_hint)

    def check(value: Any, where: str) -> Any:
        if type(value) is not list:
            raise ProtocolError(f"{where}: {type(value).__name__} where list is expected")
        if item_hint is int:  # token ids: thousands of them, checked without a call each
            if not _all_ints(value):
                raise ProtocolError(f"{where}: not all items are integers")
            return value
        return [item(v, where) for v in value]

    return check


def _check_dict(key_hint: Any, value_hint: Any) -> Check:
    key, item = _check(key_hint), _check(value_hint)

    def check(value: Any, where: str) -> Any:
        if type(value) is not dict:
            raise ProtocolError(f"{where}: {type(value).__name__} where map is expected")
        return {key(k, where): item(v, where) for k, v in value.items()}

    return check
