"""Reading /proc, and which process may hold how much."""

from __future__ import annotations

import mmap
import os
from typing import Any

import pytest

from bench.memory import ALLOWANCE_BYTES, PYTHON_READS_BYTES, Sizes, judge
from bench.process_memory import bytes_read_by, memory_of, parse_io, parse_status
from moering.errors import MoeringError

SIZES = Sizes(expert=10_000_000, experts=1_000_000_000, rest=100_000_000)


def test_status_is_read_in_bytes() -> None:
    memory = parse_status("Name:\tpython: x\nVmHWM:\t    3072 kB\nVmRSS:\t    2048 kB\nRssAnon:\t    1024 kB\n")
    assert (memory.rss_bytes, memory.anon_bytes, memory.peak_bytes) == (2 << 20, 1 << 20, 3 << 20)
    assert parse_io("rchar: 12345\nwchar: 7\n") == 12345


@pytest.mark.parametrize("text", ["", "Name:\tzombie\nState:\tZ (zombie)\n", "VmRSS:\t\nRssAnon:\t1 kB\n"])
def test_a_process_without_memory_is_an_error(text: str) -> None:
    with pytest.raises(MoeringError):
        parse_status(text)
    with pytest.raises(MoeringError):
        parse_io(text)


def test_this_process_grows_by_what_it_allocates_and_reads() -> None:
    before, read = memory_of(os.getpid()), bytes_read_by(os.getpid())
    # not from the heap, where tests before this one may have left room
    with mmap.mmap(-1, 30_000_000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block[:: mmap.PAGESIZE] = b"x" * len(range(0, len(block), mmap.PAGESIZE))
        with open(__file__, "rb") as f:
            content = f.read()
        assert memory_of(os.getpid()).anon_bytes - before.anon_bytes > len(block) // 2
    assert bytes_read_by(os.getpid()) - read >= len(content)


def test_no_such_process() -> None:
    with pytest.raises(MoeringError, match="999999999"):
        memory_of(999999999)


def expert_server(rss_bytes: int) -> dict[str, Any]:
    return judge({"kind": "expert-server", "experts": 10, "rss_bytes": rss_bytes}, SIZES)


def test_an_expert_server_may_hold_a_fifth_more_than_its_experts() -> None:
    limit = 120_000_000 + ALLOWANCE_BYTES
    assert expert_server(limit)["met"]
    assert not expert_server(limit + 1)["met"]


def test_a_router_that_read_an_expert_layer_is_found() -> None:
    limit = SIZES.rest + PYTHON_READS_BYTES
    assert judge({"kind": "router", "read_bytes": limit}, SIZES)["met"]
    assert not judge({"kind": "router", "read_bytes": limit + 1}, SIZES)["met"]
    few = Sizes(expert=1, experts=100, rest=100)  # all experts would not show beside what Python reads
    assert not judge({"kind": "router", "read_bytes": 1}, few)["met"]
    assert judge({"kind": "gateway"}, SIZES) == {}
