"""A TCP relay that the tests put between two processes, to cut the network there.

A cut direction carries nothing: neither bytes nor the end of a connection, as behind a broken switch. What was sent
meanwhile arrives once the cut is healed, as TCP's retransmissions would bring it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import Any

CHUNK_BYTES = 1 << 16


class Relay:
    """Listens on a port of 127.0.0.1 (`port`) and connects each caller to a port or a Unix socket's path."""

    def __init__(self, target: Callable[[], int | str], tap: Callable[[bytes], None] = lambda data: None) -> None:
        """`target` is asked at each connection, and `tap` hears all that is sent."""
        self._target, self._tap = target, tap
        self._loop = asyncio.new_event_loop()
        self.held = 0  # chunks and ends that met a cut
        self._pumps: set[asyncio.Task[None]] = set()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="relay", daemon=True)
        self._thread.start()
        started.wait()

    def cut(self, directions: Iterable[str]) -> None:
        """Carry nothing "to" the target, nothing "from" it, or both."""
        self._call(self._cut, tuple(directions))

    def heal(self) -> None:
        """Carry everything again."""
        self._call(self._cut, ())

    def close(self) -> None:
        """End all connections."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(function, *args)
        self._loop.call_soon_threadsafe(done.set)
        done.wait()

    def _cut(self, directions: tuple[str, ...]) -> None:
        for direction, is_open in self._open.items():
            if direction in directions:
                is_open.clear()
            else:
                is_open.set()

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._open = {"to": asyncio.Event(), "from": asyncio.Event()}
        self._cut(())
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        server.close()
        for pump in self._pumps:
            pump.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._pumps, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            target = self._target()
            if isinstance(target, str):
                inner, outer = await asyncio.open_unix_connection(target)
            else:
                inner, outer = await asyncio.open_connection("127.0.0.1", target)
        except (OSError, StopIteration):  # not there, or not yet
            writer.close()
            return
        for direction, source, sink in (("to", reader, outer), ("from", inner, writer)):
            pump = asyncio.create_task(self._pump(direction, source, sink))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, direction: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Carry one direction of one connection; its end ends the other direction too, as the endpoints' own does."""
        with contextlib.suppress(OSError), contextlib.closing(sink):
            while True:
                data = await source.read(CHUNK_BYTES)
                self._tap(data)
                self.held += not self._open[direction].is_set()
                await self._open[direction].wait()
                if not data:
                    return
                sink.write(data)
                await sink.drain()
