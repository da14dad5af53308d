"""Which tile each regime gets above a few pairs, which are `triton_few_pairs`'.

Any choice gives the same bits; docs/kernels.md has the measurements behind these.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiling:
    """How one GEMM is cut.

    block_n, block_k: weight rows (of gate, and as many of up) and depth per step.
    swap: weights are the left operand.  group_m: tiles of an expert that share a weight block before the next one.
    flatten: the loads of a program's next item start under the last one.
    act_tma: down reads activations through TMA.
    programs_per_sm: 0 for one program per work item, else a grid that strides over the items.
    ping_pong: by the kernel of `gluon_grouped_gemm`, of which warps, swap and flatten are not a choice.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int
    swap: bool = True
    group_m: int = 1
    flatten: bool = False
    act_tma: bool = False
    programs_per_sm: int = 0
    ping_pong: bool = False


@dataclass(frozen=True)
class FFNTiling:
    """Tile height in rows, how both GEMMs are cut."""

    block_m: int
    gate_up: Tiling
    down: Tiling


_UP_TO_6 = FFNTiling(16, Tiling(64, 128, 4, 3), Tiling(64, 128, 4, 5, flatten=True, act_tma=True, programs_per_sm=2))
_UP_TO_20 = FFNTiling(
    32,
    Tiling(128, 128, 8, 3, group_m=4),
    Tiling(128, 128, 8, 5, group_m=4, flatten=True, act_tma=True, programs_per_sm=1),
)
_UP_TO_90 = FFNTiling(
    64,
    Tiling(128, 64, 4, 5, swap=False, group_m=4, flatten=True, programs_per_sm=1),
    Tiling(128, 64, 4, 3, group_m=4, flatten=True, act_tma=True, programs_per_sm=3),
)
_LARGE = FFNTiling(
    128,
    Tiling(128, 64, 8, 4, swap=False, group_m=8, flatten=True, programs_per_sm=1),
    Tiling(256, 64, 8, 4, swap=False, group_m=8, flatten=True, act_tma=True, programs_per_sm=1),
)
PING_PONG = FFNTiling(
    64,
    Tiling(128, 64, 4, 5, swap=False, group_m=16, programs_per_sm=1, ping_pong=True),
    Tiling(256, 64, 4, 5, swap=False, group_m=16, act_tma=True, programs_per_sm=1, ping_pong=True),
)
"""91 to 1100 rows per expert, for weights that `gluon_grouped_gemm.admits`."""
_BY_MEAN_ROWS = ((6, _UP_TO_6), (20, _UP_TO_20), (90, _UP_TO_90))


def choose_tiling(pairs: int, num_experts: int, ping_pong: bool = False) -> FFNTiling:
    """The tiling for `pairs` pairs over `num_experts` local experts, by the mean number of rows per expert.

    ping_pong: whether `PING_PONG` may be chosen.
    """
    for limit, tiling in _BY_MEAN_ROWS:
        if pairs <= limit * num_experts:
            return tiling
    return PING_PONG if ping_pong and pairs <= 1100 * num_experts else _LARGE
