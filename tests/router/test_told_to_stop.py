"""What a router does within a signal's handler, which may have interrupted anything that its main thread does."""

import pytest

from moering.protocol import MemberInfo, View
from router.config import Config
from router.process import Router
from tests.integration.cluster import wait_for
from tests.tiny import write_checkpoint


@pytest.fixture
def router(tmp_path):
    """One without a lease."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    r = Router(Config(str(checkpoint), bind=f"ipc://{tmp_path}/r", id="r0", kv_cache_mb=64, nice=False))
    yield r
    r.engine.stop()
    r.engine.run()  # closes its sockets


def test_the_log_is_written_by_the_thread_that_drains(router, caplog):
    """Python refuses to write a line within the writing of another one, and a handler that fails drains nothing."""
    caplog.set_level("INFO")
    other = MemberInfo("router", "r1", 1, "", 0, "ONLINE", "", 0, 0)
    router._on_view(View(1, 1, [router._identity, other], [], 0, 0, 0, b"", b"", 1, 0, 0, 0))
    router._terminate()
    wait_for("it has drained", lambda: router.engine._stopping)
    said = [(r.threadName, r.getMessage().split(":")[0]) for r in caplog.records if r.name == "router.process"]
    assert said == [("drain", "draining"), ("drain", "going")]
