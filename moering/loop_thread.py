"""A coroutine on a thread with an event loop of its own, for processes whose main thread does not run one."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any

CLOSE_S = 3.0


class LoopThread:
    """Runs ``main()`` from `start` until `close`, which cancels it."""

    def __init__(self, name: str, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._main = main
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None]
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._until_cancelled(), name=self._thread.name)
        self._thread.start()

    def call(self, function: Callable[[], object]) -> None:
        """Call `function` on the thread soon; nothing happens before its start and after its end."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # closed
                self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """Cancel ``main()`` and wait for its end, `CLOSE_S` at most."""
        if self._thread.is_alive():
            self.call(self._task.cancel)
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        assert self._loop is not None
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._task)

    async def _until_cancelled(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await self._main()
