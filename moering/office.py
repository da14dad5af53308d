"""The office of the elected coordinator: how it hears of it, and the fence around what it may send. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from moering.actions import Send
from moering.protocol import View


@dataclass(frozen=True, slots=True)
class Elected:
    """This coordinator is in office. `view` is the last one that was published, None where there is none."""

    term: int
    view: View | None


@dataclass(frozen=True, slots=True)
class Published:
    """etcd has taken `view`: members may have it."""

    view: View


@dataclass(frozen=True, slots=True)
class Deposed:
    """The office is lost; another coordinator has it or may get it."""

    reason: str


Event = Elected | Published | Deposed


class Fence:
    """Keeps each member's view back until etcd has it. One that is overtaken by a newer one is never sent."""

    def __init__(self) -> None:
        self._published = (0, 0)
        self._waiting: dict[bytes, View] = {}

    def holds(self, identity: bytes, view: View) -> bool:
        """Whether `view` has to wait; then it is sent to `identity` by a later `published`."""
        if (view.term, view.epoch) <= self._published:
            return False
        self._waiting[identity] = view
        return True

    def published(self, view: View) -> list[Send]:
        """`view` may go out, to all who wait for it or an older one."""
        self._published = view.term, view.epoch
        ready = [i for i, waiting in self._waiting.items() if (waiting.term, waiting.epoch) <= self._published]
        for identity in ready:
            del self._waiting[identity]
        return [Send(identity, view) for identity in ready]
