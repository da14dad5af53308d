"""The table of the kill matrix, and what is generated from it."""

from __future__ import annotations

from tests.faults import page, subset
from tests.faults.injections import INJECTIONS
from tests.faults.matrix import ANY, HOW, IMPOSSIBLE, POSSIBLE, WHEN, WHO, Cell, reason


def test_the_page_is_current() -> None:
    assert page.PATH.read_text() == page.text(), "run: python -m tests.faults.page"


def test_the_subset_is_current_and_names_cells_that_are_run() -> None:
    chosen = subset.read()
    assert len(chosen) == len(set(chosen)) <= subset.LIMIT
    assert set(chosen) <= set(POSSIBLE)
    assert chosen == subset.chosen(), "run: python -m tests.faults.subset"


def test_each_fault_is_injected_by_something() -> None:
    assert INJECTIONS.keys() == HOW.keys()


def test_rules_name_what_exists() -> None:
    for rule in IMPOSSIBLE:
        for wanted, known in zip(rule, (WHO, HOW, WHEN), strict=False):
            names = (wanted,) if isinstance(wanted, str) else wanted
            assert set(names) <= {*known, ANY}, rule


def test_a_cover_without_a_limit_has_every_pair() -> None:
    cells = [c for c in POSSIBLE if c.who in ("router", "gateway")]
    whole = subset.cover(cells, len(cells))
    assert len(whole) < len(cells)
    assert set().union(*map(subset.pairs, whole)) == set().union(*map(subset.pairs, cells))


def test_reason() -> None:
    assert reason(Cell("gateway", "SIGKILL", "loading")) == "a gateway reads a tokenizer, no weights"
    assert reason(Cell("gateway", "SIGKILL", "decode")) is None
