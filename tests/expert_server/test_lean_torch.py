"""PyTorch is imported without a module that only tracing needs, and gives back the pages that only the import read."""

import os
import subprocess
import sys

import psutil
import torch

from expert_server.lean_torch import release_import_pages, unchanged
from tests.integration.cluster import REPO
from tests.moering.stubs import DEADLINE_S

POSTPONED = """
import sys
from expert_server.lean_torch import POSTPONED, import_torch

import_torch()
import torch
assert not hasattr(sys.modules[POSTPONED], "__file__"), "the real one is there already"
assert torch.ops.quantized.linear_prepack_fp16 and torch.mm(torch.ones(2, 2), torch.ones(2, 2))[0, 0] == 2

from torch._meta_registrations import register_meta

assert sys.modules[POSTPONED].__file__ and register_meta.__module__ == POSTPONED
import_torch()
assert sys.modules[POSTPONED].register_meta is register_meta
"""

SMAPS = """\
1000-3000 r-xp 00000000 fe:00 17 /torch/lib/a.so
Rss:                   8 kB
Anonymous:             0 kB
Swap:                  0 kB
SwapPss:               0 kB
3000-4000 r--p 00002000 fe:00 17 /torch/lib/a.so
Anonymous:             4 kB
Swap:                  0 kB
4000-5000 rw-p 00003000 fe:00 17 /torch/lib/a.so
Anonymous:             0 kB
Swap:                  0 kB
5000-6000 r--s 00000000 fe:00 18 /torch/lib/shared
Anonymous:             0 kB
Swap:                  0 kB
6000-7000 r--p 00000000 00:00 0
Anonymous:             0 kB
Swap:                  0 kB
7000-8000 r--p 00000000 fe:00 19 /torches/lib/b.so
Anonymous:             0 kB
Swap:                  0 kB
8000-b000 r--p 00000000 fe:00 20                 /torch/lib/c d.so
Anonymous:             0 kB
Swap:                  0 kB
b000-c000 r--p 00003000 fe:00 20                 /torch/lib/c d.so
Anonymous:             0 kB
Swap:                  4 kB
"""


def test_a_module_for_tracing_comes_only_when_a_name_of_it_is_asked_for():
    done = subprocess.run(
        [sys.executable, "-c", POSTPONED], capture_output=True, text=True, cwd=REPO, timeout=DEADLINE_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_only_what_is_as_in_its_file_and_one_of_pytorchs_is_given_back():
    assert list(unchanged(SMAPS.splitlines(), "/torch")) == [(0x1000, 0x2000), (0x8000, 0x3000)]


def test_pages_of_libraries_are_given_back_and_come_back():
    x = torch.ones(64, 64)
    expected = torch.linalg.qr(x).R
    before = resident_of_torch()
    release_import_pages()
    assert resident_of_torch() < before / 2
    assert torch.equal(torch.linalg.qr(x).R, expected)


def resident_of_torch():
    """Bytes of PyTorch's libraries that this process has in memory."""
    directory = os.path.realpath(os.path.dirname(torch.__file__))
    return sum(m.rss for m in psutil.Process().memory_maps() if m.path.startswith(directory))
