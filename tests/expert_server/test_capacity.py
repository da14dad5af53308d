"""For how many experts a server says that it has room, where only its process's memory limits them."""

from types import SimpleNamespace

from expert_server import process as product
from expert_server.config import Config
from expert_server.process import ExpertServer
from tests.fp8 import quantize
from tests.tiny import write_checkpoint


def test_fp8_experts_count_as_what_they_become(tmp_path, monkeypatch):
    path = quantize(write_checkpoint(tmp_path / "plain", hidden=64, intermediate=96), tmp_path / "fp8")
    server = ExpertServer(Config(str(path), bind=f"ipc://{tmp_path}/e", id="e0"))
    server.service.start()
    server._backend = SimpleNamespace(capacity=0, row_multiple=512)
    monkeypatch.setattr(product, "default_capacity", lambda expert_bytes: 10**6 // expert_bytes)
    assert server._capacity() == 10**6 // (2 * (2 * 96 + 64) * 512)
    server.service.close()
