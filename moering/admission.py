"""What a process must show to become a member: pure checks of its `Register`.

All members serve one checkpoint; all expert servers compute the same bits, and so do all routers, since a stream may go
on at any of them. The first of each kind sets the reference; whoever differs is refused with both values named.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from moering import protocol
from moering.errors import HandshakeError, ProtocolError
from moering.protocol import MemberInfo, Register, View
from moering.views import check_view

logger = logging.getLogger(__name__)

KINDS = ("gateway", "router", "expert-server", "launcher")
STATES = ("JOINING", "ONLINE", "DRAINING")
MAX_EXPERTS = 1 << 20
"""Layers x experts of the largest model that is believed; a plan of it takes some megabytes."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What members are compared with: the checkpoint of the first that reads one, the numerics of each kind's first."""

    model: str
    digest: str
    layers: int
    experts: int
    numerics: dict[str, tuple[str, str]] = field(default_factory=dict)  # by kind: fingerprint, whose it is


def check_fields(register: Register) -> None:
    """Raise `ProtocolError` for values that no honest member sends."""
    member = register.member
    if member.kind not in KINDS:
        raise ProtocolError(f"register: kind {member.kind!r:.40} is not one of {', '.join(KINDS)}")
    if member.state not in STATES:
        raise ProtocolError(f"register: state {member.state!r:.40} is not one of {', '.join(STATES)}")
    if not 0 < len(member.server_id) <= 200:
        raise ProtocolError("register: a server id has 1 to 200 characters")
    if min(member.capacity, register.layers, register.experts) < 0 or member.capacity >= 1 << 31:
        raise ProtocolError("register: a negative or impossible capacity or shape")
    if max(register.layers, register.experts) > 0xFFFF or register.layers * register.experts > MAX_EXPERTS:
        raise ProtocolError(f"register: {register.layers} layers of {register.experts} experts are too many")
    if member.kind == "expert-server" and not register.layers * register.experts:
        raise ProtocolError("register: an expert server without a model")


class Admission:
    """Compares newcomers with those who are here. A reference counts while somebody who agreed to it is alive."""

    def __init__(self, allow_inexact: bool) -> None:
        self._allow_inexact = allow_inexact
        self.reference: Reference | None = None

    def check(self, register: Register, old: MemberInfo | None, others: Iterable[MemberInfo]) -> None:
        """Raise `HandshakeError` naming both values if the newcomer cannot work with the `others` that are alive.

        `old` is the living member that has its id.
        """
        reference, member = self._standing(others), register.member
        if old is not None and old.kind != member.kind:
            raise HandshakeError(f"the id {old.server_id} belongs to a {old.kind}, not a {member.kind}")
        if old is not None and old.incarnation > member.incarnation:
            raise HandshakeError(
                f"incarnation {member.incarnation} of {old.server_id}: {old.incarnation} is registered"
            )
        if reference is None or not register.layers:
            return
        shape = register.digest, register.layers, register.experts
        if shape != (reference.digest, reference.layers, reference.experts):
            raise HandshakeError(
                f"another checkpoint: the cluster serves {reference.model} ({_shape(reference)}), {member.server_id} "
                f"has {register.model} ({_shape(register)})"
            )
        fingerprint, set_by = reference.numerics.get(member.kind, (register.fingerprint, ""))
        if fingerprint != register.fingerprint:
            differ = (
                f"other numerics: {set_by} has the fingerprint {fingerprint}, {member.server_id} "
                f"{register.fingerprint}; they would not give the same bits"
            )
            if not self._allow_inexact:
                raise HandshakeError(differ + " (--allow-inexact permits it)")
            logger.warning("%s; allowed by --allow-inexact", differ)

    def adopt(self, register: Register, others: Iterable[MemberInfo]) -> bool:
        """Let a newcomer that was checked set what is not settled yet. True if the cluster serves another model now."""
        if not register.layers:
            return False
        before, standing = self.reference, self._standing(others)
        self.reference = standing or Reference(register.model, register.digest, register.layers, register.experts)
        if register.member.kind not in self.reference.numerics:
            own = {register.member.kind: (register.fingerprint, register.member.server_id)}
            self.reference = replace(self.reference, numerics=self.reference.numerics | own)
        return before is None or _model(before) != _model(self.reference)

    def _standing(self, others: Iterable[MemberInfo]) -> Reference | None:
        kinds = {m.kind for m in others}
        if self.reference is None or not kinds & {"router", "expert-server"}:
            return None
        return replace(self.reference, numerics={k: v for k, v in self.reference.numerics.items() if k in kinds})


def _model(reference: Reference) -> tuple[str, int, int]:
    return reference.digest, reference.layers, reference.experts


def _shape(of: Register | Reference) -> str:
    return f"{of.layers} layers of {of.experts} experts, digest {of.digest}"


def read_view(data: bytes) -> View:
    """The last view of a member, checked so that its arrays can be used. Raises `ProtocolError`."""
    view, _ = protocol.decode([data])
    if not isinstance(view, View):
        raise ProtocolError("register.view: not a view")
    check_view(view)
    return view
