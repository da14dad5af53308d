"""The launcher's side of the fork server: starts it, asks it for processes, and waits for those. Linux only.

What it forks become children of this process (`moering.fork_server` says how), which waits for each through a file
descriptor of the process (`pidfd_open(2)`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
from collections.abc import Mapping, Sequence

import msgpack

from moering import fork_server
from moering.process import LAUNCHER_PID, python

ANSWER_S = 60.0
"""For the import of PyTorch, too. One that takes longer, or has been stopped, is done without."""
_PR_SET_CHILD_SUBREAPER = 36


def can_fork() -> bool:
    """Whether this system has what forking needs."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):  # not Linux, or one from before 5.3
        return False
    return True


class ForkedProcess:
    """A running child; as much of `asyncio.subprocess.Process` as a supervisor needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        self._fd = os.pidfd_open(pid)
        loop.add_reader(self._fd, self._reap, loop)

    async def wait(self) -> int:
        """The exit status, or the negative number of the signal that ended it."""
        return int(await asyncio.shield(self._ended))

    def _reap(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(self._fd)
        os.close(self._fd)
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._ended.set_result(self.returncode)


def send_signal(process: asyncio.subprocess.Process | ForkedProcess | None, number: int) -> None:
    """Signal a child that has not been reaped; nothing happens where there is none."""
    if process is not None and process.returncode is None:
        # Not asyncio's own: it polls first, and may so take the exit status that asyncio's waiter waits for.
        with contextlib.suppress(ProcessLookupError):  # it ended a moment ago; that has not reached the loop yet
            os.kill(process.pid, number)


class ForkServer:
    """The fork server: started when it is first needed, and again after its death, unless it has never worked. To be
    used on a running loop."""

    def __init__(self) -> None:
        self._asking = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._works: bool | None = None  # None until it has answered, or has failed to

    async def start(self, argv: Sequence[str], env: Mapping[str, str], output: int, launcher: int) -> ForkedProcess:
        """Start ``python … -m MODULE FLAGS…`` in a process group of its own, to print to the descriptor `output` and to
        die with the pipe `launcher`. Raises OSError when it cannot be started so: then it has not been started."""
        request = fork_server.encode_request(argv, env)
        async with self._asking:
            if self._works is False:
                raise OSError("there is no fork server")
            go, let_go = os.pipe()
            try:
                async with asyncio.timeout(ANSWER_S):
                    pid = await self._ask(request, [output, launcher, go])
                process = ForkedProcess(pid)
                os.write(let_go, b"1")
            except OSError:
                self._works = bool(self._works)
                await self._end_server()
                raise
            finally:
                os.close(go)
                os.close(let_go)
            if self._works is None:  # else it may have been killed meanwhile
                self._works = True
            return process

    def kill(self) -> None:
        """From now on there is no fork server: a `start` that waits for it fails. What it has forked goes on."""
        self._works = False
        send_signal(self._process, signal.SIGKILL)

    async def close(self) -> None:
        """`kill`, and wait for its end."""
        self.kill()
        async with self._asking:
            await self._end_server()
        _set_subreaper(False)

    async def _ask(self, request: bytes, fds: Sequence[int]) -> int:
        control = self._control or await self._start_server()
        socket.send_fds(control, [request], fds)
        answer = await asyncio.get_running_loop().sock_recv(control, fork_server.MAX_ANSWER_BYTES)
        pid: int | str = msgpack.unpackb(answer) if answer else "the fork server is gone"
        if isinstance(pid, str):
            raise OSError(pid)
        return pid

    async def _start_server(self) -> socket.socket:
        _set_subreaper(True)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        # The pool of threads that numpy's OpenBLAS starts when it is loaded would be in the way of a fork.
        own = {LAUNCHER_PID: str(os.getpid()), "OPENBLAS_NUM_THREADS": "1", **fork_server.ROOM_FOR_TITLE}
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *python("moering.fork_server"), stdin=theirs.fileno(), env={**os.environ, **own}, process_group=0
            )
        return self._control

    async def _end_server(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            send_signal(self._process, signal.SIGKILL)
            await self._process.wait()
            self._process = None


def _set_subreaper(on: bool) -> None:
    """Whether processes whose parent died become children of this one."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)
