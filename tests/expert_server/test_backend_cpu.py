"""How much memory loading takes on a CPU beside what is loaded."""

import subprocess
import sys

from tests.integration.cluster import REPO
from tests.moering.stubs import DEADLINE_S

LOADS = """
from pathlib import Path

import numpy as np

from expert_server.backend_cpu import CpuBackend
from expert_server.memory import release_free_memory
from moering.checkpoint import ExpertWeights, RawTensor

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10

def read(rows, columns):
    return RawTensor("F16", (rows, columns), np.ones(2 * rows * columns, np.uint8))

backend = CpuBackend("auto", 1)
backend.fingerprint
release_free_memory()
before, loaded = memory("VmRSS"), []
for _ in range(60):
    loaded.append(backend.load(ExpertWeights(read(768, 576), read(768, 576), read(576, 768), b"")))
release_free_memory()
print(memory("VmHWM") - before, memory("VmRSS") - before)
"""


def test_loading_takes_hardly_more_than_what_is_loaded():
    """60 experts of the default model's size; without releases on the way it is 80 MB more."""
    done = subprocess.run(
        [sys.executable, "-c", LOADS], capture_output=True, text=True, cwd=REPO, timeout=DEADLINE_S, check=True
    )
    peak, after = map(int, done.stdout.split())
    assert peak - after < 50_000_000, (peak, after)
