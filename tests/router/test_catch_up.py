"""Who starts waits for the routers of its machine that catch up, and for nobody else."""

import fcntl
import queue
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from moering.errors import ConfigError
from router import __main__ as main
from router.catch_up import HEARD_S, LOOK_S, CatchUp
from router.config import Config
from tests import tiny
from tests.router.mini_cluster import Client, MiniCluster

HOLDER = "import sys; from router.catch_up import CatchUp; c = CatchUp(sys.argv[1]); c.tell(True); print(1, flush=True)"
LONG_S, DEADLINE_S = 1000.0, 60.0


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "catch-up")


class Sleeper:
    """Sleeps for nobody: counts, and does something after so many times."""

    def __init__(self, **then: Callable[[], None]) -> None:
        self.times, self._then = 0, {int(name[1:]): action for name, action in then.items()}

    def __call__(self, seconds: float) -> None:
        self.times += 1
        self._then.get(self.times, lambda: None)()


def test_who_starts_waits_until_none_catches_up(path: str) -> None:
    one, other = CatchUp(path), CatchUp(path)
    one.tell(True)
    other.tell(True)
    sleep = Sleeper(_3=lambda: one.tell(False), _5=lambda: other.tell(False))
    assert CatchUp(path).wait(LONG_S, sleep) == pytest.approx(HEARD_S + 4 * LOOK_S)
    assert sleep.times == 5


def test_who_starts_gives_the_others_time_to_hear_of_the_streams(path: str) -> None:
    """The launcher may start a successor before a gateway has given the streams to another router."""
    other = CatchUp(path)
    sleep = Sleeper(_1=lambda: other.tell(True), _2=lambda: other.tell(False))
    CatchUp(path).wait(LONG_S, sleep)
    assert sleep.times == 2


def test_nobody_waits_for_ever(path: str) -> None:
    other = CatchUp(path)
    other.tell(True)
    assert 1.0 <= CatchUp(path).wait(1.0, Sleeper()) <= 1.0 + LOOK_S


def test_those_who_wait_do_not_hold_up_who_comes_to_catch_up(path: str) -> None:
    CatchUp(path).wait(LONG_S, Sleeper())
    other = CatchUp(path)
    with open(path) as looking:
        fcntl.flock(looking, fcntl.LOCK_EX)
        other.tell(True)  # does not block
    other.tell(True)
    assert CatchUp(path).wait(1.0, Sleeper()) >= 1.0


def test_a_dead_process_is_not_waited_for(path: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER + "; sys.stdin.read()", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
        assert CatchUp(path).wait(1.0, Sleeper()) >= 1.0
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert CatchUp(path).wait(LONG_S, Sleeper()) == HEARD_S


def test_a_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--catch-up-lock .*/away/lock: No such file"):
        CatchUp(str(tmp_path / "away" / "lock"))


@pytest.mark.parametrize(("flags", "waits"), [({"nice": True}, True), ({}, False)])
def test_a_router_that_starts_behind_others_waits_before_it_imports(
    path: str, monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], waits: bool
) -> None:
    seen = []

    class Module:
        def __getattr__(self, name: str) -> Callable[[Config], SimpleNamespace]:
            if name != "Router":
                raise AttributeError(name)
            seen.append("imported")
            return lambda config: SimpleNamespace(run=lambda: 7)

    def wait(self: CatchUp, at_most_s: float) -> float:
        seen.append("waited")
        return 0.0

    monkeypatch.setitem(sys.modules, "router.process", Module())  # type: ignore[arg-type]
    monkeypatch.setattr(CatchUp, "wait", wait)
    assert main.run(Config(catch_up_lock=path, **flags)) == 7
    assert seen == ["waited"] * waits + ["imported"]


def test_a_router_catches_up_from_the_submission_of_an_interrupted_stream_to_its_next_token(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: queue.Queue[bool] = queue.Queue()  # by the engine's thread, after what others may see
    tell, last = CatchUp.tell, [True]

    def spy(self: CatchUp, catching_up: bool) -> None:
        tell(self, catching_up)
        if last != [self._told]:
            last[0] = self._told
            told.put(self._told)

    monkeypatch.setattr(CatchUp, "tell", spy)
    cluster = MiniCluster(tmp_path, tiny.write_checkpoint(tmp_path / "checkpoint", layers=2), catch_up_lock=path)
    client = Client(cluster.address)
    try:
        client.submit("new", [5, 6, 7])
        client.until_ended(1)
        assert told.get(timeout=DEADLINE_S) is False
        client.tokens["moved"] = [(9, None)]  # what its client has
        client.submit("moved", [5, 6, 7], emitted=[9])
        client.until_ended(2)
        assert CatchUp(path).wait(LONG_S) < LONG_S
        assert [told.get(timeout=DEADLINE_S) for _ in range(2)] == [True, False]
        assert told.empty()
    finally:
        client.socket.close()
        cluster.close()
