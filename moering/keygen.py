"""``moering keygen FILE``: a new cluster key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moering.cluster_key import ClusterKey
from moering.config import option
from moering.errors import ConfigError
from moering.process import run_main


@dataclass(frozen=True)
class Config:
    """Write a new cluster key to a file. Each process of the cluster gets it, with --key FILE."""

    file: str = option("", "where to write it; a file that is there already stays as it is", positional=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``moering keygen``."""
    return run_main("keygen", Config, _run, argv)


def _run(config: Config) -> int:
    if not config.file:
        raise ConfigError("the name of the file is needed: moering keygen FILE")
    ClusterKey.create(config.file)
    print(f"wrote {config.file}; give it to every process of the cluster: --key {config.file}")
    return 0
