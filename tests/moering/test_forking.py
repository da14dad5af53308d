"""Processes that are forked from one that has imported PyTorch, under a supervisor."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from moering.forking import ForkedProcess, ForkServer
from moering.supervisor import StartFailed
from tests.integration.cluster import REPO
from tests.moering.stubs import DEADLINE_S, Mailbox, stub
from tests.moering.test_supervisor import supervised

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")


@pytest.fixture(autouse=True)
def stubs_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPO))


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
            assert " ".join(process.cmdline()).strip() == " ".join(["python", *command.argv(start)[1:]])
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


def test_a_fork_server_that_is_killed_just_as_it_has_answered_is_not_started_again(
    mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ForkServer._ask

    async def ask_and_kill(self: ForkServer, request: bytes, fds: Sequence[int]) -> int:
        pid = await ask(self, request, fds)
        self.kill()
        return pid

    monkeypatch.setattr(ForkServer, "_ask", ask_and_kill)
    with supervised(stub(mailbox.directory, "a", preload=True)) as running:
        preloaded = []
        for _ in range(3):
            _, pid = mailbox.started()["a"]
            preloaded.append(is_preloaded(pid))
            os.kill(pid, signal.SIGKILL)
            running.exits.get(timeout=DEADLINE_S)
    assert preloaded == [True, False, False]


def test_a_process_whose_start_was_given_up_does_not_run(mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork has happened, but the launcher fails to take it on: there must not be a second one beside it."""

    def fail(self: ForkedProcess, pid: int) -> None:
        forked.append(pid)
        raise OSError("no descriptors")

    forked: list[int] = []
    monkeypatch.setattr(ForkedProcess, "__init__", fail)
    with supervised(stub(mailbox.directory, "a", preload=True)) as running:
        _, pid = mailbox.started()["a"]
        assert os.waitstatus_to_exitcode(os.waitpid(forked[0], 0)[1]) == 1
        assert pid != forked[0]
        running.stop()
        running.join()
    assert mailbox.rest() == [("a", "told to stop"), ("a", "ends")]


def test_a_fork_server_that_fails_once_without_having_worked_is_done_without(
    mailbox: Mailbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(
        f"open({str(tmp_path / 'imports')!r}, 'a').write('x')\nraise ImportError('none')"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPO}")
    with supervised(stub(mailbox.directory, "a", preload=True)) as running:
        for _ in range(2):
            os.kill(mailbox.started()["a"][1], signal.SIGKILL)
            running.exits.get(timeout=DEADLINE_S)
        mailbox.started()
    assert (tmp_path / "imports").read_text() == "x"


def test_a_stop_does_not_wait_for_the_import(mailbox: Mailbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "importing")
    (tmp_path / "torch.py").write_text(
        f"open({str(tmp_path / 'importing')!r}, 'w').close()\nimport signal; signal.pause()"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPO}")
    with supervised(stub(mailbox.directory, "a", preload=True)) as running:
        (tmp_path / "importing").read_text()  # returns once it imports
        running.stop()
        running.join()
    assert mailbox.rest() == []


def test_arguments_and_environment_may_be_any_bytes(mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOERING_TEST", os.fsdecode(b"caf\xe9"))
    with supervised(stub(mailbox.directory, "a", preload=True)):
        assert is_preloaded(mailbox.started()["a"][1])
