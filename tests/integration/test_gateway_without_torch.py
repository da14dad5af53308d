from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from moering.http_client import HttpError, get_json
from tests.integration.cluster import DEADLINE_S, REPO, wait_for
from tests.ports import free_port

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "kernels", "router", "expert_server"):
            print("imported", name, file=sys.stderr, flush=True)
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
from gateway.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_gateway_starts_without_torch(checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    argv = [sys.executable, "-c", BLOCKER, "--checkpoint", str(checkpoint), "--port", str(port)]
    argv += ["--join", f"ipc://{tmp_path}/nobody"]
    gateway = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, cwd=REPO)

    def models() -> list[str]:
        assert gateway.poll() is None, gateway.communicate()[1]
        try:
            return [m["id"] for m in get_json(f"http://127.0.0.1:{port}/v1/models")["data"]]
        except HttpError as e:
            assert e.status in (0, 503)
            return []

    try:
        assert wait_for("the gateway answers", models) == ["tiny"]
    finally:
        gateway.terminate()
        _, errors = gateway.communicate(timeout=DEADLINE_S)
    assert "imported" not in errors
