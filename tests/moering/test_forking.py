"""Processes that are forked from one that has imported PyTorch, under a supervisor."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from moering.supervisor import StartFailed
from tests.moering.stubs import DEADLINE_S, ROOT, Mailbox, stub
from tests.moering.test_supervisor import supervised

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")


@pytest.fixture(autouse=True)
def stubs_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def is_preloaded(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def fork_server() -> psutil.Process:
    (found,) = [p for p in psutil.Process().children() if "moering.fork_server" in p.cmdline()]
    return found


def test_a_forked_process_is_a_child_like_any_other(mailbox: Mailbox) -> None:
    command = stub(mailbox.directory, "a", preload=True)
    with supervised(command) as running:
        for start in range(2):
            number, pid = mailbox.started()["a"]
            process = psutil.Process(pid)
            assert number == start
            assert is_preloaded(pid)
            assert process.ppid() == os.getpid()
            assert os.getpgid(pid) == pid
            assert " ".join(process.cmdline()).strip() == " ".join(command.argv(start))
            if start == 0:
                os.kill(pid, signal.SIGKILL)
                exit = running.exits.get(timeout=DEADLINE_S)
                assert (exit.command.id, exit.pid, exit.code) == ("a", pid, -signal.SIGKILL)
        server = fork_server()
        running.stop()
        running.join()
        assert not server.is_running()
    assert running.exits.get_nowait().code == 0


def test_a_forked_process_that_refuses_its_flags_is_heard(mailbox: Mailbox) -> None:
    with (
        supervised(stub(mailbox.directory, "bad", behaviour="refuse", preload=True)) as running,
        pytest.raises(StartFailed, match=r"status 2(.|\n)*bad cannot work like this"),
    ):
        running.join()


def test_without_its_fork_server_a_process_starts_by_itself(mailbox: Mailbox) -> None:
    with supervised(stub(mailbox.directory, "a", preload=True)) as running:
        preloaded = []
        for start in range(3):
            _, pid = mailbox.started()["a"]
            preloaded.append(is_preloaded(pid))
            if start == 0:
                fork_server().kill()
            os.kill(pid, signal.SIGKILL)
            assert running.exits.get(timeout=DEADLINE_S).code == -signal.SIGKILL
    assert preloaded == [True, False, True]
