"""`python -m tests.faults.processes.launcher …`: `moering serve` whose processes carry a fault agent."""

from __future__ import annotations

import sys

from moering import launcher, process

if __name__ == "__main__":
    process.MODULES.update(
        {
            "coordinator": "tests.faults.processes.coordinator",
            "gateway": "tests.faults.processes.gateway",
            "router": "tests.faults.processes.router",
            "expert-server": "tests.faults.processes.expert_server",
        }
    )
    sys.exit(launcher.main(sys.argv[1:]))
