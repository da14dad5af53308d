"""Reads the next experts of a plan while one is loaded: hashing, at about 0.6 GB/s, is what takes long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from expert_server.residency import Key
from moering.checkpoint import ExpertWeights


class ReadAhead:
    """`threads` experts at a time are read and hashed in the background; with one thread none is."""

    def __init__(self, read: Callable[[int, int], ExpertWeights], threads: int) -> None:
        self._read, self._threads = read, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read") if threads > 1 else None
        self._running: dict[Key, Future[ExpertWeights]] = {}

    def announce(self, keys: Sequence[Key]) -> None:
        """These will be asked for, in this order. What was announced before and is not among them is dropped."""
        if self._pool is None:
            return
        soon = keys[: self._threads]
        for key in self._running.keys() - set(soon):
            self._running.pop(key).cancel()
        for key in soon:
            if key not in self._running:
                self._running[key] = self._pool.submit(self._read, *key)

    def __call__(self, layer: int, expert: int) -> ExpertWeights:
        """The weights; raises what reading them raised."""
        future = self._running.pop((layer, expert), None)
        return self._read(layer, expert) if future is None else future.result()
