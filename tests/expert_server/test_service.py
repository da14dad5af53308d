"""The compute thread over real sockets: right rows to the right router, refusals that hurt nobody else."""

import time

import numpy as np
import pytest
import torch
import zmq

from expert_server.residency import Residency
from expert_server.service import STOP_CHECK_MS, Service
from moering import protocol, transport
from moering.expert_frames import ITEM_BYTES, Reply
from moering.protocol import Failed, Hello, NotHere, Refused, Welcome
from tests.expert_server.test_batching import HIDDEN, dispatch

SHAPE = (3, 8, HIDDEN)


def compute(hidden, rows, counts, experts, out):
    chosen = as_floats(hidden if rows is None else hidden[rows])
    result = chosen * np.repeat(experts, counts).astype(np.float32)[:, None]
    out[:] = as_bits(result) if out.dtype == np.int16 else result


def as_bits(rows):
    """float32 to the bits of bf16."""
    return torch.from_numpy(rows).bfloat16().view(torch.int16).numpy()


def as_floats(rows):
    """The values of rows of either type, float32."""
    return rows if rows.dtype == np.float32 else torch.from_numpy(rows).view(torch.bfloat16).float().numpy()


@pytest.fixture
def service(tmp_path, request):
    """With a parameter: one that computes in bf16."""
    residency = Residency()
    for expert in range(6):  # 6 and 7 live elsewhere
        residency.add((0, expert), float(expert + 1), bytes(8))
    socket = transport.make_socket(zmq.ROUTER)
    address = transport.bind(socket, f"ipc://{tmp_path}/service")
    s = Service(socket, "expert-0", 5, 100, residency)
    s.start()
    s.open("model", "digest", SHAPE, compute, dtype=getattr(request, "param", "float32"))
    yield s, address
    s.close()


class Router:
    def __init__(self, address):
        self.socket = transport.make_socket(zmq.DEALER)
        self.socket.rcvtimeo = 10_000
        transport.connect(self.socket, address)

    def ask(self, *frames):
        self.socket.send_multipart(frames)
        return protocol.decode(self.socket.recv_multipart())

    def compute(self, message, tensor):
        return self.ask(protocol.encode(message), tensor.tobytes())


@pytest.fixture
def router(service):
    r = Router(service[1])
    yield r
    r.socket.close()


def rows(n):
    return np.arange(n * HIDDEN, dtype=np.float32).reshape(n, HIDDEN)


