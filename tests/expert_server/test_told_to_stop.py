"""What an expert server does when it is told to stop, at moments that tests of processes rarely hit."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from expert_server import process as product
from expert_server.config import Config
from expert_server.process import ExpertServer
from moering.protocol import MemberInfo, View
from tests.integration.cluster import REPO, wait_for
from tests.moering.stubs import DEADLINE_S
from tests.tiny import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def server(checkpoint, tmp_path):
    """One without a lease, whose coordinator knows a router and another expert server."""
    s = ExpertServer(Config(str(checkpoint), bind=f"ipc://{tmp_path}/e", id="e0", nice=False))
    s.routers.start()
    s.service.start()
    yield s
    s._stop.set()
    s.service.close()


def view_of(server):
    """All experts are `server`'s."""
    c = server.checkpoint
    table = np.zeros((c.num_layers, c.num_experts, 1), "<i2").tobytes()
    others = [MemberInfo(kind, kind, 1, "", 0, "ONLINE", "", 9, 0) for kind in ("router", "expert-server")]
    members = [server._identity, *others]
    return View(1, 1, members, [server.id], c.num_layers, c.num_experts, 1, table, table, 1, 0, 0, 0)


def test_a_signal_is_taken_while_the_main_thread_has_the_lock_that_it_waits_with(server):
    """For a moment it has, whenever it begins or ends to wait."""
    handler = threading.Thread(target=server._terminate)
    with server._stop._cond:
        handler.start()
        handler.join(DEADLINE_S / 10)
        taken = not handler.is_alive()
    assert taken
    assert server._stop.wait(DEADLINE_S)  # it was joining


def test_a_signal_is_not_forgotten_over_a_view_that_wants_no_drain(server, monkeypatch):
    server.state = "ONLINE"

    def look(view, own):
        monkeypatch.setattr(product, "told_to_drain", lambda view, own: False)
        server._terminate()  # just now
        return False

    monkeypatch.setattr(product, "told_to_drain", look)
    server._on_view(view_of(server))
    wait_for("it drains", lambda: server.state == "DRAINING")
    server._on_view(view_of(server))
    assert server.state == "DRAINING" and not server._stop.is_set()


ENDS_WHILE_LOADING = """
import runpy, threading, torch
from moering import process

begun, rows = threading.Event(), torch.ones(300, 300)

def load():
    while True:
        torch.mm(rows, rows)
        begun.set()

def run(*args):
    threading.Thread(target=load, daemon=True).start()
    begun.wait()
    return 0

process.run_main = run
runpy.run_module("expert_server", run_name="__main__")
"""


def test_a_process_that_ends_while_it_loads_ends_with_its_own_status():
    argv, env = [sys.executable, "-c", ENDS_WHILE_LOADING], os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(argv, capture_output=True, text=True, cwd=REPO, env=env, timeout=DEADLINE_S, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
