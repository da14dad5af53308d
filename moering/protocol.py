"""The wire format: frame layout, the messages, and the checks between bytes and messages.

A message is one multipart zmq message::

    [identity]     only on the bound (zmq.ROUTER) side
    header         MessagePack map: "v" protocol version, "kind", then the fields of the message; of Dispatch and Reply
                   a fixed layout (`moering.expert_frames`)
    tensor bytes   of those two: raw, row-major, little-endian, one frame, unless the rows are in shared memory

`encode` and `decode` are pure: no socket, no clock, no torch. `decode` raises `ProtocolError` with the field that is
wrong before anything else sees the content. No pickle: nothing on a wire is executed.

Who speaks what (the connecting side is written first)::

    gateway       → router         Hello, Submit, Abort           ← Welcome, Refused, Tokens, Failed, RouterStats
    router        → expert server  Hello, Dispatch                ← Welcome, Refused, Reply, NotHere, Failed
    any member    → coordinator    Register, Lease, Held, Leave   ← Registered, Refused, Unknown, View
    gateway       → coordinator    Operate                        ← OperateAnswer, Events
    launcher      → coordinator    ProvenExit
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgpack

from moering import codec, expert_frames
from moering.errors import ProtocolError
from moering.expert_frames import Dispatch, Reply

PROTOCOL_VERSION = 4
MAX_HEADER_BYTES = 8 << 20
"""A header longer than this is refused unread. The largest honest one is a plan of some 60 KB or a long prompt."""
MAX_FRAME_BYTES = 16 << 20
"""Limit of one zmq frame (zmq.MAXMSGSIZE): a larger one makes libzmq drop the connection."""
MAX_TENSOR_BYTES = 1 << 20
"""Senders split rows so that a tensor frame stays within this, to keep one long prompt from holding up decoding."""

KINDS: dict[str, type] = {}

C = TypeVar("C", bound=type)


def _message(kind: str) -> Callable[[C], C]:
    def register(cls: C) -> C:
        cls.KIND = kind  # type: ignore[attr-defined]
        KINDS[kind] = cls
        return cls

    return register


# --- every connection ------------------------------------------------------------------------------------------------


@_message("hello")
@dataclass(frozen=True, slots=True)
class Hello:
    """First message of the connecting side. A mismatch of model or digest is refused with both values named."""

    server_id: str
    incarnation: int
    model: str
    digest: str  # of the checkpoint; "" where the peer does not read one (gateway)
    shared_rows: str = ""  # from a router: memory that it offers to share (`moering.shared_rows`)
    shared_slots: int = 0  # and how many slots it needs there
    dtype: str = "float32"  # that a router would like rows to have, if that is what the server computes in


@_message("welcome")
@dataclass(frozen=True, slots=True)
class Welcome:
    """The bound side accepts.

    `credit_rows` bounds the rows that may be outstanding at once, `max_rows` the pairs of one message.
    """

    server_id: str
    incarnation: int
    credit_rows: int
    max_rows: int
    slot_rows: int = 0  # what a slot of the memory offered with hello holds in each direction; 0: it is not used
    dtype: str = "float32"  # of all rows of this connection, both ways


@_message("refused")
@dataclass(frozen=True, slots=True)
class Refused:
    """The bound side will not work with the sender; `fatal` means that asking again cannot help."""

    reason: str
    fatal: bool


@_message("failed")
@dataclass(frozen=True, slots=True)
class Failed:
    """One request or dispatch ended with an error. `code` is machine-readable, `message` is for a person."""

    request_id: str  # or, from an expert server, "router_incarnation/sequence"
    attempt: int
    code: str  # "bad_request" | "context_length" | "no_replica" | "timeout" | "poison" | "internal" | "overloaded"
    message: str


# --- router ⇄ expert server ------------------------------------------------------------------------------------------


@_message("not_here")
@dataclass(frozen=True, slots=True)
class NotHere:
    """The server does not hold an expert of the dispatch. `epoch` is that of the newest plan it knows."""

    router: int
    seq: int
    incarnation: int
    epoch: int


# --- gateway ⇄ router ------------------------------------------------------------------------------------------------


MISSING_EXPERT_POLICIES = ("wait", "fail", "renormalize")
"""What a request does about an expert without a live replica: wait until one is loaded, end with an error, or go on
without it, the weights of the row's other experts raised to the same sum."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of one choice are drawn. Draws depend only on (seed, choice, position): a resumed request goes on.

    temperature 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 switch a filter off.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    choice: int = 0
    stop_token_ids: list[int] = dataclasses.field(default_factory=list)  # ends the request; end-of-text ids included
    logprobs: int = -1  # -1: none; 0..20: that of the token, and this many alternatives
    logits_digest: bool = False  # send a digest of the sampled logits with each token
    on_missing_expert: str = "wait"  # one of MISSING_EXPERT_POLICIES


