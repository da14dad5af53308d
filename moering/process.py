"""What the main functions of all processes share: start, signals, and death with the launcher. Torch-free.

A process's ``__main__.py`` is::

    def main(argv: Sequence[str] | None = None) -> int:
        return run_main("expert-server", Config, run, argv)

    if __name__ == "__main__":
        sys.exit(main())

where ``run(config: Config) -> int`` serves until it is told to stop and returns the exit status. Where other threads
may be in torch then, it is ``end(main())``.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn, TypeVar

from moering.config import parse
from moering.errors import CheckpointError, ConfigError, MoeringError
from moering.telemetry import set_up_logging

LAUNCHER_FD = "MOERING_LAUNCHER_FD"
"""Environment variable with the read end of a pipe whose write end only the launcher has: end of file is its death."""
LAUNCHER_PID = "MOERING_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1

MODULES = {
    "coordinator": "moering.coordinator",
    "gateway": "gateway",
    "router": "router",
    "expert-server": "expert_server",
}
"""The module that ``python -m`` runs for each kind of process."""

C = TypeVar("C")
logger = logging.getLogger(__name__)


def run_main(kind: str, config_class: type[C], run: Callable[[C], int], argv: Sequence[str] | None = None) -> int:
    """Read the configuration, set up logging, watch the launcher, and `run(config)`. Returns the exit status.

    A `ConfigError` or `CheckpointError` is one line on stderr and status 2: starting again cannot help. Any other
    `MoeringError` is one line and status 1; other exceptions, in whatever thread, are bugs and end the process with
    their traceback. Log lines carry the config's ``id`` where it has one, else `kind`. The file that its ``key`` names,
    where it has one, protects all zmq sockets.
    """
    watch_launcher()
    share_cores()
    prog = f"moering {kind}"
    before, threading.excepthook = threading.excepthook, _end_with_thread
    try:
        config = parse(config_class, sys.argv[1:] if argv is None else argv, prog=prog)
        set_up_logging(getattr(config, "id", None) or kind)
        _use_key(getattr(config, "key", ""))
        return run(config)
    except MoeringError as e:
        print(f"{prog}: {e}", file=sys.stderr, flush=True)
        return 2 if isinstance(e, ConfigError | CheckpointError) else 1
    except KeyboardInterrupt:  # before signal handlers were installed
        return 128 + signal.SIGINT
    finally:
        threading.excepthook = before


def share_cores() -> None:
    """Have OpenMP's threads sleep while they have nothing to do; to be called before anything loads it.

    By default they spin for a while first, on cores that other processes of the machine need.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _use_key(path: str) -> None:
    if path:
        from moering import transport  # only here: commands that speak HTTP need no zmq
        from moering.cluster_key import ClusterKey

        transport.use_key(ClusterKey.read(path))


def _end_with_thread(args: threading.ExceptHookArgs) -> None:
    """A process that has lost a thread to a bug, or for want of memory, hangs and looks alive: end it, so that it is
    replaced."""
    if args.exc_type is not SystemExit:
        threading.__excepthook__(args)
        os._exit(1)


def end(status: int) -> NoReturn:
    """End this process at once, whatever its threads are at: one that comes back from torch while the interpreter ends
    aborts the process.

    A message that was sent just before may be lost: closing the service took long enough for a `Leave`.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def command_line(kind: str) -> list[str]:
    """How a process of a kind is started, without its flags."""
    return python(MODULES[kind])


def python(module: str) -> list[str]:
    """How a module of ours is run."""
    # -P: a directory called `router` where the user stands must not be taken for ours. A native crash says where.
    return [sys.executable, "-P", "-X", "faulthandler", "-m", module]


def incarnation() -> int:
    """A number for this start of a process: unique, larger at each later start, and exact in JSON (53 bits)."""
    return time.time_ns() // 1_000_000 << 12 | secrets.randbits(12)


def install_signal_handlers(on_stop: Callable[[], None]) -> None:
    """Call `on_stop` at the first SIGTERM or SIGINT (begin to drain); a second one ends the process at once.

    For processes whose main thread runs Python code or a blocking poll. `on_stop` runs in the main thread between two
    byte codes, and a blocking poll goes on afterwards: let it write to something that is polled. On an asyncio loop
    let it be ``lambda: loop.call_soon_threadsafe(…)``. It may take no lock that the main thread takes, of an `Event`
    for example, nor log: that may be what it interrupts. What needs that is for a thread that it starts.
    """
    stopping = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            os._exit(128 + signum)
        stopping = True
        on_stop()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def watch_launcher() -> None:
    """Make this process die with the launcher that started it; without a launcher, do nothing.

    Two ways, because each has a hole: the pipe works everywhere but needs this process to run Python code, while
    Linux's parent-death signal also ends a process that is stopped or inside a long native call.
    """
    text = os.environ.pop(LAUNCHER_FD, None)
    if text is None:
        return
    fd = int(text)
    os.set_inheritable(fd, False)
    die_with_launcher()
    threading.Thread(target=_exit_at_eof, args=(fd,), name="launcher-watch", daemon=True).start()


def die_with_launcher() -> None:
    """The second of the two ways alone: it needs no thread."""
    launcher = int(os.environ.pop(LAUNCHER_PID, "0"))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:  # it died before the signal was asked for
        os._exit(1)


def _exit_at_eof(fd: int) -> None:
    while os.read(fd, 1):  # nothing is ever written
        pass
    os._exit(1)  # at once: nobody is left to wait for an orderly end
