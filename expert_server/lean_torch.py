"""PyTorch in less memory: without what only its compiler needs, and without the pages that only its import reads."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

POSTPONED = "torch._meta_registrations"
"""Shapes of operators' results, in Python: for tensors without data, which only tracing has. PyTorch imports it and
uses nothing of it meanwhile; it is 19 MB, and a quarter of the time that the import takes."""

_MADV_DONTNEED = 4
_NOT_WRITABLE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-[x-]p \S+ \S+ \d+ +(/.*)")
"""The first line of such a mapping in /proc/PID/smaps: its first address, the one after its last, and its file."""


def import_torch() -> None:
    """Import torch; `POSTPONED` follows when somebody asks for a name in it."""
    if "torch" not in sys.modules:
        module = ModuleType(POSTPONED)
        module.__getattr__ = _from_the_real_one  # type: ignore[method-assign]  # PEP 562
        sys.modules[POSTPONED] = module
    importlib.import_module("torch")


def _from_the_real_one(name: str) -> Any:
    if name.startswith("__"):  # the import system's own questions
        raise AttributeError(name)
    sys.modules.pop(POSTPONED, None)
    return getattr(importlib.import_module(POSTPONED), name)


def release_import_pages() -> None:
    """Unmap the pages of PyTorch's libraries: half of them only its import reads. To be called after it; Linux only.

    A page that is used again comes back from the system's cache of files, without a read from disk.
    """
    directory = os.path.realpath(os.path.dirname(str(sys.modules["torch"].__file__)))
    with contextlib.suppress(OSError), open("/proc/self/smaps", encoding="utf-8", errors="replace") as smaps:
        madvise = ctypes.CDLL(None).madvise
        for start, length in unchanged(smaps, directory):
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED)


def unchanged(smaps: Iterable[str], directory: str) -> Iterator[tuple[int, int]]:
    """Address and bytes of each mapping of a file in `directory` that cannot be written and has no page of its own,
    in memory or swapped out.

    Others hold what the file does not, as the addresses that the dynamic linker put there, and would lose it. Files
    elsewhere may be mapped or unmapped by another thread meanwhile; PyTorch's stay where they are.
    """
    mapping: tuple[int, int] | None = None
    for line in smaps:
        if (found := _NOT_WRITABLE.match(line)) and found[3].startswith(directory + "/"):
            start, end = int(found[1], 16), int(found[2], 16)
            mapping = start, end - start
        elif mapping is not None and line.startswith(("Anonymous:", "Swap:")):
            if line.split()[1] != "0":
                mapping = None
            elif line.startswith("Swap:"):  # the later one
                yield mapping
