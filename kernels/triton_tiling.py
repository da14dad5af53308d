"""Which tile each regime gets above a few pairs.

Any choice gives the same bits; docs/kernels-log.md has the measurements behind these.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.triton_small_tiles import Cut, SmallTiling


@dataclass(frozen=True)
class Tiling:
    """How one GEMM is cut.

    block_n, block_k: weight rows (of gate, and as many of up) and depth per step.
    group_m: tiles of an expert that share a weight block before the next one.
    programs_per_sm: so many on each multiprocessor stride over the work items.
    swap: weights are the left operand, in down.
    ping_pong: by the kernel of `gluon_grouped_gemm`, of which warps and swap are not a choice.
    ahead: that one waits for the rows of a step, with a fence, while the step before is multiplied.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int
    programs_per_sm: int = 1
    swap: bool = False
    ping_pong: bool = False
    ahead: bool = False


@dataclass(frozen=True)
class FFNTiling:
    """Tile height in rows, how both GEMMs are cut, of `triton_grouped_gemm` or one of the two Gluon modules."""

    block_m: int
    gate_up: Tiling
    down: Tiling


@dataclass(frozen=True)
class DenseTiling:
    """Tile height in rows, 64 or 96, and slots of the ring of `gluon_dense_tiles`.

    group_m: tiles of an expert that share a weight block before the next one.
    """

    block_m: int
    stages: int = 5
    group_m: int = 4


@dataclass(frozen=True)
class RingTiling:
    """Tile height in rows, a multiple of 8, and how `gluon_mxfp4_tiles` runs: weight rows of an item, 64 or 128, slots
    of the ring of a program, and programs that share a multiprocessor.

    group_m: tiles of an expert that share a weight block before the next one.
    """

    block_m: int
    block: int
    stages: int
    programs: int
    group_m: int = 8

    @property
    def registers(self) -> int:
        """Of a thread, on average: a program has 256, of which 96 have nothing to do."""
        return 65536 // (256 * self.programs) // 8 * 8


_UP_TO_6 = SmallTiling(16, Cut(64, 128, 3), Cut(64, 128, 5))
_UP_TO_20 = SmallTiling(32, Cut(128, 128, 3), Cut(128, 128, 5), warps=8)
_UP_TO_90 = FFNTiling(64, Tiling(128, 64, 4, 5, 4), Tiling(128, 64, 4, 3, 4, programs_per_sm=3, swap=True))
_LARGE = FFNTiling(128, Tiling(128, 64, 8, 4, 8), Tiling(256, 64, 8, 4, 8))
_DOWN_64 = Tiling(256, 64, 4, 5, 16, ping_pong=True)
PING_PONG = FFNTiling(64, Tiling(128, 64, 4, 5, 16, ping_pong=True), _DOWN_64)
"""77 to 300 rows per expert, for weights that `gluon_grouped_gemm.admits`; as the next two."""
PING_PONG_AHEAD = FFNTiling(64, Tiling(128, 64, 4, 5, 16, ping_pong=True, ahead=True), _DOWN_64)
"""301 to 760."""
PING_PONG_WIDE = FFNTiling(
    128, Tiling(96, 64, 4, 5, 8, ping_pong=True, ahead=True), Tiling(128, 64, 4, 6, 8, ping_pong=True)
)
"""More rows."""
DENSE_64 = DenseTiling(64)
"""21 to 48 rows per expert, for weights that `gluon_dense_tiles.admits`."""
DENSE_96 = DenseTiling(96)
"""49 to 76."""
_BY_MEAN_ROWS = ((6, _UP_TO_6), (20, _UP_TO_20))
_DENSE_BY_MEAN_ROWS = ((48, DENSE_64), (76, DENSE_96))
_PING_PONG_BY_MEAN_ROWS = ((300, PING_PONG), (760, PING_PONG_AHEAD))


def choose_tiling(
    pairs: int, num_experts: int, ping_pong: bool = False, dense: bool = False
) -> FFNTiling | SmallTiling | DenseTiling:
    """The tiling for `pairs` pairs over `num_experts` local experts, by the mean number of rows per expert.

    ping_pong: whether those of `gluon_grouped_gemm` may be chosen; dense: whether those of `gluon_dense_tiles` may.
    """
    choices: tuple[tuple[int, FFNTiling | SmallTiling | DenseTiling], ...] = (
        *_BY_MEAN_ROWS,
        *(_DENSE_BY_MEAN_ROWS if dense else ()),
        (76 if ping_pong else 90, _UP_TO_90),
        *(_PING_PONG_BY_MEAN_ROWS if ping_pong else ()),
    )
    for limit, tiling in choices:
        if pairs <= limit * num_experts:
            return tiling
    return PING_PONG_WIDE if ping_pong else _LARGE
