"""The gate's choice on a GPU: the k highest scores of a row and their weights; one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _gate_kernel(
    scores_ptr, live_rows_ptr, ids_ptr, local_ids_ptr, weights_ptr, experts,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    live = row < tl.load(live_rows_ptr)
    expert = tl.arange(0, EXPERTS)
    scores = tl.load(scores_ptr + row * experts + expert, mask=expert < experts, other=float("-inf"))
    top = tl.max(scores, axis=0)
    total = tl.sum(tl.exp(scores - top), axis=0)
    slot = tl.arange(0, SLOTS)
    chosen = tl.full((SLOTS,), float("-inf"), tl.float32)
    for j in tl.static_range(TOP_K):
        best = tl.max(scores, axis=0)
        # the lowest id of equal ones; a row of NaN finds none and takes the last expert
        found = tl.minimum(tl.min(tl.where(scores == best, expert, EXPERTS), axis=0), experts - 1)
        tl.store(ids_ptr + row * TOP_K + j, found.to(tl.int64))
        tl.store(local_ids_ptr + row * TOP_K + j, tl.where(live, found, -1))
        chosen = tl.where(slot == j, best, chosen)
        scores = tl.where(expert == found, float("-inf"), scores)
    weights = tl.exp(chosen - top)
    if NORMALIZE:
        total = tl.sum(weights, axis=0)
    tl.store(weights_ptr + row * TOP_K + slot, weights / total, mask=slot < TOP_K)


def choose_experts(
    scores: torch.Tensor,
    live_rows: torch.Tensor,
    ids: torch.Tensor,
    local_ids: torch.Tensor,
    weights: torch.Tensor,
    normalize: bool,
) -> None:
    """Fill the choice of every row, heaviest first; of equal scores the lower id comes first.

    scores: [n, experts] float32; live_rows: [1] int32; ids: [n, k] int64; local_ids: the same as int32, and -1 in rows
    that are padding (from live_rows on); weights: [n, k] float32, softmax over the chosen (`normalize`) or over all.
    """
    rows, experts = scores.shape
    top_k = ids.shape[1]
    if not scores.is_contiguous() or not weights.is_contiguous() or weights.shape != ids.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and weights {tuple(weights.shape)} do not belong together")
    _gate_kernel[(rows,)](
        scores, live_rows, ids, local_ids, weights, experts, EXPERTS=triton.next_power_of_2(experts), TOP_K=top_k,
        SLOTS=triton.next_power_of_2(top_k), NORMALIZE=normalize, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
