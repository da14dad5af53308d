"""Keeps child processes running: starts them, restarts the dead with growing delays, stops them in order.

Nothing here knows what the processes do. Every child is started from the main thread, because Linux's parent-death
signal (see `moering.process.watch_launcher`) is tied to the thread that forks; in its own process group, so that a
Ctrl-C in a terminal reaches the launcher alone and the order of the stop is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from moering.errors import MoeringError
from moering.forking import ForkedProcess, ForkServer, send_signal
from moering.process import LAUNCHER_FD, LAUNCHER_PID

logger = logging.getLogger(__name__)

TAIL_LINES = 20
LAST_LINES_S = 1.0
MAX_LINE_BYTES = 1 << 16
USAGE_STATUS = 2
"""Exit status of a process that refuses its configuration or the checkpoint: starting it again cannot help."""


@dataclass(frozen=True)
class Command:
    """One process to keep running. `argv(n)` is the command line of its n-th start, n counted from 0."""

    id: str
    kind: str
    argv: Callable[[int], Sequence[str]]
    fds: tuple[int, ...] = ()  # file descriptors that the process inherits
    env: Mapping[str, str] = field(default_factory=dict)  # in addition to the launcher's own
    preload: bool = False  # to be forked from a process that has imported PyTorch

    def __post_init__(self) -> None:
        assert not (self.preload and self.fds), "what is forked inherits no descriptors"


@dataclass(frozen=True)
class Exit:
    """A child was reaped. `code` is its exit status, or the negative number of the signal that ended it."""

    command: Command
    pid: int
    code: int

    def __str__(self) -> str:
        how = f"status {self.code}" if self.code >= 0 else signal.Signals(-self.code).name
        return f"{self.command.id} (pid {self.pid}) ended with {how}"


@dataclass(frozen=True)
class Policy:
    """When a dead child is started again, and how long a stop may take."""

    first_delay_s: float = 1.0  # of the second restart in a row; the first is immediate, each later delay doubles
    max_delay_s: float = 10.0
    healthy_s: float = 10.0  # once all were ready, a child that lived this long starts again without a delay
    orderly_s: float = 1.0  # so does one that exited with status 0 after so long: it was told to
    max_failed_starts: int = 3  # deaths in a row of a child that was never ready: give up
    stop_s: float = 30.0  # for each kind at a stop, then SIGKILL
    same_request_s: float = 1.0  # stop requests this close are one: `make` and `timeout` pass on what a group gets too

    def delay_s(self, deaths: int) -> float:
        """Seconds to wait after the `deaths`-th death in a row, counted from 1."""
        return 0.0 if deaths <= 1 else min(self.first_delay_s * 2.0 ** (deaths - 2), self.max_delay_s)


class StartFailed(MoeringError):
    """A child died again and again before it was ever ready. The text holds the last lines it printed."""


@dataclass(eq=False)
class _Child:
    command: Command
    process: asyncio.subprocess.Process | ForkedProcess | None = None
    started_s: float = 0.0  # time.monotonic()
    deaths: int = 0  # in a row
    was_ready: bool = False
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    tail: deque[bytes] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))

    def signal(self, number: int) -> None:
        send_signal(self.process, number)


class Supervisor:
    """Runs `commands`, started in the given order and stopped kind by kind in the order of `stop_order`.

    `stop_order` names each kind that occurs, once. `on_exit` hears of every child that is reaped, before it is started
    again. Children may be added and let go while it runs. To be made, and used, on the running loop of the main thread.
    """

    def __init__(
        self,
        commands: Sequence[Command],
        stop_order: Sequence[str],
        on_exit: Callable[[Exit], None],
        policy: Policy = Policy(),
    ) -> None:
        self._children = {c.id: _Child(c) for c in commands}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._starts: Counter[str] = Counter()  # by id: one that comes back after it was let go is counted on
        self._retired: set[str] = set()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stop_order, self._on_exit, self._policy = stop_order, on_exit, policy
        self._stop_from: float | None = None  # time.monotonic() of the first stop request
        self._ending = False  # from now on SIGKILL
        self.killed = False  # whether a second one cut the first short
        self._stop_requested = asyncio.Event()
        self._launcher_fd, self._launcher_pipe = os.pipe()
        self._fork_server = ForkServer()

    async def run(self) -> None:
        """Supervise until `stop` was called and all children are gone. Raises `StartFailed`; leaves no child."""
        for child in self._children.values():
            self._begin(child)
        stop = asyncio.create_task(self._stop_in_order())
        try:
            await asyncio.wait([stop, self._failure], return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                self._failure.result()
            await stop
        finally:
            stop.cancel()
            self._kill()
            await asyncio.gather(stop, *self._tasks.values(), return_exceptions=True)
            self._failure.cancel()
            await self._fork_server.close()
            os.close(self._launcher_pipe)
            os.close(self._launcher_fd)

    @property
    def ids(self) -> set[str]:
        """The children that are kept running."""
        return self._children.keys() - self._retired

    def add(self, command: Command) -> None:
        """Keep one more process running; nothing happens if there is one of this id, or during a stop. One that is
        being stopped or let go is started again when it has exited."""
        self._retired.discard(command.id)
        if command.id not in self._children and self._stop_from is None:
            child = self._children[command.id] = _Child(command, was_ready=True)
            self._begin(child)

    def retire(self, server_id: str) -> None:
        """Do not start this one again when it exits."""
        if server_id in self._children:
            self._retired.add(server_id)

    def end(self, server_id: str) -> None:
        """Stop this one, by SIGKILL if need be, and do not start it again."""
        child = self._children.get(server_id)
        if child is not None and not child.stopping.is_set():
            logger.info("stopping: %s", server_id)
            self._retired.add(server_id)
            child.stopping.set()
            child.signal(signal.SIGTERM)
            asyncio.get_running_loop().call_later(self._policy.stop_s, child.signal, signal.SIGKILL)

    def stop(self) -> None:
        """Begin to stop; a second call, from `Policy.same_request_s` later on, kills what is left."""
        now = time.monotonic()
        if self._stop_from is None:
            self._stop_from = now
            self._stop_requested.set()
        elif now - self._stop_from >= self._policy.same_request_s:
            self.killed = True
            self._kill()

    def mark_ready(self) -> None:
        """All children work together: from now on a death is answered by a restart, however often it happens."""
        for child in self._children.values():
            child.was_ready = True

    def _kill(self) -> None:
        self._ending = True
        self._fork_server.kill()
        for child in self._children.values():
            child.stopping.set()
            child.signal(signal.SIGKILL)

    def _begin(self, child: _Child) -> None:
        task = self._tasks[child.command.id] = asyncio.create_task(self._supervise(child), name=child.command.id)
        task.add_done_callback(lambda task: self._ended(child, task))

    def _ended(self, child: _Child, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            if not self._failure.done():
                self._failure.set_exception(error)
        elif child.command.id in self._retired:
            del self._children[child.command.id], self._tasks[child.command.id]
        elif self._stop_from is None and not self._ending:  # it was added again before it was gone
            del self._children[child.command.id]
            self.add(child.command)

    async def _supervise(self, child: _Child) -> None:
        while not (child.stopping.is_set() or child.command.id in self._retired):
            try:
                exit = await self._run_once(child)
            except OSError as e:  # no memory, or no more processes or descriptors: what runs is not to end by that
                if not child.was_ready:
                    raise
                child.deaths += 1
                await self._rest(child, f"cannot start {child.command.id} ({e})")
                continue
            if exit is None or child.stopping.is_set():
                return
            if child.command.id in self._retired:
                logger.info("%s; it is not started again", exit)
                return
            lived_s = time.monotonic() - child.started_s
            orderly = exit.code == 0 and lived_s >= self._policy.orderly_s
            healthy = child.was_ready and lived_s >= self._policy.healthy_s
            child.deaths = 1 if orderly or healthy else child.deaths + 1
            self._give_up_if_hopeless(child, exit)
            await self._rest(child, exit)

    async def _rest(self, child: _Child, why: object) -> None:
        """Between two starts: as long as the policy says, or until it is to stop."""
        delay_s = self._policy.delay_s(child.deaths)
        logger.warning("%s; starting it again %s", why, f"in {delay_s:g} s" if delay_s else "at once")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(child.stopping.wait(), delay_s)

    async def _run_once(self, child: _Child) -> Exit | None:
        """Start the child, pass on what it prints, and reap it. None if it was to stop before it could be started."""
        output, output_end = os.pipe()
        printing = asyncio.create_task(_pass_on(output, child.tail))
        try:
            process = await self._spawn(child, output_end)
        finally:
            os.close(output_end)
        if process is None:
            printing.cancel()
            return None
        exit = Exit(child.command, process.pid, await process.wait())
        self._on_exit(exit)
        # Its last lines; not for ever, since a process that it left behind may hold the pipe open.
        await asyncio.wait([printing], timeout=LAST_LINES_S)
        printing.cancel()
        return exit

    async def _spawn(self, child: _Child, output: int) -> asyncio.subprocess.Process | ForkedProcess | None:
        command = child.command
        argv = command.argv(self._starts[command.id])
        self._starts[command.id] += 1
        child.tail.clear()
        env = {**os.environ, **command.env, LAUNCHER_FD: str(self._launcher_fd), LAUNCHER_PID: str(os.getpid())}
        child.process = None
        if command.preload:
            try:
                child.process = await self._fork_server.start(argv, env, output, self._launcher_fd)
            except OSError as e:
                if child.stopping.is_set():
                    return None
                logger.warning("cannot fork %s (%s): starting it by itself", command.id, e)
        if child.process is None:
            child.process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=env,
                pass_fds=[self._launcher_fd, *command.fds],
                process_group=0,
            )
        child.started_s = time.monotonic()
        logger.info("started %s (pid %d)", command.id, child.process.pid)
        if child.stopping.is_set():  # asked for while the process was being started
            child.signal(signal.SIGKILL if self._ending else signal.SIGTERM)
        return child.process

    def _give_up_if_hopeless(self, child: _Child, exit: Exit) -> None:
        refused = exit.code == USAGE_STATUS
        if child.was_ready or not (refused or child.deaths >= self._policy.max_failed_starts):
            return
        times = "" if refused else f", {child.deaths} times in a row,"
        lines = b"".join(child.tail).decode(errors="replace").strip()
        raise StartFailed(f"{exit}{times} before it was ready. It said:\n{lines}")

    async def _stop_in_order(self) -> None:
        await self._stop_requested.wait()
        self._fork_server.kill()  # it may be importing yet, and who waits for it shall not
        for kind in self._stop_order:
            children = [c for c in self._children.values() if c.command.kind == kind]
            stage = [(c, self._tasks[c.command.id]) for c in children]
            if not stage:
                continue
            logger.info("stopping: %s", ", ".join(c.command.id for c in children))
            for child, _ in stage:
                child.stopping.set()
                child.signal(signal.SIGTERM)
            _, late = await asyncio.wait([t for _, t in stage], timeout=self._policy.stop_s)
            for child, task in stage:
                if task in late:
                    logger.warning("%s did not stop in %g s; killing it", child.command.id, self._policy.stop_s)
                    child.signal(signal.SIGKILL)
            await asyncio.wait([t for _, t in stage])


async def _pass_on(output: int, tail: deque[bytes]) -> None:
    """Copy whole lines to stderr, so that lines of several processes do not mix, and keep the last ones in `tail`."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    pipe = os.fdopen(output, "rb", buffering=0)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    rest = b""
    try:
        while chunk := await reader.read(MAX_LINE_BYTES):
            rest += chunk
            end = rest.rfind(b"\n") + 1 if len(rest) < MAX_LINE_BYTES else len(rest)
            _print(rest[:end], tail)
            rest = rest[end:]
        _print(rest, tail)
    finally:
        transport.close()


def _print(lines: bytes, tail: deque[bytes]) -> None:
    tail.extend(lines.splitlines(keepends=True))
    with contextlib.suppress(OSError):  # nobody reads our stderr any more: the children must not block on that
        sys.stderr.buffer.write(lines)
        sys.stderr.buffer.flush()
