"""The cells of the kill matrix: the subset of `subset.txt`, or those that `--fault-cells` selects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from tests.faults import cells, launcher_end
from tests.faults.arena import Arena, arena, etcd_arena
from tests.faults.matrix import Cell
from tests.faults.summary import CELL, GAP_S

Make = Callable[[Path, Path], AbstractContextManager[Arena]]


class Arenas:
    """One arena for all cells, and one with etcd; a new one after a cell that failed, so that it fails alone."""

    def __init__(self, checkpoint: Path, factory: pytest.TempPathFactory) -> None:
        self._checkpoint, self._factory = checkpoint, factory
        self._stack = ExitStack()
        self._arena: Arena | None = None
        self._make: Make = arena

    def get(self, cell: Cell) -> Arena:
        make: Make = etcd_arena if cell.who == "etcd" else arena
        if make is not self._make:
            self.close()
        if self._arena is None:
            self._arena = self._stack.enter_context(make(self._checkpoint, self._factory.mktemp("arena")))
            self._make = make
        return self._arena

    def close(self) -> None:
        self._arena = None
        self._stack.close()


@pytest.fixture(scope="module")
def arenas(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arenas]:
    found = Arenas(checkpoint, tmp_path_factory)
    yield found
    found.close()


def test_cell(arenas: Arenas, cell: Cell, record_property: Callable[[str, object], None]) -> None:
    record_property(CELL, cell.name)
    ends = launcher_end.concerns(cell)
    whole = False
    try:
        record_property(GAP_S, (launcher_end if ends else cells).run(arenas.get(cell), cell))
        whole = not ends
    finally:
        if not whole:
            arenas.close()
