"""A process that has imported PyTorch and forks those that need it: `python -m moering.fork_server`.

That import is half of what the start of a router or an expert server costs: about 2 s of a core, which on a small
machine those miss that serve meanwhile. It is done once here, and its memory is shared by all who are forked. Of ours
hardly anything is imported, so that a restart of a process still starts what is installed by then.

There is one thread: a fork copies no other, but it copies the locks that others hold. What is forked becomes a child of
the launcher and not of this process: it is an orphan for a moment, and orphans go to their nearest ancestor that is a
*subreaper* (`prctl(2)`). So the launcher reaps it as it reaps the others, and this process may die without any harm.

Requests come over the socket that is standard input here: a MessagePack list of command line and environment, with
three descriptors: for the new process's output, the launcher's pipe, and a pipe from which it reads one byte before it
does anything. The answer is its process id, or why there is none. Whoever asked then gives the byte, or, when he has
given up meanwhile, the end of the file: so a process runs once or not at all, whoever dies when.
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

import msgpack
from setproctitle import setproctitle

from moering.process import LAUNCHER_FD, die_with_launcher, share_cores

PRELOADED = "torch"
DESCRIPTORS = 3
MAX_REQUEST_BYTES = 1 << 17
"""Below Linux's default limit of a message on a Unix socket, 212,992 bytes."""
MAX_ANSWER_BYTES = 1 << 10
ROOM_FOR_TITLE = {"MOERING_ROOM": " " * 4096}
"""To be in the environment of a fork server: the title of a forked process takes the place of that."""
ANY_BYTES = "surrogateescape"  # arguments and environment of any bytes are strings to Python in this way


def encode_request(argv: Sequence[str], env: Mapping[str, str]) -> bytes:
    """A request for the process `argv`, which is ``python … -m MODULE FLAGS…``. Raises OSError where it is too long."""
    request: bytes = msgpack.packb([list(argv), dict(env)], unicode_errors=ANY_BYTES)
    if len(request) > MAX_REQUEST_BYTES:
        raise OSError(f"command line and environment take {len(request)} bytes, more than {MAX_REQUEST_BYTES}")
    return request


def main() -> None:
    """Serve until the launcher's end of the socket is closed. In each forked process: run what was asked for."""
    die_with_launcher()
    share_cores()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would keep us from waiting for a child
    control = socket.socket(fileno=os.dup(0))
    try:
        importlib.import_module(PRELOADED)
    except ImportError as e:  # those who need it will say so
        sys.exit(f"fork server: {e}")
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit(f"fork server: importing {PRELOADED} starts threads here, so that it is not safe to fork")
    gc.collect()
    gc.freeze()  # so that the collectors of the forked do not write to what they share
    while True:
        request, fds, *_ = socket.recv_fds(control, MAX_REQUEST_BYTES, DESCRIPTORS)
        if not request:
            return
        argv, env = msgpack.unpackb(request, unicode_errors=ANY_BYTES)
        answer: int | str
        try:
            answer = _fork()
        except OSError as e:
            answer = str(e)
        if answer == 0:
            control.close()
            output, launcher, go = fds
            if not os.read(go, 1):
                os._exit(1)
            os.close(go)
            _become(argv, env, output, launcher)
        for fd in fds:
            os.close(fd)
        control.send(msgpack.packb(answer))


def _fork() -> int:
    """The id of the new process, which is the launcher's child; in that one 0. Raises OSError."""
    told, tell = os.pipe()
    between = os.fork()
    if between == 0:
        try:
            if os.fork():
                os._exit(0)
        except OSError:
            os._exit(1)
        os.write(tell, msgpack.packb(os.getpid()))
        os.close(told)
        os.close(tell)
        return 0
    os.close(tell)
    os.waitpid(between, 0)
    answer = os.read(told, MAX_ANSWER_BYTES)
    os.close(told)
    if not answer:
        raise OSError("no more processes")
    pid: int = msgpack.unpackb(answer)
    return pid


def _become(argv: Sequence[str], env: Mapping[str, str], output: int, launcher: int) -> NoReturn:
    os.setpgid(0, 0)
    # What `ps` shows, as if it had been started by this command. First of all: it goes where argv and environ are.
    setproctitle(" ".join([os.path.basename(argv[0]), *argv[1:]]))
    null = os.open(os.devnull, os.O_RDWR)
    for fd, standard in ((null, 0), (output, 1), (output, 2)):
        os.dup2(fd, standard)
    os.close(null)
    os.close(output)
    os.environ.clear()
    os.environ.update(env)
    os.environ[LAUNCHER_FD] = str(launcher)
    at = argv.index("-m")
    sys.argv = list(argv[at + 1 :])
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    main()
