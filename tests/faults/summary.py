"""What a run of the kill matrix shows at its end: one line per fault, one column per moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.faults.matrix import HOW, WHEN, WHO, Cell

CELL, GAP_S = "cell", "longest_gap_s"
"""Properties that a cell's test records: they are in the JUnit file, too."""


def text(reports: Iterable[Any]) -> str:
    """Of each cell the longest gap between two events of a stream in milliseconds, or that it failed."""
    results: dict[str, str] = {}  # by the name of the cell
    for report in reports:
        properties = dict(report.user_properties)
        if CELL in properties:
            gap_s = properties.get(GAP_S)
            results[properties[CELL]] = "FAILED" if gap_s is None else f"{1000 * gap_s:.0f}"
    lines = [f"{'longest gap after 1st token, ms':32}" + "".join(f"{when:>10}" for when in WHEN)]
    for who in WHO:
        for how in HOW:
            row = [results.get(Cell(who, how, when).name, "") for when in WHEN]
            if any(row):
                lines.append(f"{who + ': ' + how:32}" + "".join(f"{r:>10}" for r in row))
    return "\n".join(lines)
