"""Messages between the coordinator and its members."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from moering.protocol.frames import message


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


@message("view")
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


@message("register")
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
    fingerprint: str  # numerics probe of an expert server or a router, "" for others
    held: bytes
    view: bytes | None
    expert_bytes: int = 0  # of one expert in the checkpoint


@message("registered")
@dataclass(frozen=True, slots=True)
class Registered:
    """Accepted. Renew within `lease_s`."""

    term: int
    lease_s: float


@message("unknown")
@dataclass(frozen=True, slots=True)
class Unknown:
    """The coordinator does not know the sender of a lease (it was restarted): register again."""

    term: int


@message("lease")
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


@message("held")
@dataclass(frozen=True, slots=True)
class Held:
    """An expert server's whole list of loaded replicas: little-endian uint32, layer << 16 | expert, sorted.

    `digests` holds 8 bytes of content hash for each: two replicas of an expert with different bytes are refused.
    """

    server_id: str
    incarnation: int
    held: bytes
    digests: bytes


@message("leave")
@dataclass(frozen=True, slots=True)
class Leave:
    """The member is about to exit on purpose."""

    server_id: str
    incarnation: int


@message("operate")
@dataclass(frozen=True, slots=True)
class Operate:
    """Somebody asks for an operation. `id` is the asker's, so that asking twice starts one."""

    id: str
    action: str  # "scale" | "drain" | "restart" | "cancel"
    process_kind: str = ""  # scale, restart
    count: int = 0  # scale
    target: str = ""  # drain, restart: a server id
    deadline_s: float = 0.0  # 0: the coordinator's default


@message("operate_answer")
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


@message("events")
@dataclass(frozen=True, slots=True)
class Events:
    """The next events of the timeline, for gateways to show."""

    events: list[Event]


@message("proven_exit")
@dataclass(frozen=True, slots=True)
class ProvenExit:
    """Whoever started the process has reaped it: no vote is needed."""

    server_id: str
    pid: int
    exit_code: int
