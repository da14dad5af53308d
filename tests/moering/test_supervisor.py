from __future__ import annotations

import asyncio
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import pytest

from moering.supervisor import Command, Exit, Policy, StartFailed, Supervisor
from tests.integration.cluster import wait_for
from tests.moering.stubs import DEADLINE_S, Mailbox, stub

AT_ONCE = Policy(first_delay_s=0.0, same_request_s=0.0)


class Running:
    """A supervisor on a loop in a thread of its own, so that the test can block on what its processes report."""

    def __init__(self, commands: Sequence[Command], policy: Policy) -> None:
        self.exits: queue.Queue[Exit] = queue.Queue()
        self.order: list[str] = []
        self._commands = [replace(c, argv=partial(self._start, c.argv)) for c in commands]
        self._policy = policy
        self._made = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._made.wait(DEADLINE_S)

    async def _run(self) -> None:
        kinds = list(dict.fromkeys(c.kind for c in self._commands))
        self._loop = asyncio.get_running_loop()
        self.supervisor = Supervisor(self._commands, kinds, self._exit, self._policy)
        self._made.set()
        try:
            await self.supervisor.run()
        except StartFailed as e:
            self._error = e

    def _start(self, argv: Callable[[int], Sequence[str]], start: int) -> Sequence[str]:
        self.order.append(f"start {start}")
        return argv(start)

    def _exit(self, exit: Exit) -> None:
        self.order.append("exit")
        self.exits.put(exit)

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Call it on the loop, as all that a supervisor can do."""
        self._loop.call_soon_threadsafe(function, *args)

    def stop(self) -> None:
        self.call(self.supervisor.stop)

    def mark_ready(self) -> None:
        self.call(self.supervisor.mark_ready)

    def join(self) -> None:
        """Wait for the end; raise what it raised."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error


@contextmanager
def supervised(*commands: Command, policy: Policy = AT_ONCE) -> Iterator[Running]:
    running = Running(commands, policy)
    try:
        yield running
    finally:
        for _ in range(2):
            with suppress(RuntimeError):  # the loop is closed
                running.stop()
        running._thread.join(DEADLINE_S)


def test_a_killed_process_is_reported_and_started_again(mailbox: Mailbox) -> None:
    with supervised(stub(mailbox.directory, "a")) as running:
        first = mailbox.started()["a"]
        os.kill(first[1], signal.SIGKILL)
        exit = running.exits.get(timeout=DEADLINE_S)
        assert (exit.command.id, exit.pid, exit.code) == ("a", first[1], -signal.SIGKILL)
        second = mailbox.started()["a"]
        assert (first[0], second[0]) == (0, 1)
        assert second[1] != first[1]
        running.stop()
        running.join()
    assert running.exits.get_nowait().code == 0


def test_the_exit_is_reported_before_the_restart(mailbox: Mailbox) -> None:
    with supervised(stub(mailbox.directory, "a")) as running:
        os.kill(mailbox.started()["a"][1], signal.SIGKILL)
        mailbox.started()
        assert running.order == ["start 0", "exit", "start 1"]


def test_restart_delays_grow_to_a_limit() -> None:
    policy = Policy(first_delay_s=1.0, max_delay_s=10.0)
    assert [policy.delay_s(deaths) for deaths in range(1, 8)] == [0, 1, 2, 4, 8, 10, 10]


def test_the_second_death_in_a_row_waits(mailbox: Mailbox) -> None:
    with supervised(
        stub(mailbox.directory, "a"), policy=replace(AT_ONCE, first_delay_s=DEADLINE_S, max_delay_s=1e6)
    ) as running:
        for _ in range(2):
            os.kill(mailbox.started()["a"][1], signal.SIGKILL)
            running.exits.get(timeout=DEADLINE_S)
        running.stop()  # interrupts the wait
        running.join()
    assert mailbox.rest() == []


def test_a_long_life_is_forgiven(mailbox: Mailbox) -> None:
    every_life_is_long = replace(AT_ONCE, first_delay_s=1e6, max_delay_s=1e6, healthy_s=0.0)
    with supervised(stub(mailbox.directory, "a"), policy=every_life_is_long) as running:
        running.mark_ready()
        for start in range(4):
            number, pid = mailbox.started()["a"]
            assert number == start
            os.kill(pid, signal.SIGKILL)
        mailbox.started()


def test_however_long_a_process_takes_to_fail_its_start_fails(mailbox: Mailbox) -> None:
    every_life_is_long = replace(AT_ONCE, healthy_s=0.0, max_failed_starts=2)
    with supervised(stub(mailbox.directory, "a"), policy=every_life_is_long) as running:
        for _ in range(2):
            os.kill(mailbox.started()["a"][1], signal.SIGKILL)
        with pytest.raises(StartFailed, match="2 times in a row"):
            running.join()


def test_kinds_stop_one_after_the_other(mailbox: Mailbox) -> None:
    kinds = ("gateway", "router", "coordinator")
    with supervised(*(stub(mailbox.directory, kind, behaviour="stubborn") for kind in kinds)) as running:
        processes = mailbox.started(3)
        running.stop()
        for kind in kinds:
            assert mailbox.next()[:2] == (kind, "told to stop")
            assert mailbox.rest() == []
            os.kill(processes[kind][1], signal.SIGKILL)
            running.exits.get(timeout=DEADLINE_S)
        running.join()
    assert mailbox.all_dead(within_s=0)


