"""Moves long work to a thread, as all streams would wait for it on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

MANY = 4096
"""Characters, tokens or numbers: this many take milliseconds."""


async def offload(size: int, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, which works on `size` characters, tokens or numbers: in a thread from `MANY` on."""
    if size < MANY:
        return function(*args)
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)