@_message("submit")
@dataclass(frozen=True, slots=True)
class Submit:
    """A request, or its continuation on another router: then `emitted` holds what the client already has."""

    request_id: str
    attempt: int
    prompt: list[int]
    emitted: list[int]
    sampling: Sampling
    deadline_s: float  # seconds from receipt


@_message("abort")
@dataclass(frozen=True, slots=True)
class Abort:
    """Nobody waits for this request any more."""

    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token. `position` counts generated tokens from 0; the gateway takes only the next one, once."""

    request_id: str
    attempt: int
    position: int
    token_id: int
    finish_reason: str | None = None  # "stop" | "length" on the last token
    logprob: float | None = None
    top_ids: list[int] = dataclasses.field(default_factory=list)
    top_logprobs: list[float] = dataclasses.field(default_factory=list)
    logits_digest: str | None = None
    renormalized: int = 0  # positions computed without some of their experts since the token before, or the start


@_message("tokens")
@dataclass(frozen=True, slots=True)
class Tokens:
    """All tokens that one step produced for one gateway."""

    tokens: list[Token]


@_message("router_stats")
@dataclass(frozen=True, slots=True)
class RouterStats:
    """What a router counts since its start, and its gauges of now, for its gateways to show. Sent every second."""

    server_id: str
    counters: dict[str, float]
    gauges: dict[str, float]
    passed_over: dict[str, str] = dataclasses.field(default_factory=dict)  # expert server id → why others come first
    expert_balance: list[float] = dataclasses.field(default_factory=list)  # max/mean of rows per layer, of late;
    server_balance: list[float] = dataclasses.field(default_factory=list)  # 0 for a layer without any


# --- member ⇄ coordinator --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemberInfo:
    """One process as all others see it."""

    kind: str  # "gateway" | "router" | "expert-server" | "launcher" | "coordinator"
    server_id: str  # stable over restarts
    incarnation: int  # new at every start
    address: str  # where peers connect, "" where nobody does
    pid: int
    state: str  # "JOINING" | "ONLINE" | "DRAINING" | "OFFLINE"
    zone: str
    capacity: int  # expert replicas that fit in its memory; 0 for other kinds
    experts: int  # replicas it holds now


@dataclass(frozen=True, slots=True)
class Operation:
    """A change of the cluster that somebody asked for, as far as it has come. Times are in seconds since 1970.

    What members do about it, for as long as it is listed: the launcher starts `start`, ends `stop`, and does not start
    again what is in `retire`; a process whose id and incarnation are in `drain` hands over its work and exits.
    """

    id: str
    action: str  # "scale" | "drain" | "restart"
    kind: str  # of the processes; "" for a restart of all kinds
    count: int  # scale: how many are wanted
    phase: str  # "starting" | "preparing" | "draining" | "restarting" | "rolling back" | "done" | "failed"
    error: str  # why it is rolled back, or failed
    started_at: float
    deadline_at: float
    ended_at: float = 0.0  # 0 while it is under way
    moved_bytes: int = 0  # of experts loaded since it began
    epoch: int = 0  # that first showed this phase; 0: not published yet
    floor: int = 0  # failures of expert servers that the cluster must go on to survive
    start: dict[str, str] = dataclasses.field(default_factory=dict)  # server id → kind
    stop: list[str] = dataclasses.field(default_factory=list)
    retire: list[str] = dataclasses.field(default_factory=list)
    drain: dict[str, int] = dataclasses.field(default_factory=dict)  # server id → incarnation
    pending: dict[str, int] = dataclasses.field(default_factory=dict)  # restart: who is still to be restarted
    surge: str = ""  # restart: who was started to stand in for the one of its kind that restarts


@_message("view")
@dataclass(frozen=True, slots=True)
class View:
    """The cluster at one epoch. Members refuse a (term, epoch) lower than the one they have.

    `routing` and `target` are little-endian int16 arrays [layers, experts, width]: for each logical expert the ordered
    indices into `servers` of the replicas to use now, and of those to hold; -1 pads.
    """

    term: int
    epoch: int
    members: list[MemberInfo]
    servers: list[str]
    layers: int
    experts: int
    width: int
    routing: bytes
    target: bytes
    replication: int
    failures_survivable: int  # -1 while an expert has no live replica
    orphans: int  # experts without a live replica
    under_target: int  # experts with fewer live replicas than wanted
    failures_restorable: int = -1  # further failures after which memory allows full redundancy again; -1: not even now
    operations: list[Operation] = dataclasses.field(default_factory=list)  # the last ones, the newest at the end
    popularity: bytes = b""  # uint8 [layers, experts] (`moering.popularity.ranks`): loaded first; empty: not known
    ways: bytes = b""  # uint8 [layers, experts]: how many of the first of `routing` share the rows; empty: all 1


@_message("register")
@dataclass(frozen=True, slots=True)
class Register:
    """A member presents itself, at its start and again to a coordinator that does not know it.

    `held` lists what an expert server holds (see `Held`). `view` is the last whole view the member has, encoded.
    """

    member: MemberInfo
    model: str
    digest: str
    layers: int  # shape of the model's MoE, 0 where the member does not read the checkpoint (gateway)
    experts: int
    fingerprint: str  # numerics probe of an expert server, "" for others
    held: bytes
    view: bytes | None
    expert_bytes: int = 0  # of one expert in the checkpoint


@_message("registered")
@dataclass(frozen=True, slots=True)
class Registered:
    """Accepted. Renew within `lease_s`."""

    term: int
    lease_s: float


@_message("unknown")
@dataclass(frozen=True, slots=True)
class Unknown:
    """The coordinator does not know the sender of a lease (it was restarted): register again."""

    term: int


@_message("lease")
@dataclass(frozen=True, slots=True)
class Lease:
    """Renews the lease. `progress` counts the main loop's turns: no progress with work queued is suspect."""

    server_id: str
    incarnation: int
    state: str
    progress: int
    queued: int
    suspects: list[str]  # routers: server ids they route around
    term: int  # of the newest view applied by the main loop
    epoch: int
    loads: bytes  # routers: little-endian float32 [layers, experts] tokens since the last lease, or empty
    wedged: list[str] = dataclasses.field(default_factory=list)  # routers: connected, but answer nothing that is due


