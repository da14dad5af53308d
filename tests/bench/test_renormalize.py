"""The quality curve on a tiny model: what is missing is missed, and a run goes on where it stopped."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from bench.renormalize import choose, main
from tests.tiny import write_checkpoint


@pytest.mark.parametrize("share", [Fraction(0), Fraction(1, 16), Fraction(1, 2)])
def test_the_missing_are_a_share_of_all(share: Fraction) -> None:
    for way in ("any", "apart"):
        chosen = choose(way, share, 0, 4, 8)
        assert len(chosen) == share * 32
        assert chosen == choose(way, share, 0, 4, 8)
        assert not chosen or chosen != choose(way, share, 1, 4, 8)
    assert len({(layer, e // 2) for layer, e in choose("apart", share, 0, 4, 8)}) == share * 32


def test_bits_per_byte_by_share_and_in_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny", layers=2)
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text("A ring of experts. " * 4)
    argv = ["--model", str(checkpoint), "--text", str(text), "--out", str(out), "--seeds", "2"]
    assert main([*argv, "--shares", "0"]) == 0
    first = (out / "points.jsonl").read_text()
    assert main([*argv, "--shares", "0,1/4"]) == 0
    lines = (out / "points.jsonl").read_text()
    assert lines.startswith(first) and len(lines.splitlines()) == 2 + 4
    points = {(p["way"], p["share"], p["seed"]): p for p in map(json.loads, lines.splitlines())}
    whole = points["apart", "0", 0]
    assert whole["touched"] == whole["ended"] == 0 and whole["bits_per_byte"] == points["any", "0", 0]["bits_per_byte"]
    for seed in range(2):
        for way in ("apart", "any"):
            assert points[way, "1/4", seed]["touched"] > 0
            assert points[way, "1/4", seed]["bits_per_byte"] != whole["bits_per_byte"]
    assert (out / "renormalize.png").stat().st_size > 0
    assert "| 1/4 | any |" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--shares", "1"], ["--shares", "x"], ["--seeds", "0"]])
def test_bad_options_are_one_clear_line(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, "--out", str(tmp_path)]) == 1
    assert argv[0].strip("-") in capsys.readouterr().err
