"""Command-line flags, environment variables and YAML files, all read into one frozen dataclass.

Each process declares its options once, as a frozen dataclass whose fields carry ``metadata={"help": …}``. From it
come the flags (``--max-num-seqs``), their environment twins (``MOERING_MAX_NUM_SEQS``) and the keys of a ``--config``
file. A flag wins over the environment, the environment over the file, the file over the default. Unknown keys are
refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml

from moering.errors import ConfigError

T = TypeVar("T")

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def option(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field with a help text. ``extra`` may hold ``positional=True`` or ``choices=(…)``."""
    return dataclasses.field(default=default, metadata={"help": help, **extra})


def check_numbers(config: Any, positive: Sequence[str] = (), not_negative: Sequence[str] = ()) -> None:
    """Raise `ConfigError` naming the first of these fields that is not a number of its kind."""
    for name in positive:
        if not getattr(config, name) > 0:  # nor is NaN
            raise ConfigError(f"{name} must be positive, not {getattr(config, name)}")
    for name in not_negative:
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name} must be 0 or more, not {getattr(config, name)}")


def parse(config: type[T], argv: Sequence[str], environ: Mapping[str, str] | None = None, prog: str = "moering") -> T:
    """Read `config` from flags, environment and file; raise `ConfigError` naming the offending key."""
    environ = os.environ if environ is None else environ
    hints = typing.get_type_hints(config)
    fields = {f.name: f for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    parser = argparse.ArgumentParser(
        prog=prog, description=(config.__doc__ or "").strip(), formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--config", default=argparse.SUPPRESS, help="YAML file with the same keys as the flags")
    for name, field in fields.items():
        _add_flag(parser, name, field, hints[name])
    flags = vars(parser.parse_args(list(argv)))
    path = flags.pop("config", environ.get("MOERING_CONFIG"))
    values: dict[str, Any] = _read_file(path, fields) if path else {}
    for name in fields:
        text = environ.get("MOERING_" + name.upper())
        if text is not None:
            values[name] = text
    values.update(flags)
    return config(**{name: _value(fields[name], hints[name], value) for name, value in values.items()})


def _add_flag(parser: argparse.ArgumentParser, name: str, field: dataclasses.Field[Any], hint: Any) -> None:
    meta, flag = field.metadata, "--" + name.replace("_", "-")
    shown = f"{meta.get('help', '')} (default: {field.default})"
    if meta.get("positional"):
        parser.add_argument(name, nargs="?", default=argparse.SUPPRESS, help=shown)
    elif hint is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=shown)
    else:
        parser.add_argument(flag, default=argparse.SUPPRESS, choices=meta.get("choices"), help=shown)


def _read_file(path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as f:
            content = yaml.safe_load(f) or {}
    except (OSError, yaml.YAMLError) as e:
        raise ConfigError(f"cannot read the configuration file {path}: {e}") from e
    if not isinstance(content, dict):
        raise ConfigError(f"the configuration file {path} is not a mapping of keys to values")
    keys = {str(k).replace("-", "_"): v for k, v in content.items()}
    unknown = sorted(set(keys) - set(fields))
    if unknown:
        raise ConfigError(f"unknown key in {path}: {', '.join(unknown)}")
    return keys


def _value(field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    value, choices = _convert(field.name, hint, value), field.metadata.get("choices")
    if choices and value not in choices:  # argparse sees the flags only
        raise ConfigError(f"{field.name}: {value!r} is not one of {', '.join(map(str, choices))}")
    return value


def _convert(name: str, hint: Any, value: Any) -> Any:
    """`value` (text from a flag or the environment, or a YAML value) as the annotated type of field `name`."""
    if isinstance(hint, types.UnionType):  # `T | None`
        if value is None or value == "":
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    try:
        if hint is bool:
            return _boolean(value)
        if typing.get_origin(hint) is tuple:  # tuple[str, ...], comma-separated
            items = value.split(",") if isinstance(value, str) else value
            return tuple(str(i).strip() for i in items if str(i).strip())
        return hint(str(value))  # by way of text: a YAML 8000.5 is no port, and true is no number
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{name}: {value!r} is not a valid {getattr(hint, '__name__', hint)}") from e


def _boolean(value: Any) -> bool:
    text = str(value).lower()
    if text not in _TRUE | _FALSE:
        raise ValueError(text)
    return text in _TRUE
