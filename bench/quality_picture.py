"""The picture of `bench.renormalize`: bits per byte against the share of missing experts."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from statistics import mean
from typing import Protocol

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

STYLES = {"apart": ("#4477aa", "never two of a pair"), "any": ("#ee6677", "any; a row without experts skips the layer")}


class HasBits(Protocol):
    """What is drawn of a point."""

    @property
    def way(self) -> str:
        """How the missing experts were chosen."""
        ...

    @property
    def share(self) -> str:
        """Their share, as a fraction."""
        ...

    @property
    def bits_per_byte(self) -> float:
        """The quality."""
        ...


def draw(points: Sequence[HasBits], path: Path) -> None:
    """Means as lines, from the best to the worst seed as bars."""
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for way, (colour, label) in STYLES.items():
        mine = [p for p in points if p.way == way]
        shares = sorted({p.share for p in mine}, key=Fraction)
        if not shares:
            continue
        values = [[p.bits_per_byte for p in mine if p.share == share] for share in shares]
        middle = [mean(v) for v in values]
        spread = [[m - min(v) for m, v in zip(middle, values, strict=True)]]
        spread.append([max(v) - m for m, v in zip(middle, values, strict=True)])
        at = [float(Fraction(share)) for share in shares]
        axes.errorbar(at, middle, spread, color=colour, label=label, capsize=3, marker="o", markersize=4)
    axes.set(xlabel="share of experts missing", ylabel="bits per byte", title="Quality under renormalize")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