@_message("held")
@dataclass(frozen=True, slots=True)
class Held:
    """An expert server's whole list of loaded replicas: little-endian uint32, layer << 16 | expert, sorted.

    `digests` holds 8 bytes of content hash for each: two replicas of an expert with different bytes are refused.
    """

    server_id: str
    incarnation: int
    held: bytes
    digests: bytes


@_message("leave")
@dataclass(frozen=True, slots=True)
class Leave:
    """The member is about to exit on purpose."""

    server_id: str
    incarnation: int


@_message("operate")
@dataclass(frozen=True, slots=True)
class Operate:
    """Somebody asks for an operation. `id` is the asker's, so that asking twice starts one."""

    id: str
    action: str  # "scale" | "drain" | "restart" | "cancel"
    process_kind: str = ""  # scale, restart
    count: int = 0  # scale
    target: str = ""  # drain, restart: a server id
    deadline_s: float = 0.0  # 0: the coordinator's default


@_message("operate_answer")
@dataclass(frozen=True, slots=True)
class OperateAnswer:
    """What became of an `Operate`. Views then show how far the operation is."""

    id: str
    code: str  # "accepted" | "bad_request" | "not_found" | "busy" | "refused"
    reason: str


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to the cluster. `id` is the time of it in microseconds since 1970, and unique."""

    id: int
    type: str  # for example "member.offline", "plan.published", "operation.done"
    subject: str  # a server id, an operation's id, or ""
    epoch: int
    text: str


@_message("events")
@dataclass(frozen=True, slots=True)
class Events:
    """The next events of the timeline, for gateways to show."""

    events: list[Event]


@_message("proven_exit")
@dataclass(frozen=True, slots=True)
class ProvenExit:
    """Whoever started the process has reaped it: no vote is needed."""

    server_id: str
    pid: int
    exit_code: int


Message = (
    Hello | Welcome | Refused | Failed | NotHere | Submit | Abort | Tokens
    | RouterStats | View | Register | Registered | Unknown | Lease | Held | Leave | ProvenExit
    | Operate | OperateAnswer | Events
)  # fmt: skip


# --- bytes ⇄ messages ------------------------------------------------------------------------------------------------


def encode(message: Any) -> bytes:
    """The header frame of a message."""
    if message.__class__ is Dispatch or message.__class__ is Reply:
        return expert_frames.encode(message, PROTOCOL_VERSION)
    fields = {"v": PROTOCOL_VERSION, "kind": message.KIND, **codec.to_map(message)}
    return typing.cast(bytes, msgpack.packb(fields))


def decode(frames: Sequence[bytes | memoryview]) -> tuple[Any, memoryview | None]:
    """The message in `frames` (without identity) and its tensor frame. Raises `ProtocolError`."""
    if not frames:
        raise ProtocolError("an empty message")
    header = frames[0]
    if header and header[0] == expert_frames.MARK:
        return expert_frames.decode(frames, PROTOCOL_VERSION)
    if len(header) > MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {len(header)} bytes; the limit is {MAX_HEADER_BYTES}")
    try:
        fields = msgpack.unpackb(header, strict_map_key=False)
    except Exception as e:  # msgpack raises many kinds, all of which mean the same here
        raise ProtocolError(f"the header is not MessagePack: {type(e).__name__}") from e
    if not isinstance(fields, dict):
        raise ProtocolError("the header is not a map")
    version, kind = fields.pop("v", None), fields.pop("kind", None)
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {codec.shown(version)}; this process speaks {PROTOCOL_VERSION}")
    cls = KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ProtocolError(f"unknown message kind {codec.shown(kind)}")
    if len(frames) != 1:
        raise ProtocolError(f"{kind}: {len(frames)} frames where 1 is expected")
    return codec.from_map(cls, fields, str(kind)), None
