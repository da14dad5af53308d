"""What an expert server does when it is told to stop, at moments that tests of processes rarely hit."""

import os
import subprocess
import sys
from pathlib import Path

from tests.moering.stubs import DEADLINE_S

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
    ended = subprocess.run(
        argv, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=env, timeout=DEADLINE_S, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
