"""What import-linter cannot see: whether another package brings torch along at run time."""

from __future__ import annotations

import subprocess
import sys

import pytest

LAUNCHER = "moering.cli, moering.launcher, moering.supervisor, moering.status, moering.chat, moering.default_model"


@pytest.mark.parametrize("modules", [LAUNCHER, "moering.coordinator", "gateway.__main__"])
def test_no_torch(modules: str) -> None:
    code = f"import sys, {modules}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
