"""What tests of the Gluon kernels share: weights that a kernel may admit, and on a Hopper GPU ragged experts."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from kernels.triton_expert_ffn import GroupedExperts
from kernels.triton_grouping import TILE_FIELDS, Grouping

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda"


def dense_weights(monkeypatch: pytest.MonkeyPatch, hidden: int, intermediate: int, changed: dict[str, Any]) -> Any:
    """w13 and w2 of two experts as `admits` looks at them: bf16 and compiled on Hopper, but for what is `changed`."""
    case = SimpleNamespace(
        **{"dtype": torch.bfloat16, "hidden": hidden, "intermediate": intermediate, "is_cuda": True}
        | {"capability": (9, 0), "interpret": False}
        | changed
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case.capability)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", case.interpret)
    common = {"is_cuda": case.is_cuda, "device": "cuda:0", "dtype": case.dtype}
    w13 = SimpleNamespace(shape=(2, 2 * case.intermediate, case.hidden), **common)
    return w13, SimpleNamespace(shape=(2, case.hidden, case.intermediate), **common)


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random values, the same for a shape each time."""
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator, device=DEVICE) * scale).to(dtype)


def layer(
    experts: int, hidden: int, intermediate: int, dtype: torch.dtype = torch.bfloat16, biased: bool = False
) -> GroupedExperts:
    """Experts with weights of their own; `biased`: as gpt-oss has them, with biases and a clamp."""
    w13 = torch.stack([normal(2 * intermediate, hidden, scale=hidden**-0.5, dtype=dtype)] * experts)
    w2 = torch.stack([normal(hidden, intermediate, scale=intermediate**-0.5, dtype=dtype)] * experts)
    for expert in range(experts):
        w13[expert] = w13[expert].roll(expert, 0)
        w2[expert] = w2[expert].roll(expert, 0)
    biases = normal(experts, 2 * intermediate, dtype=dtype), normal(experts, hidden, dtype=dtype)
    return GroupedExperts(w13, w2, biases if biased else None, limit=1.5 if biased else 0)


def ragged_pairs(counts: Sequence[int]) -> torch.Tensor:
    """The expert of each pair, in a random order: counts[expert] of each, and 50 that are not here."""
    ids = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)] + [torch.full((50,), -1)])
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))].int().to(DEVICE)


def assert_same_bits(
    experts: Any, hidden_states: torch.Tensor, counts: Sequence[int], usual: Any, others: Sequence[Any]
) -> None:
    """The `others` of two and more tilings give the bits of the `usual` one on ragged pairs."""
    ids = ragged_pairs(counts)
    rows = torch.arange(len(ids), dtype=torch.int32, device=DEVICE) % len(hidden_states)

    def results(tiling: Any) -> torch.Tensor:
        out = torch.full((len(ids), experts.hidden), float("nan"), dtype=hidden_states.dtype, device=DEVICE)
        return experts.forward(hidden_states, ids, rows, out=out, tiling=tiling)

    expected = results(usual)
    assert not expected[ids >= 0].isnan().any()
    for tiling in others:
        assert torch.equal(results(tiling).view(torch.int16), expected.view(torch.int16))


def assert_results_go_to_an_address(experts: Any, counts: Sequence[int], usual: Any, tiling: Any) -> None:
    """`out` may be where the address of the rows lies."""
    ids = ragged_pairs(counts)
    x = normal(len(ids), experts.hidden)
    expected = experts.forward(x, ids, tiling=usual)
    grouping = experts._grouper.group(ids, None, 1, tiling.block_m)
    activations, out = normal(len(ids), experts.intermediate), torch.empty_like(expected)
    experts.ffn(x, grouping, activations, torch.tensor([out.data_ptr()], device=DEVICE), tiling)
    assert torch.equal(out[ids >= 0].view(torch.int16), expected[ids >= 0].view(torch.int16))


def assert_a_list_without_tiles_is_not_read(experts: Any, tiling: Any) -> None:
    """Where there are none, nothing is read or written, whatever the list holds."""
    numbers = torch.zeros(300, dtype=torch.int32, device=DEVICE)
    tiles = torch.full((300, TILE_FIELDS.value), 0x7F7F7F7F, dtype=torch.int32, device=DEVICE)
    grouping = Grouping(numbers, numbers, tiles, torch.zeros_like(numbers[:1]), tiling.block_m)
    activations, out = (
        torch.zeros(300, n, dtype=torch.bfloat16, device=DEVICE) for n in (experts.intermediate, experts.hidden)
    )
    experts.ffn(normal(300, experts.hidden), grouping, activations, out, tiling)
    assert not activations.any() and not out.any()
