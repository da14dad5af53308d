"""Pinning through a runtime that writes down what it is asked for; a real one is only where a GPU is."""

from __future__ import annotations

import gc
import logging
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kernels import pinning


class Runtime:
    """CUDA's, as far as pinning goes: memory by its address."""

    def __init__(self, result: int = 0) -> None:
        self.result = result
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert address not in self.pinned and flags == 0
        if self.result == 0:
            self.pinned[address] = size
        return self.result

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def installed(monkeypatch: pytest.MonkeyPatch, result: int = 0) -> Runtime:
    runtime = Runtime(result)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return runtime


def test_memory_is_pinned_and_kept_until_that_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = installed(monkeypatch)
    memory = np.zeros(4096, np.uint8)
    address, alive = memory.ctypes.data, weakref.ref(memory)
    undo = pinning.pin(memory)
    del memory
    gc.collect()
    assert undo is not None and alive() is not None and runtime.pinned == {address: 4096}
    undo()
    del undo
    gc.collect()
    assert alive() is None and runtime.pinned == {}


def test_what_cannot_be_pinned_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = installed(monkeypatch, result=801)
    pinning._say_that_it_failed.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert pinning.pin(np.zeros(4096, np.uint8)) is None
    assert runtime.pinned == {} and len(caplog.records) == 1


def test_an_error_is_not_left_to_the_next_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA keeps it until somebody asks; a launch asks, and fails in its place."""
    installed(monkeypatch, result=712)
    launches: list[str] = []

    def fails(size: int, device: str) -> SimpleNamespace:
        launches.append(device)
        raise RuntimeError("part or all of the requested memory was already mapped")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", fails)
    assert not pinning.register(4096, 4096)
    assert launches == ["cuda"]
