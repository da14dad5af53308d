from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.faults.soak import Held, check, soak


def test_kills_and_rejoins_leave_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    check(soak(checkpoint, tmp_path, 9, print))


@pytest.mark.parametrize("field", ["descriptors", "threads", "shared_maps", "resident_bytes"])
def test_growth_is_found(field: str) -> None:
    one = Held(20, 5, 1, 100 << 20)
    check({"router-0": [one] * 30})
    grown = [dataclasses.replace(one, **{field: getattr(one, field) + i * getattr(one, field) // 5}) for i in range(30)]
    with pytest.raises(AssertionError, match="router-0"):
        check({"router-0": grown})
