"""Makes the Triton kernels run without a GPU; a cluster in one process, of a test module's own `checkpoint`."""

import pytest

import tests.interpreter  # noqa: F401
from tests.router.mini_cluster import Client, MiniCluster


@pytest.fixture
def cluster(tmp_path, checkpoint, request):
    c = MiniCluster(tmp_path, checkpoint, **getattr(request, "param", {}))
    yield c
    c.close()


@pytest.fixture
def client(cluster):
    c = Client(cluster.address)
    yield c
    c.socket.close()
