"""The launcher over stub processes.

``python -m tests.moering.stub_launcher DIRECTORY PORT COORDINATOR BEHAVIOUR [preload]``; with ``preload`` all but the
gateway are forked.
"""

from __future__ import annotations

import sys
from pathlib import Path

from moering.launcher import STOP_ORDER, Config, serve
from moering.telemetry import set_up_logging
from tests.moering.stubs import stub

if __name__ == "__main__":
    directory, port, coordinator, behaviour = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    set_up_logging("serve")
    preload = sys.argv[5:] == ["preload"]
    processes = [stub(directory, f"{kind}-0", kind, behaviour, preload=preload) for kind in reversed(STOP_ORDER[1:])]
    processes.append(stub(directory, "gateway-0", "gateway", f"http:{port}"))
    sys.exit(serve(Config(port=port), processes, coordinator, lambda server_id, kind: stub(directory, server_id, kind)))
