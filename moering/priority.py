"""Work at low priority, on a thread of its own: without privileges no thread can raise its priority again."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def at_low_priority(work: Callable[[], T]) -> T:
    """The result of `work`, or what it raised. The priority is that of a thread on Linux; elsewhere it stays."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            if sys.platform == "linux":
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
            future.set_result(work())
        except BaseException as e:  # whatever it is, it belongs to who waits
            future.set_exception(e)

    # A daemon, as a process that is told to stop does not wait for the end of its loading.
    threading.Thread(target=run, name="background", daemon=True).start()
    return future.result()
