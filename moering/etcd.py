"""What moering asks of etcd (3.4 or later): one key's value, transactions, leases, and word that one key has changed.

It speaks etcd's own JSON gateway with aiohttp, which the gateway process needs anyway; no gRPC, no protobuf. Numbers
travel as strings there, keys and values in base64, and fields that are zero or false are left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from moering.errors import ConfigError, MoeringError

TRY_S = 1.0
"""How long one node may take to answer; then the next one is asked."""

Map = dict[str, Any]


class EtcdError(MoeringError):
    """No node gave an answer. What was asked for may have been done all the same."""


@dataclass(frozen=True)
class Cluster:
    """Where etcd is, and the name under which this cluster of moering keeps its keys there."""

    nodes: tuple[str, ...]
    name: str = "moering"

    @classmethod
    def parse(cls, url: str) -> Cluster:
        """From ``etcd://host:port,host:port…[/name]``. Raises `ConfigError`."""
        address, _, name = url.removeprefix("etcd://").partition("/")
        nodes = [n.strip() for n in address.split(",")]
        for node in nodes:
            try:
                valid = bool(urlsplit(f"//{node}").hostname and urlsplit(f"//{node}").port)
            except ValueError:
                valid = False
            if not valid:
                raise ConfigError(f"membership {url}: {node!r} is not host:port")
        return cls(tuple(f"http://{n}" for n in nodes), name.strip("/") or cls.name)

    def key(self, of: str) -> str:
        """The key ``/<name>/<of>``."""
        return f"/{self.name}/{of}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's value and the revisions of the store at which it was created and last written."""

    value: bytes
    created: int
    modified: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether the conditions of a transaction held, and the revision of the store after it."""

    succeeded: bool
    revision: int


def created_at(key: str, revision: int) -> Map:
    """The condition that `key` exists since `revision`; 0: that it does not exist."""
    return {"key": _text(key), "target": "CREATE", "result": "EQUAL", "create_revision": str(revision)}


def modified_at(key: str, revision: int) -> Map:
    """The condition that `key` was last written at `revision`; 0: that it does not exist."""
    return {"key": _text(key), "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)}


def put(key: str, value: bytes, lease: int = 0) -> Map:
    """The operation that writes `key`, which then goes with `lease` where one is given."""
    return {"request_put": {"key": _text(key), "value": b64encode(value).decode(), "lease": str(lease)}}


class Etcd:
    """A client for one event loop; the node that answered last is asked first. Every call may raise `EtcdError`."""

    def __init__(self, nodes: Sequence[str]) -> None:
        self._nodes = list(nodes)
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Etcd:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TRY_S))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def read(self, key: str) -> tuple[Entry | None, int]:
        """What `key` is, None if it does not exist, and the revision of the store as of which that is so."""
        # Never a transaction that only reads: etcd before 3.5.5 panics when its client goes away meanwhile, as one does
        # that waits no longer or ends (https://github.com/etcd-io/etcd/issues/14110).
        answer = await self._call("kv/range", {"key": _text(key)})
        with _understood(answer):
            entry = _entry(answer["kvs"][0]) if answer.get("kvs") else None
            return entry, int(answer["header"]["revision"])

    async def transact(self, conditions: Sequence[Map], writes: Sequence[Map]) -> Outcome:
        """Do all of `writes` if all conditions hold, else nothing."""
        answer = await self._call("kv/txn", {"compare": conditions, "success": writes})
        with _understood(answer):
            return Outcome(bool(answer.get("succeeded")), int(answer["header"]["revision"]))

    async def grant(self, ttl_s: int) -> int:
        """A new lease. etcd gives at least 2 s."""
        answer = await self._call("lease/grant", {"TTL": str(ttl_s)})
        with _understood(answer):
            return int(answer["ID"])

    async def keep_alive(self, lease: int) -> bool:
        """Renew a lease; False when it has lapsed."""
        answer = await self._call("lease/keepalive", {"ID": str(lease)})
        with _understood(answer):
            return int(answer["result"].get("TTL", 0)) > 0

    async def revoke(self, lease: int) -> None:
        """End a lease: its keys go at once."""
        await self._call("lease/revoke", {"ID": str(lease)})

    async def wait_for_change(self, key: str, since: int, for_s: float) -> None:
        """Return when `key` is written or deleted at revision `since` or later, at the latest after `for_s`.

        It does not say what changed: read the key afterwards. The time is bounded because a node that was cut off from
        the others says nothing for ever.
        """
        request = {"create_request": {"key": _text(key), "start_revision": str(since)}}
        try:
            async with asyncio.timeout(for_s), self._asking(self._nodes[0], "watch", request, for_s) as answer:
                async for line in answer.content:
                    result = _checked(line).get("result", {})
                    if result.get("events") or result.get("canceled"):
                        return
        except TimeoutError:
            return
        except EtcdError:
            self._ask_another_first()
            raise

    async def _call(self, method: str, request: Map) -> Map:
        failures = []
        for node in list(self._nodes):
            try:
                async with self._asking(node, method, request, TRY_S) as answer:
                    return _checked(await answer.read())
            except (EtcdError, TimeoutError) as e:
                failures.append(f"{node}: {str(e) or 'no answer'}")
                self._ask_another_first()
        raise EtcdError("; ".join(failures))

    def _ask_another_first(self) -> None:
        self._nodes.append(self._nodes.pop(0))

    @contextlib.asynccontextmanager
    async def _asking(
        self, node: str, method: str, request: Map, for_s: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        limit = aiohttp.ClientTimeout(total=for_s, sock_connect=TRY_S)
        try:
            async with self._session.post(f"{node}/v3/{method}", json=request, timeout=limit) as answer:
                yield answer
        except (aiohttp.ClientError, OSError) as e:
            if isinstance(e, TimeoutError):
                raise
            raise EtcdError(str(e) or type(e).__name__) from e


@contextlib.contextmanager
def _understood(answer: Map) -> Iterator[None]:
    """Turns what goes wrong in reading an answer into `EtcdError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        raise EtcdError(f"an answer that etcd does not give: {str(answer)[:80]}") from e


def _text(key: str) -> str:
    return b64encode(key.encode()).decode()


def _entry(pair: Map) -> Entry:
    return Entry(
        b64decode(pair.get("value", "")), int(pair["create_revision"]), int(pair["mod_revision"])
    )  # fmt: skip


def _checked(data: bytes) -> Map:
    """The answer in `data`; an error of etcd's, or what is no answer of etcd's, raises `EtcdError`."""
    try:
        answer = json.loads(data)
    except ValueError:
        raise EtcdError(f"not an answer of etcd's: {data[:80]!r}") from None
    if not isinstance(answer, dict) or answer.get("error"):
        raise EtcdError(str(answer.get("message") or answer["error"]) if isinstance(answer, dict) else "no map")
    return answer
