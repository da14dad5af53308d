"""`python -m expert_server`: see `expert_server.process`."""

from __future__ import annotations

from collections.abc import Sequence

from expert_server.config import Config
from expert_server.process import ExpertServer
from moering.process import end, run_main


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_main("expert-server", Config, lambda config: ExpertServer(config).run(), argv)


if __name__ == "__main__":
    end(main())  # it may still be loading
