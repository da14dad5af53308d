"""The router's side of its gateways: requests and aborts come in, tokens and failures go out. No torch."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

from moering import protocol, transport
from moering.errors import ProtocolError
from moering.protocol import Abort, Failed, Hello, PromptLogprobs, Refused, RouterStats, Submit, Token, Tokens, Welcome

logger = logging.getLogger(__name__)


class Frontend:
    """The socket that gateways connect to. Used by the engine's thread only, but for `gateways`."""

    def __init__(
        self, socket: Any, server_id: str, incarnation: int, max_num_seqs: int, model: str, digest: str
    ) -> None:
        self.socket = socket
        self.monitor = transport.watch_disconnects(socket)  # readable when a connection has ended: see `lost_one`
        self._model, self._digest = model, digest
        self._welcome = Welcome(server_id, incarnation, max_num_seqs, max_num_seqs)
        self._tokens: dict[bytes, list[Token]] = defaultdict(list)
        self._gateways: set[bytes] = set()
        self.gone: set[bytes] = set()  # gateways that a send found dead; their requests are to be aborted

    def receive(self) -> list[tuple[bytes, Submit | Abort]]:
        """All requests and aborts that are waiting, with the gateway's identity. Other messages are answered here.

        Each frame is a message; those of one zmq message arrive together, and with one that is bad all are refused.
        """
        messages = []
        while (frames := transport.try_receive(self.socket)) is not None:
            identity = frames[0]
            try:
                together = [protocol.decode([frame])[0] for frame in frames[1:] or [b""]]
            except ProtocolError as e:
                logger.warning("refused a message: %s", e)
                self._send(identity, Refused(str(e), fatal=True))
                continue
            for message in together:
                if isinstance(message, Submit | Abort):
                    messages.append((identity, message))
                elif isinstance(message, Hello):
                    self._greet(identity, message)
                else:
                    self._send(identity, Refused(f"a router takes no {message.KIND}", fatal=True))
        return messages

    @property
    def gateways(self) -> int:
        """Those that are connected. Who is gone counts until the next `report`. May be read by any thread."""
        return len(self._gateways)

    def lost_one(self) -> bool:
        """Whether a connection ended since the last call. It does not say whose: the next `report` finds out."""
        lost = False
        while transport.read_event(self.monitor) is not None:
            lost = True
        return lost

    def close(self) -> None:
        """Close the socket. Its monitor first: with nobody to read it, libzmq's thread would wait for ever."""
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)

    def add(self, gateway: bytes, token: Token) -> None:
        """Send this token with the next `flush`."""
        self._tokens[gateway].append(token)

    def send(self, gateway: bytes, scores: PromptLogprobs) -> None:
        """Send these at once, so that they are there before the token that follows the prompt."""
        self._send(gateway, scores)

    def flush(self) -> None:
        """Send what `add` collected: one message per gateway and step."""
        for gateway, tokens in self._tokens.items():
            self._send(gateway, Tokens(tokens))
        self._tokens.clear()

    def report(
        self,
        counters: dict[str, float],
        gauges: dict[str, float],
        passed_over: dict[str, str],
        expert_balance: list[float],
        server_balance: list[float],
    ) -> None:
        """Send the router's figures to all gateways."""
        own = self._welcome.server_id
        stats = RouterStats(own, counters, gauges, passed_over, expert_balance, server_balance)
        for gateway in list(self._gateways):
            self._send(gateway, stats)

    def fail(self, gateway: bytes, request_id: str, attempt: int, code: str, message: str) -> None:
        """End a request with an error, after the tokens it already has."""
        self.flush()
        self._send(gateway, Failed(request_id, attempt, code, message))

    def _greet(self, identity: bytes, hello: Hello) -> None:
        if hello.model in ("", self._model) and hello.digest in ("", self._digest):
            self._gateways.add(identity)
            self._send(identity, self._welcome)
            return
        reason = hello.asks_for_another(self._welcome.server_id, self._model, self._digest)
        logger.warning("refused a hello: %s", reason)
        self._send(identity, Refused(reason, fatal=True))

    def _send(self, identity: bytes, message: Any) -> None:
        if not transport.try_send(self.socket, [identity, protocol.encode(message)]):
            self.gone.add(identity)
            self._gateways.discard(identity)
