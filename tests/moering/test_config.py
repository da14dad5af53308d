from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from moering.config import option, parse
from moering.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """An example process."""

    model: str = option("default", "what to serve", positional=True)
    max_num_seqs: int = option(8, "sequences at once")
    budget_s: float = option(1.5, "seconds")
    fast: bool = option(False, "hurry")
    careful: bool = option(True, "look twice")
    zone: str | None = option(None, "failure domain")
    limit: int | None = option(None, "at most")
    keys: tuple[str, ...] = option((), "several")
    backend: str = option("auto", "kernels", choices=("auto", "packed"))


def read(*argv: str, **environ: str) -> Config:
    return parse(Config, argv, environ)


def test_nothing_given_is_the_defaults() -> None:
    assert read() == Config()


def test_flags() -> None:
    argv = "dir --max-num-seqs 3 --budget-s=0.25 --fast --no-careful --zone a --limit 7 --keys x,y --backend packed"
    assert read(*argv.split()) == Config("dir", 3, 0.25, True, False, "a", 7, ("x", "y"), "packed")


def test_environment() -> None:
    config = read(MOERING_MODEL="dir", MOERING_MAX_NUM_SEQS="3", MOERING_FAST="yes", MOERING_CAREFUL="0",
                  MOERING_KEYS="x, y,", MOERING_ZONE="", MOERING_LIMIT="7")  # fmt: skip
    assert config == Config("dir", 3, fast=True, careful=False, keys=("x", "y"), zone=None, limit=7)


def test_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: dir\nmax-num-seqs: 3\nbudget_s: 2\nfast: true\nkeys: [x, y]\nzone: null\n")
    assert read("--config", str(file)) == Config("dir", 3, 2.0, True, keys=("x", "y"))
    assert read(MOERING_CONFIG=str(file)) == read("--config", str(file))


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("max_num_seqs: 1\nlimit: 1\nbudget_s: 1\n")
    config = read("--config", str(file), "--budget-s", "3", MOERING_LIMIT="2", MOERING_BUDGET_S="2")
    assert (config.max_num_seqs, config.limit, config.budget_s) == (1, 2, 3.0)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("max_num_sequences: 1\nlimit: 2\n", "max_num_sequences"),
        ("- a list\n", "not a mapping"),
        ("a: [unclosed\n", "cannot read"),
        ("fast: perhaps\n", "fast: 'perhaps'"),
        ("max_num_seqs: 2.5\n", "max_num_seqs: 2.5"),
        ("limit: true\n", "limit: True"),
        ("backend: gpu\n", "backend: 'gpu'"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, names: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=names):
        read("--config", str(file))


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read("--config", str(tmp_path / "none.yaml"))


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").touch()
    assert read("--config", str(tmp_path / "c.yaml")) == Config()


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({"MOERING_MAX_NUM_SEQS": "many"}, "max_num_seqs: 'many' is not a valid int"),
        ({"MOERING_BUDGET_S": "soon"}, "budget_s: 'soon' is not a valid float"),
        ({"MOERING_FAST": "perhaps"}, "fast: 'perhaps' is not a valid bool"),
        ({"MOERING_LIMIT": "none"}, "limit: 'none' is not a valid int"),
        ({"MOERING_BACKEND": "gpu"}, "backend: 'gpu' is not one of auto, packed"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(environ: dict[str, str], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        parse(Config, [], environ)


@pytest.mark.parametrize("argv", [["--max-num-seq5=1"], ["--backend", "gpu"], ["one", "two"]])
def test_unknown_flags_and_choices_exit_with_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        read(*argv)
    assert exit.value.code == 2
    assert argv[-1] in capsys.readouterr().err
