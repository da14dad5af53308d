"""A cluster whose processes carry fault agents, and what a test of the kill matrix asks of it.

Three expert servers, two replicas of each expert, two routers, one gateway. Relays stand in front of expert-2, of
router-0 and of the coordinator; expert-1 and router-1 bind the same address at each start. In an `etcd_arena` all find
the coordinator through etcd, which has a relay in front of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from moering.errors import MoeringError
from moering.leader import EMBEDDED
from tests.etcd_nodes import EtcdNodes, running
from tests.faults.hub import Hub
from tests.faults.processes.agent import HUB
from tests.faults.relay import Relay
from tests.integration.cluster import REPO, SERVERS, TWO_ROUTERS, Cluster, serving, wait_for
from tests.integration.streams import Stream, Streams, bodies, check_equal
from tests.ports import free_port

STREAMS, TOKENS = 4, 24
ROUTERS = ("router-0", "router-1")
MEMBERS = frozenset({*SERVERS, *ROUTERS, "gateway-0", "coordinator"})
RELAYED = {"expert server": "expert-2", "router": "router-0", "coordinator": "coordinator"}
AT_ONCE = ("--max-restart-delay-s", "0")
FLAGS = (*AT_ONCE, *TWO_ROUTERS, "--rejoin-grace-s", "2")
MACHINE = "a"
"""With etcd the ids of a machine's processes begin with its name. The tests leave that away."""
ETCD_FLAGS = (*FLAGS, "--machine", MACHINE, "--coordinator-args", "--election-ttl-s 2")
LAUNCHER = ("tests.faults.processes.launcher",)


class Arena:
    """One such cluster, and the streams that are held against those of a run without failure."""

    etcd: EtcdNodes  # only in an `etcd_arena`
    membership = EMBEDDED

    def __init__(self, cluster: Cluster, hub: Hub, relays: dict[str, Relay], directory: Path) -> None:
        self.cluster, self.hub, self.relays, self.directory = cluster, hub, relays, directory
        self.coordinator = str(self.process("coordinator")["address"])  # where members join without a relay
        self.reference = self.streams().finish()
        assert len({tuple(s.tokens) for s in self.reference}) == STREAMS
        check_equal(self.reference, self.reference)

    def streams(self) -> Streams:
        """Start the streams of the reference again."""
        return Streams(self.cluster.url, bodies(STREAMS, TOKENS))

    def check(self, seen: list[Stream]) -> None:
        """Nothing lost, duplicated or changed, and exactly one end each."""
        check_equal(seen, self.reference)

    def check_broken(self, seen: list[Stream]) -> None:
        """The connections broke, as who held them died: what came before is right, and nothing looks like an end."""
        for stream, wanted in zip(seen, self.reference, strict=True):
            assert stream.tokens == wanted.tokens[: len(stream.tokens)]
            assert stream.digests == wanted.digests[: len(stream.digests)]
            assert not stream.done_lines and stream.ends in ([], stream.ends[:1])
            assert not set(stream.ends) & {"length", "stop"} and "error event" not in str(stream.ends), stream.ends

    # --- what status shows ---

    def processes(self) -> dict[str, dict[str, Any]]:
        """All that are not OFFLINE, by id; empty while no gateway answers."""
        try:
            return {self._id(p): p for p in self.cluster.status()["processes"] if p["state"] != "OFFLINE"}
        except MoeringError:
            return {}

    def _id(self, process: dict[str, Any]) -> str:
        return str(process["id"]).removeprefix(self.cluster.prefix)

    def process(self, server_id: str) -> dict[str, Any]:
        """One of them, once it is there."""
        return dict(wait_for(f"{server_id} is a member", lambda: self.processes().get(server_id)))

    def incarnations(self) -> dict[str, int]:
        """Of all living processes."""
        return {i: p["incarnation"] for i, p in self.processes().items()}

    def wait_whole(self) -> None:
        """`wait_online`, and all routers use all expert servers."""
        self.wait_online()
        incarnations = self.incarnations()
        notes = [self.hub.arm(s, "seen", "note", match={"router": incarnations[r]}) for s in SERVERS for r in ROUTERS]

        def all_seen() -> bool:
            self.check(self.streams().finish())
            return all(note.fired.is_set() for note in notes)

        wait_for("all servers work for all routers", all_seen)

    def wait_online(self) -> None:
        """The launcher's processes are online, nobody else is, and one failure is survived."""
        wait_for(f"the cluster is whole, see {self.cluster.log}", self._is_online)

    def _is_online(self) -> bool:
        try:
            status = self.cluster.status()
        except MoeringError:
            return False
        online = {self._id(p) for p in status["processes"] if p["state"] == "ONLINE"}
        return online == MEMBERS and status["failures_survivable"] == 1


@contextmanager
def arena(checkpoint: Path, directory: Path, flags: Sequence[str] = FLAGS) -> Iterator[Arena]:
    """Start one; nothing of it is left at the end."""
    with ExitStack() as stack:
        short = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mo-", dir="/tmp")))
        hub = stack.enter_context(closing(Hub(short, f"{MACHINE}-")))
        relays = {}
        for server_id in ("expert-2", "router-0"):
            port = free_port()
            relay = relays[server_id] = stack.enter_context(closing(Relay(partial(int, port))))
            hub.argv[server_id] = ["--bind", f"tcp://127.0.0.1:{port}"]
            hub.settings[server_id]["relay"] = f"tcp://127.0.0.1:{relay.port}"
        for server_id in ("expert-1", "router-1"):
            hub.argv[server_id] = ["--bind", f"ipc://{short}/{server_id}"]
        relay = relays["coordinator"] = stack.enter_context(
            closing(Relay(lambda: str(next(short.glob("moering-*/coordinator")))))
        )
        for server_id in MEMBERS - {"coordinator"}:
            hub.argv.setdefault(server_id, []).extend(["--join", f"tcp://127.0.0.1:{relay.port}"])
        environment = {HUB: hub.path, "PYTHONPATH": str(REPO), "XDG_RUNTIME_DIR": str(short)}
        cluster = stack.enter_context(serving(checkpoint, directory, flags, LAUNCHER, environment))
        yield Arena(cluster, hub, relays, directory)


@contextmanager
def etcd_arena(checkpoint: Path, directory: Path) -> Iterator[Arena]:
    """One with an etcd of a single node; nothing of either is left at the end."""
    with running(directory) as etcd, closing(Relay(partial(int, etcd.nodes[0].port))) as relay:
        membership = f"etcd://127.0.0.1:{relay.port}"
        with arena(checkpoint, directory, (*ETCD_FLAGS, "--membership", membership)) as made:
            made.etcd, made.membership, made.relays["etcd"] = etcd, membership, relay
            yield made
