"""Work beside the event loop, where all streams would wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

MANY = 4096
"""Characters, tokens or numbers: this many take milliseconds."""


async def aside(size: int, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, which works on so many of them: on `MANY` or more in a thread."""
    if size < MANY:
        return function(*args)
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)
