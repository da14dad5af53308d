"""What the main functions of benches share: options in, figures out, one line for an error."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import aiohttp
import uvloop

from moering.config import parse
from moering.errors import MoeringError

Figures = dict[str, Any]


class HasOut(Protocol):
    """A bench's options: `out` is the directory for its figures and logs."""

    @property
    def out(self) -> str:
        """The directory; made if it is not there."""
        ...


C = TypeVar("C", bound=HasOut)


def run_bench(
    name: str,
    config_class: type[C],
    run: Callable[[C], Coroutine[Any, Any, Figures]],
    show: Callable[[Figures], str],
    argv: Sequence[str] | None,
) -> int:
    """Parse, run, print `show(figures)` and write them to ``<out>/<name>.json``. Returns the exit status."""
    try:
        config = parse(config_class, sys.argv[1:] if argv is None else argv, prog=f"python -m bench.{name}")
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        figures = uvloop.run(run(config))
    except (MoeringError, aiohttp.ClientError, TimeoutError) as e:
        print(f"bench.{name}: {type(e).__name__}: {e}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:  # by SIGTERM
        return 128 + signal.SIGTERM
    content = {"config": dataclasses.asdict(config), **figures}  # type: ignore[call-overload]
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(show(figures))
    return 0


def checkpoint_path(model: str) -> Path:
    """The directory that ``--model`` means; the default model is built when it is missing."""
    if model != "default":
        return Path(model).resolve()
    from moering.default_model import default_model_path  # building it needs imports that a directory does not

    return default_model_path()


def verdict(met: bool) -> str:
    """How tables say whether a bar was met."""
    return "met" if met else "MISSED"
