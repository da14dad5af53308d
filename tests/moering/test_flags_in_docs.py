"""The pages name the flags that there are: all of `moering serve`, with their defaults, and no other of any command."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

import expert_server.config
import gateway.config
import router.config
from moering import chat, coordinator, launcher, operate, status
from tests.integration.cluster import REPO

CONFIGS: tuple[Any, ...] = (
    *(launcher.Config, coordinator.Config, gateway.config.Config, router.config.Config, expert_server.config.Config),
    *(status.Config, chat.Config, operate.Scale, operate.Drain, operate.Restart),
)


def defaults(config: Any) -> dict[str, Any]:
    """By flag."""
    fields = (f for f in dataclasses.fields(config) if not f.metadata.get("positional"))
    return {"--" + f.name.replace("_", "-"): f.default for f in fields}


def table_of_serve() -> dict[str, str]:
    """What the page says of the default of each flag."""
    said = {}
    for line in (REPO / "docs/operations.md").read_text().splitlines():
        if line.startswith("| `--"):
            names, values = (cell.strip(" `").split(", ") for cell in line.split("|")[1:3])
            said |= {name.strip("`"): value for name, value in zip(names, values + [""] * len(names), strict=False)}
    return said


def test_the_table_of_serve_has_its_flags_and_their_defaults() -> None:
    said, actual = table_of_serve(), defaults(launcher.Config)
    assert said.keys() == actual.keys()
    numbers = {name: f"{value:g}" for name, value in actual.items() if type(value) in (int, float)}
    assert {name: said[name] for name in numbers} == numbers


@pytest.mark.parametrize("page", ["README.md", "docs/operations.md", "docs/membership.md", "docs/architecture.md"])
def test_no_page_names_a_flag_that_there_is_not(page: str) -> None:
    known = {flag for config in CONFIGS for flag in defaults(config)} | {"--config", "--help"}
    named = re.findall(r"--[a-z][a-z-]*[a-z]", (REPO / page).read_text())
    assert {flag.replace("--no-", "--") for flag in named} <= known
