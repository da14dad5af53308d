"""A micro-batch's rows on a device: what servers get, and where their answers are found; with a CPU as the device."""

from __future__ import annotations

import ctypes
import gc
import weakref

import numpy as np
import pytest
import torch

from router.expert_rows_cuda import DeviceRows
from router.instructions import Dispatch

ROWS, TOP_K, HIDDEN = 5, 2, 8
SLOTS = np.arange(ROWS * TOP_K)


def make(rows: int = ROWS, seed: int = 1) -> DeviceRows:
    inputs = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16()
    outputs = torch.full((rows * TOP_K, HIDDEN), float("nan"), dtype=torch.bfloat16)
    return DeviceRows(inputs, outputs, torch.full((rows * TOP_K + 2,), 77))  # two of padding


def dispatch(slots: list[int]) -> Dispatch:
    pairs = np.array(slots)
    experts = np.arange(len(slots))
    return Dispatch(1, 1, 0, "a", pairs, experts, np.unique(pairs // TOP_K), pairs // TOP_K, False, 0)


def bits(values: torch.Tensor) -> np.ndarray:
    return values.bfloat16().view(torch.int16).numpy()


def answers(slots: np.ndarray) -> np.ndarray:
    """What each slot's expert gives: the slot's number everywhere."""
    return bits(torch.from_numpy(slots).unsqueeze(1).expand(-1, HIDDEN))


def inputs_of(rows: DeviceRows) -> torch.Tensor:
    return torch.from_numpy(rows._inputs).view(torch.bfloat16)


def found(rows: DeviceRows) -> list[float]:
    """The output that each slot has; -1 for none."""
    return [values_at(int(at)) if at else -1.0 for at in rows._addresses[: len(rows._outputs)]]


def values_at(address: int) -> float:
    """What all values of the row at an address are."""
    row = torch.from_numpy(np.ctypeslib.as_array((ctypes.c_int16 * HIDDEN).from_address(address))).view(torch.bfloat16)
    assert bool((row == row[0]).all())
    return float(row[0])


class Memory:
    """What holds the memory of answers that are not copied."""


@pytest.mark.parametrize(
    ("slots", "count"), [([9, 0, 4, 3, 6], ROWS), ([8, 1, 9], 2), ([3], 1), (list(range(9, -1, -1)), ROWS)]
)
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_each_pair_finds_its_row_in_what_is_packed(slots: list[int], count: int, dtype: type) -> None:
    """All rows where that is no more than the pairs; `parse` tells both forms apart by the numbers of each."""
    mine, d = make(), dispatch(slots)
    out = np.full((len(slots), HIDDEN), -1, dtype)
    sent, pairs = mine.pack(d, out)
    numbers = np.frombuffer(pairs, np.uint16)
    assert sent == count and len(numbers) == 2 * len(slots) and sent <= len(slots)
    local, experts = np.split(numbers, 2)
    assert experts.tolist() == d.experts.tolist()
    wanted = inputs_of(mine)[torch.from_numpy(d.pair_rows)]
    assert (out[local] == (bits(wanted) if dtype is np.int16 else wanted.float().numpy())).all()
    assert (out[sent:] == -1).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_frame_has_each_row_once(dtype: str) -> None:
    mine, d = make(), dispatch([9, 2, 8])
    wanted = inputs_of(mine)[torch.tensor([1, 4])]
    frame = mine.frame(d, dtype)
    assert (frame == (bits(wanted) if dtype == "bfloat16" else wanted.float().numpy())).all()
    assert frame.flags.c_contiguous


@pytest.mark.parametrize("memory", [None, Memory()])
def test_answers_are_found_in_whatever_order_and_parts_they_come(memory: Memory | None) -> None:
    mine, held = make(), []
    for part in ([7, 2], [9], [0, 1, 3, 4], [8, 5, 6]):
        held.append(answers(np.array(part)))
        mine.put(np.array(part), held[-1], memory)
    assert found(mine) == SLOTS.tolist()
    assert (mine._addresses[len(SLOTS) :] == 0).all(), "padding is not looked for"
    mine.begin_layer()
    assert found(mine) == [-1.0] * len(SLOTS)
    mine.put(SLOTS[::-1], answers(SLOTS[::-1] + 1))
    assert found(mine) == (SLOTS + 1).tolist()


def test_float32_answers_are_rounded_and_read_only_ones_taken() -> None:
    mine = make()
    wide = np.full((1, HIDDEN), 1.0 + 2.0**-12, np.float32)
    wide.flags.writeable = False
    mine.put(np.array([3]), wide)
    assert found(mine)[3] == 1.0


def test_memory_is_held_until_its_answers_have_been_read() -> None:
    mine, memory = make(), Memory()
    held = weakref.ref(memory)
    reading, late = mine.put(SLOTS[:4], answers(SLOTS[:4]), memory), mine.put(SLOTS[4:], answers(SLOTS[4:]), memory)
    assert reading is not None and late is not None
    del memory
    gc.collect()
    assert held() is not None and reading() is not None
    mine.begin_layer()
    assert held() is None and reading() is None and late() is None


def test_memory_is_let_go_when_answers_are_kept_or_given_up() -> None:
    for let_go in (DeviceRows.keep, lambda rows: rows):
        mine, memory = make(), Memory()
        held = weakref.ref(memory)
        lent = answers(SLOTS[:4])
        mine.put(SLOTS[4:], answers(SLOTS[4:]))
        reading = mine.put(SLOTS[:4], lent, memory)
        del memory
        rest = let_go(mine)
        if rest is None:
            lent[:] = 0
            assert found(mine) == SLOTS.tolist()
        del mine, rest
        assert held() is None and reading is not None and reading() is None


def test_what_is_left_out_counts_as_missing() -> None:
    mine = make()
    mine.put(SLOTS, answers(SLOTS))
    mine.clear(np.array([2, 7]))
    assert found(mine) == [-1.0 if slot in (2, 7) else slot for slot in SLOTS]


def test_rows_that_are_split_off_keep_what_came_and_take_what_is_missing() -> None:
    whole, part = make(), make(rows=3, seed=2)
    here = np.array([9, 0, 3, 2, 5])
    whole.put(here[:2], answers(here[:2]))
    lent = answers(here[2:])
    whole.put(here[2:], lent, Memory())
    rows = np.array([0, 2, 4])
    slots = (rows[:, None] * TOP_K + np.arange(TOP_K)).reshape(-1)
    part.take(whole, slots)
    lent[:] = 0
    assert found(part) == [slot if slot in here else -1 for slot in slots]
    missing = np.flatnonzero(~np.isin(slots, here))
    part.put(missing, answers(slots[missing]))
    assert found(part) == slots.tolist()
