from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from moering.config import option
from moering.errors import CheckpointError, ConfigError, HandshakeError
from moering.process import LAUNCHER_FD, LAUNCHER_PID, command_line, incarnation, run_main
from moering.telemetry import set_up_logging
from tests.moering.stubs import DEADLINE_S


@dataclass(frozen=True)
class Config:
    """A process."""

    id: str = option("stub-7", "name")
    size: int = option(1, "a number")


def test_the_exit_status_is_that_of_run() -> None:
    assert run_main("stub", Config, lambda config: config.size, ["--size", "5"]) == 5


def test_a_wrong_flag_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("stub", Config, lambda config: 0, ["--size", "many"]) == 2
    assert capsys.readouterr().err == "moering stub: size: 'many' is not a valid int\n"


def test_an_error_meant_for_a_person_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Config) -> int:
        raise HandshakeError("another version")

    assert run_main("stub", Config, run, []) == 1
    assert capsys.readouterr().err == "moering stub: another version\n"


def test_a_checkpoint_that_cannot_be_served_is_refused_as_a_wrong_flag_is(capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Config) -> int:
        raise CheckpointError("no shard 3")

    assert run_main("stub", Config, run, []) == 2
    assert capsys.readouterr().err == "moering stub: no shard 3\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_main("stub", Config, lambda config: 1 // 0, [])


BUG_IN_A_THREAD = """
import threading
from tests.moering.test_process import Config
from moering.process import run_main

def run(config):
    threading.Thread(target=lambda: 1 // 0).start()
    threading.Event().wait()

run_main("stub", Config, run, [])
"""


def test_a_bug_in_a_thread_ends_the_process_that_would_wait_for_it() -> None:
    argv, cwd = [sys.executable, "-c", BUG_IN_A_THREAD], Path(__file__).parents[2]
    ended = subprocess.run(argv, capture_output=True, text=True, cwd=cwd, timeout=DEADLINE_S, check=False)
    assert ended.returncode == 1 and "ZeroDivisionError" in ended.stderr


def test_log_lines_name_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Config) -> int:
        logging.getLogger("a.module").info("loaded %d", config.size)
        logging.getLogger("a.module").debug("not shown")
        return 0

    run_main("stub", Config, run, [])
    time, _, rest = capsys.readouterr().err.partition(" ")
    assert time.count(":") == 2
    assert rest == "INFO    stub-7 a.module: loaded 1\n"


def test_the_log_level(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOERING_LOG_LEVEL", "debug")
    set_up_logging("a")
    logging.getLogger("a.module").debug("shown")
    assert "shown" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="CHATTY"):
        set_up_logging("a", "chatty")


def test_incarnations_grow_and_fit_json() -> None:
    first = incarnation()
    while (later := incarnation()) >> 12 == first >> 12:  # until the next millisecond
        pass
    assert first < later < 1 << 53


def test_two_signals_end_a_process_that_drains() -> None:
    code = """
from moering.process import install_signal_handlers
import signal
install_signal_handlers(lambda: print("draining", flush=True))
print("started", flush=True)
while True:
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "draining\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 128 + signal.SIGINT


WATCH = """
from moering.process import watch_launcher
import signal
watch_launcher()
print("on", flush=True)
signal.pause()
"""


def test_the_end_of_the_launchers_pipe_ends_a_process() -> None:
    """The way that works where there is no parent-death signal: the parent lives on here."""
    read, write = os.pipe()
    env = {**os.environ, LAUNCHER_FD: str(read), LAUNCHER_PID: str(os.getpid())}
    argv = [sys.executable, "-c", WATCH]
    with subprocess.Popen(argv, env=env, pass_fds=[read], stdout=subprocess.PIPE, text=True) as process:
        os.close(read)
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        os.close(write)
        assert process.wait(DEADLINE_S) == 1


def test_a_launcher_that_died_before_the_watch_began_is_noticed() -> None:
    read, write = os.pipe()
    env = {**os.environ, LAUNCHER_FD: str(read), LAUNCHER_PID: "1"}
    argv = [sys.executable, "-c", WATCH]
    done = subprocess.run(argv, env=env, pass_fds=[read], stdout=subprocess.PIPE, timeout=DEADLINE_S, check=False)
    os.close(read)
    os.close(write)
    assert (done.returncode, done.stdout) == (1, b"")


def test_a_directory_of_the_same_name_is_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "moering").mkdir()
    (tmp_path / "moering" / "coordinator.py").write_text("print('not ours')")
    argv = [*command_line("coordinator"), "--help"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert "not ours" not in done.stdout
    assert done.stdout.startswith("usage: moering coordinator")
