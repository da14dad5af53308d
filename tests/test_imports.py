"""What import-linter cannot see: whether another package brings torch along at run time, and what tests import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHER = "moering.cli, moering.launcher, moering.supervisor, moering.status, moering.chat, moering.default_model"


@pytest.mark.parametrize("modules", [LAUNCHER, "moering.coordinator", "gateway.__main__"])
def test_no_torch(modules: str) -> None:
    code = f"import sys, {modules}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_what_is_run_by_hand_is_imported_by_its_own_tests_alone() -> None:
    imports, tests = re.compile(r"^ *(from|import) bench\b", re.M), Path(__file__).parent
    of_the_product = [path for path in tests.rglob("*.py") if path.parent.name not in ("bench", "compose")]
    assert [str(path) for path in of_the_product if imports.search(path.read_text())] == []