def test_what_the_draining_kind_needs_is_kept_alive(mailbox: Mailbox) -> None:
    gateway, router = stub(mailbox.directory, "gateway", behaviour="stubborn"), stub(mailbox.directory, "router")
    with supervised(gateway, router) as running:
        processes = mailbox.started(2)
        running.stop()
        assert mailbox.next()[:2] == ("gateway", "told to stop")
        os.kill(processes["router"][1], signal.SIGKILL)
        assert mailbox.started()["router"][0] == 1
        os.kill(processes["gateway"][1], signal.SIGKILL)
        running.join()
    assert mailbox.rest() == [("router", "told to stop"), ("router", "ends")]


def test_a_second_stop_kills(mailbox: Mailbox) -> None:
    with supervised(stub(mailbox.directory, "a", behaviour="stubborn"), stub(mailbox.directory, "b")) as running:
        mailbox.started(2)
        running.stop()
        assert mailbox.next()[:2] == ("a", "told to stop")
        running.stop()
        running.join()
    assert running.supervisor.killed
    assert [running.exits.get_nowait().code for _ in range(2)] == [-signal.SIGKILL] * 2


def test_a_signal_that_arrives_twice_is_one_request(mailbox: Mailbox) -> None:
    one_request = replace(AT_ONCE, same_request_s=1e6)
    with supervised(stub(mailbox.directory, "a"), policy=one_request) as running:
        mailbox.started()
        running.stop()
        running.stop()
        running.join()
    assert not running.supervisor.killed
    assert mailbox.rest() == [("a", "told to stop"), ("a", "ends")]


def test_a_process_that_does_not_stop_in_time_is_killed(mailbox: Mailbox) -> None:
    with supervised(stub(mailbox.directory, "a", behaviour="stubborn"), policy=replace(AT_ONCE, stop_s=0.1)) as running:
        mailbox.started()
        running.stop()
        running.join()
    assert running.exits.get_nowait().code == -signal.SIGKILL
    assert not running.supervisor.killed


@pytest.mark.parametrize(("behaviour", "starts", "status"), [("fail", 3, 3), ("refuse", 1, 2)])
def test_a_process_that_never_works_ends_everything(mailbox: Mailbox, behaviour: str, starts: int, status: int) -> None:
    bad = stub(mailbox.directory, "bad", behaviour=behaviour)
    with supervised(bad, stub(mailbox.directory, "good")) as running:
        with pytest.raises(StartFailed, match=f"status {status}") as error:
            running.join()
        assert "bad cannot work like this" in str(error.value)
    assert [i for i, _ in mailbox.rest()].count("bad") == starts
    assert mailbox.all_dead(within_s=0)


def test_a_process_that_has_worked_is_never_given_up(mailbox: Mailbox) -> None:
    with supervised(stub(mailbox.directory, "a")) as running:
        running.mark_ready()
        for _ in range(2 * AT_ONCE.max_failed_starts):
            os.kill(mailbox.started()["a"][1], signal.SIGKILL)
        mailbox.started()


def test_one_that_is_added_again_before_it_has_stopped_is_started_again(mailbox: Mailbox) -> None:
    """As where a scaling is rolled back and tried once more: the new process gets the same id."""
    command = stub(mailbox.directory, "a", behaviour="stubborn")
    with supervised(command) as running:
        for start in range(2):  # it may be stopped and added again as often as one likes
            number, pid = mailbox.started()["a"]
            assert number == start
            running.call(running.supervisor.end, "a")
            assert mailbox.next()[:2] == ("a", "told to stop")
            running.call(running.supervisor.add, command)
            os.kill(pid, signal.SIGKILL)
        assert mailbox.started()["a"][0] == 2
        assert running.supervisor.ids == {"a"}


def test_one_that_is_let_go_between_two_starts_is_not_started_again(mailbox: Mailbox) -> None:
    class LetGo(Policy):
        def delay_s(self, deaths: int) -> float:
            running.supervisor.retire("a")
            return 0.0

    with supervised(stub(mailbox.directory, "a"), policy=LetGo()) as running:
        os.kill(mailbox.started()["a"][1], signal.SIGKILL)
        known = running.supervisor._children
        wait_for("it is let go, or started", lambda: not known or running.order[2:])
    assert running.order == ["start 0", "exit"]


def test_what_cannot_be_started_again_just_now_ends_nothing_else(
    mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, start = [BlockingIOError("no more processes"), OSError("no memory")], asyncio.create_subprocess_exec

    async def fail_first(*args: object, **options: object) -> object:
        if failures:
            raise failures.pop()
        return await start(*args, **options)  # type: ignore[arg-type]

    with supervised(stub(mailbox.directory, "a"), stub(mailbox.directory, "b")) as running:
        processes = mailbox.started(2)
        running.mark_ready()
        monkeypatch.setattr(asyncio, "create_subprocess_exec", fail_first)
        os.kill(processes["a"][1], signal.SIGKILL)
        assert mailbox.started()["a"][0] == 3
        assert running.exits.get_nowait().command.id == "a" and running.exits.empty()


def test_what_a_process_prints_is_passed_on_by_lines(mailbox: Mailbox, capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('x' * 200_000); print('out', flush=True); sys.stderr.write('no end of line'); sys.exit(2)"
    with supervised(Command("a", "a", lambda _: [sys.executable, "-c", code])) as running, pytest.raises(StartFailed):
        running.join()
    printed = capfd.readouterr().err
    assert "x" * 200_000 + "\nout\nno end of line" in printed
