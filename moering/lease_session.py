"""What one process says to the coordinator and takes from it: a state machine without I/O.

The shell around it is `moering.lease.LeaseClient`. The process registers until it is accepted, then renews its lease;
a coordinator that does not know it (it was restarted) makes it register again, with the newest view that it has.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from moering import protocol
from moering.protocol import Lease, Refused, Register, Registered, Unknown, View
from moering.views import check_view

logger = logging.getLogger(__name__)


class LeaseSession:
    """The messages of one member. `send` may be called from any thread, all else from one.

    `register` and `lease` return the message as of now; `on_view` gets each newer view and `on_refused` a refusal for
    good, `on_message` whatever else the coordinator says.
    """

    def __init__(
        self,
        register: Callable[[], Register],
        lease: Callable[[], Lease],
        on_view: Callable[[View], None],
        on_refused: Callable[[str], None],
        on_message: Callable[[Any], None] = lambda message: None,
    ) -> None:
        self._register, self._lease = register, lease
        self._on_view, self._on_refused, self._on_message = on_view, on_refused, on_message
        self._outbox: deque[Any] = deque()
        self._view: View | None = None
        self._registered = False

    def begin(self) -> None:
        """There is another coordinator to speak to: register with it."""
        self._registered = False

    def send(self, message: Any) -> None:
        """Have `message` sent with the next renewal, after what was given before."""
        self._outbox.append(message)

    def renewal(self) -> list[Any]:
        """What to send now: once a second, and whenever `take` asks for it."""
        if self._registered:
            return [*self.waiting(), self._lease()]
        view = None if self._view is None else protocol.encode(self._view)
        return [replace(self._register(), view=view)]

    def waiting(self) -> list[Any]:
        """What `send` was given and nothing has taken yet."""
        messages = []
        while self._outbox:
            messages.append(self._outbox.popleft())
        return messages

    def take(self, message: Any) -> bool:
        """Act on a message of the coordinator; True when the next renewal should not wait.

        Raises `ProtocolError` for a view that cannot be used; the process goes on with the one it has.
        """
        if isinstance(message, View):
            self._take_view(message)
        elif isinstance(message, Registered):
            if not self._registered:  # the first coordinator is no news: who joins says when it is online
                level = logging.DEBUG if self._view is None else logging.INFO
                logger.log(level, "joined the coordinator's term %d", message.term)
            was, self._registered = self._registered, True
            return not was
        elif isinstance(message, Unknown):
            logger.info("the coordinator of term %d does not know this process; registering again", message.term)
            self._registered = False
            return True
        elif isinstance(message, Refused):
            self._registered = False
            if message.fatal:
                self._on_refused(message.reason)
            else:
                logger.warning("the coordinator refused: %s; trying again", message.reason)
        else:
            self._on_message(message)
        return False

    def _take_view(self, view: View) -> None:
        last = self._view
        if last is not None and (view.term, view.epoch) <= (last.term, last.epoch):
            return
        check_view(view)
        self._view = view
        self._on_view(view)