def test_hello_is_welcomed_with_the_limits(router):
    message, _ = router.ask(protocol.encode(Hello("r", 1, "model", "digest")))
    assert message == Welcome("expert-0", 5, 100, protocol.MAX_TENSOR_BYTES // (4 * HIDDEN))


def test_a_service_that_spins_answers_and_welcomes_with_its_own_limit(tmp_path):
    residency = Residency()
    residency.add((0, 3), 4.0, bytes(8))
    socket = transport.make_socket(zmq.ROUTER)
    address = transport.bind(socket, f"ipc://{tmp_path}/spinning")
    spinning = Service(socket, "expert-0", 5, 100, residency)
    begun_s = time.monotonic()
    spinning.start()
    spinning.open("model", "digest", SHAPE, compute, max_tensor_bytes=10 * 4 * HIDDEN, spin_s=0.05)
    router = Router(address)
    message, _ = router.ask(protocol.encode(Hello("r", 1, "model", "digest")))
    assert message.max_rows == 10
    for seq in (1, 2):  # the second one while it spins
        reply, tensor = router.compute(dispatch([(0, 3)], seq=seq), rows(1))
        assert reply.seq == seq and (np.frombuffer(tensor, np.float32) == rows(1)[0] * 4).all()
    turns, looks = spinning.progress, (time.monotonic() - begun_s) / (STOP_CHECK_MS / 1000)
    spinning.close()
    assert not spinning.is_alive() and turns < 10 + looks  # an empty look of the spinning is no turn
    router.socket.close()


@pytest.mark.parametrize(
    ("service", "asked", "dtype"),
    [("float32", "bfloat16", "float32"), ("bfloat16", "float32", "float32"), ("bfloat16", "bfloat16", "bfloat16")],
    indirect=["service"],
)
def test_rows_are_of_the_servers_own_type_only_where_the_router_asks_for_it(router, asked, dtype):
    message, _ = router.ask(protocol.encode(Hello("r", 1, "model", "digest", dtype=asked)))
    assert message.dtype == dtype
    assert message.max_rows == protocol.MAX_TENSOR_BYTES // (ITEM_BYTES[dtype] * HIDDEN)


@pytest.mark.parametrize("service", ["bfloat16"], indirect=True)
def test_rows_of_both_types_are_answered_in_their_own_with_equal_values(router):
    pairs, hidden = [(0, 3), (1, 3), (1, 5)], as_floats(as_bits(rows(2)))
    _, wide = router.compute(dispatch(pairs), hidden)
    reply, half = router.compute(dispatch(pairs)._replace(dtype="bfloat16"), as_bits(hidden))
    assert reply.dtype == "bfloat16" and len(half) == len(wide) // 2
    exact = np.stack([hidden[0] * 4, hidden[1] * 4, hidden[1] * 6])
    assert (np.frombuffer(wide, np.float32).reshape(3, HIDDEN) == exact).all()
    assert (np.frombuffer(half, np.int16).reshape(3, HIDDEN) == as_bits(exact)).all()


def test_rows_of_a_type_that_the_server_does_not_have_are_refused(router):
    message, _ = router.compute(dispatch([(0, 3)])._replace(dtype="bfloat16"), as_bits(rows(1)))
    assert isinstance(message, Failed)
    assert message.message == f"bfloat16 rows of {HIDDEN}; here are float32 rows of {HIDDEN}"


@pytest.mark.parametrize(("model", "digest"), [("other", "digest"), ("model", "0ther")])
def test_another_checkpoint_is_refused_with_both_named(router, model, digest):
    message, _ = router.ask(protocol.encode(Hello("r", 1, model, digest)))
    assert isinstance(message, Refused)
    for name in ("model", "digest", model, digest):
        assert name in message.reason


def test_rows_come_back_unsummed_in_the_order_of_the_pairs(router):
    hidden = rows(2)
    reply, tensor = router.compute(dispatch([(0, 3), (1, 3), (1, 5)]), hidden)
    assert isinstance(reply, Reply)
    assert (reply.seq, reply.incarnation, reply.rows, reply.columns) == (1, 5, 3, HIDDEN)
    got = np.frombuffer(tensor, np.float32).reshape(3, HIDDEN)
    assert (got == np.stack([hidden[0] * 4, hidden[1] * 4, hidden[1] * 6])).all()


def test_an_expert_that_is_not_here_is_said_so(router, service):
    service[0].epoch = 17
    reply, _ = router.compute(dispatch([(0, 3), (0, 7)]), rows(1))
    assert reply == NotHere(9, 1, 5, 17)


@pytest.mark.parametrize("garbage", [b"", b"\xff" * 50, b"\x81\xa1v\x03", protocol.encode(Refused("no", False))])
def test_garbage_costs_its_sender_an_error_and_others_nothing(router, service, garbage):
    other = Router(service[1])
    message, _ = other.ask(garbage)
    assert isinstance(message, Refused)
    other.socket.close()
    reply, _ = router.compute(dispatch([(0, 3)]), rows(1))
    assert isinstance(reply, Reply)


def test_a_wrong_dispatch_fails_alone(router):
    message, _ = router.compute(dispatch([(0, 3)], layer=2, seq=4), rows(1))
    assert isinstance(message, NotHere)
    message, _ = router.compute(dispatch([(0, 3)], layer=3, seq=4), rows(1))
    assert isinstance(message, Failed)
    assert (message.request_id, message.code) == ("9/4", "bad_request")


def test_a_router_that_left_does_not_stop_the_others(router, service):
    gone = Router(service[1])
    for seq in range(50):
        gone.socket.send_multipart([protocol.encode(dispatch([(0, 3)], seq=seq)), rows(1).tobytes()])
    gone.socket.close()
    reply, _ = router.compute(dispatch([(0, 3)]), rows(1))
    assert isinstance(reply, Reply)
