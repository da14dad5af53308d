"""The expert FFN in tiles of few rows, in one launch for both products: what takes the time there is reading weights,
and starting and ending kernels.

The first programs compute gate/up, each a block of a tile's intermediate columns; the others down. A down program asks
for its first weights, then waits until all gate/up programs of its tile have arrived at the tile's counter. That ends:
gate/up programs wait for nobody and come first, see `triton_handover`.

Weights are the left operand (their rows are the 64 rows of a wgmma, the tokens its width of 8 to 256): a tile of 16
tokens then costs no padding to 64. Tiles are those of `triton_grouping`. Few pairs need none: each program looks for
the pairs of its expert itself; they keep their place among the rows of the operand, where the others are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.quantized_weight import COLUMNS, QuantizedWeight
from kernels.triton_activation import add_bias, gated
from kernels.triton_grouped_gemm import share_blocks
from kernels.triton_grouping import COUNTER_FIELD, TILE_FIELDS, Grouping
from kernels.triton_handover import arrive, leave, load_rows
from kernels.triton_quantized_gemm import fp8_product, mxfp4_product

MAX_PAIRS = 8
"""As many fit the one tile of few pairs, whose rows are the width of an mma."""


@dataclass(frozen=True)
class Cut:
    """How one product is cut: weight rows (of gate, and as many of up) and depth per step; an fp8 step is 128 deep."""

    block_n: int
    block_k: int
    stages: int


@dataclass(frozen=True)
class SmallTiling:
    """Tile height in rows, how both products are cut, in one launch or in one each.

    group_m: tiles of an expert that share a weight block before the next one. registers: most of a thread, if capped.
    With quantised weights no choice changes a result's bits while gate/up's block_n is at least 32 and down's 64; with
    others none does.
    """

    block_m: int
    gate_up: Cut
    down: Cut
    warps: int = 4
    group_m: int = 8
    one_launch: bool = True
    registers: int | None = None


_FEW_SHALLOW = SmallTiling(MAX_PAIRS, Cut(16, 256, 4), Cut(64, 256, 3), warps=2)
"""Few pairs of a hidden size up to 2048."""
_FEW_PAIRS = SmallTiling(MAX_PAIRS, Cut(16, 256, 5), Cut(32, 256, 3), warps=2)
"""Of more."""
_APART = tl.constexpr(64)
"""From so many rows on, those of gate and of up are two operands: a wgmma's left one, read from shared memory, must not
be reshaped, or it travels through registers."""


@triton.jit
def _find(
    item, n_blocks, experts_ptr, tiles_ptr, pairs, LISTED: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr
):
    """Tile, weight block, expert, places of the tile's rows in the activations, and which of them are live.

    Of few pairs, where every pair is a tile, the first one of an expert stands for all: others have the expert -1.
    """
    m = tl.arange(0, BLOCK_M)
    tile = item // n_blocks
    block = item % n_blocks
    if LISTED:
        entry = tiles_ptr + TILE_FIELDS * tile
        expert = tl.load(entry)
        start = tl.load(entry + 1)
        first = tl.load(entry + 3)
        tiles = tl.load(entry + 4)
        end = tl.load(entry + 5)
        if tiles > 1:  # it is the entry of one of them
            own, block = share_blocks(item - first * n_blocks, n_blocks, tiles, GROUP_M)
            start += (first + own - tile) * BLOCK_M
            tile = first + own
        place = start + m
        live = place < end
    else:
        expert = tl.load(experts_ptr + tile)
        place = m
        live = tl.load(experts_ptr + m, mask=m < pairs, other=-1) == expert
        expert = tl.where(tl.min(tl.where(live, m, BLOCK_M)) == tile, expert, -1)
    return tile, block, expert, place, live


@triton.jit
def _product(
    row_ptrs, live, w_desc, scales, expert, column, counter_ptr, wanted, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PARTS: tl.constexpr, WAIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """As in `triton_quantized_gemm`; w_desc of unquantised ("dense") weights: [experts * PARTS, ROWS, DEPTH]."""
    if KIND == "fp8":
        acc = fp8_product(
            row_ptrs, live, w_desc, scales, expert, column, counter_ptr, wanted, ROWS, DEPTH,
            BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PARTS, WAIT, ASM,
        )  # fmt: skip
    elif KIND == "mxfp4":
        acc = mxfp4_product(
            row_ptrs, live, w_desc, scales, expert, column, counter_ptr, wanted, DEPTH,
            BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PARTS, WAIT, ASM,
        )  # fmt: skip
    else:
        acc = tl.zeros((PARTS * BLOCK_N, BLOCK_M), tl.float32)
        for k0 in tl.range(0, DEPTH, BLOCK_K, num_stages=STAGES):
            w = w_desc.load([expert * PARTS, column, k0]).reshape(PARTS * BLOCK_N, BLOCK_K)
            x = load_rows(row_ptrs, live, k0, counter_ptr, wanted, DEPTH, BLOCK_K, WAIT)
            acc = tl.dot(w, x.T, acc)
    return acc


@triton.jit
def _two_products(
    row_ptrs, live, w_desc, expert, column, counter_ptr, DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`_product` of unquantised weights, gate's and up's by themselves."""
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = gate
    for k0 in tl.range(0, DEPTH, BLOCK_K, num_stages=STAGES):
        x = load_rows(row_ptrs, live, k0, counter_ptr, 0, DEPTH, BLOCK_K, False)
        gate = tl.dot(w_desc.load([expert * 2, column, k0]).reshape(BLOCK_N, BLOCK_K), x.T, gate)
        up = tl.dot(w_desc.load([expert * 2 + 1, column, k0]).reshape(BLOCK_N, BLOCK_K), x.T, up)
    return gate, up


@triton.jit
def _gate_up(
    item, x_ptr, x_stride, w_desc, scales, bias_ptr, act_ptr, experts_ptr, rows_ptr, tiles_ptr, pairs, top_k,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, KIND: tl.constexpr, LISTED: tl.constexpr,
    BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    COUNT: tl.constexpr, BIAS: tl.constexpr, LIMIT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (INTERMEDIATE + BLOCK_N - 1) // BLOCK_N
    tile, block, expert, place, live = _find(item, blocks, experts_ptr, tiles_ptr, pairs, LISTED, BLOCK_M, GROUP_M)
    if LISTED:
        row = tl.load(rows_ptr + place, mask=live, other=0)
    elif top_k == 0:  # not only the live ones: it need not wait for the experts
        row = tl.load(rows_ptr + place, mask=place < pairs, other=0)
    else:
        row = place // top_k
    if LISTED or expert >= 0:
        column = block * BLOCK_N
        counter_ptr = tiles_ptr + TILE_FIELDS * tile + COUNTER_FIELD
        row_ptrs = x_ptr + row.to(tl.int64)[:, None] * x_stride
        if KIND == "dense" and BLOCK_N >= _APART:
            gate, up = _two_products(
                row_ptrs, live, w_desc, expert, column, counter_ptr, HIDDEN, BLOCK_M, BLOCK_N, BLOCK_K, STAGES
            )
        else:
            both = _product(
                row_ptrs, live, w_desc, scales, expert, column, counter_ptr, 0, INTERMEDIATE, HIDDEN,
                KIND, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, 2, False, ASM,
            )  # fmt: skip
            gate, up = tl.split(both.reshape(2, BLOCK_N, BLOCK_M).permute(1, 2, 0))
        n = column + tl.arange(0, BLOCK_N)
        act = gated(gate, up, bias_ptr, expert, n, INTERMEDIATE, True, BIAS, LIMIT).to(act_ptr.dtype.element_ty)
        act_ptrs = act_ptr + place.to(tl.int64)[:, None] * INTERMEDIATE + n[None, :]
        tl.store(act_ptrs, act.T, mask=live[:, None] & (n < INTERMEDIATE)[None, :])
        if COUNT:
            arrive(counter_ptr)


@triton.jit
def _down(
    item, act_ptr, w_desc, scales, bias_ptr, out_ptr, out_stride, experts_ptr, order_ptr, tiles_ptr, pairs, producers,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, KIND: tl.constexpr, LISTED: tl.constexpr,
    BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    COUNT: tl.constexpr, BIAS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    tile, block, expert, place, live = _find(item, blocks, experts_ptr, tiles_ptr, pairs, LISTED, BLOCK_M, GROUP_M)
    if LISTED or expert >= 0:
        column = block * BLOCK_N
        counter_ptr = tiles_ptr + TILE_FIELDS * tile + COUNTER_FIELD
        acc = _product(
            act_ptr + place.to(tl.int64)[:, None] * INTERMEDIATE, live, w_desc, scales, expert, column,
            counter_ptr, producers, HIDDEN, INTERMEDIATE,
            KIND, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, 1, COUNT, ASM,
        )  # fmt: skip
        n = column + tl.arange(0, BLOCK_N)
        if BIAS:
            acc = add_bias(acc, bias_ptr + expert * HIDDEN, n, n < HIDDEN, True)
        if LISTED:
            pair = tl.load(order_ptr + place, mask=live, other=0)
        else:
            pair = place
        out_ptrs = out_ptr + pair.to(tl.int64)[:, None] * out_stride + n[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty).T, mask=live[:, None] & (n < HIDDEN)[None, :])
        if COUNT:
            leave(counter_ptr, producers + blocks - 1)


@triton.jit(do_not_specialize=["pairs", "top_k"])
def small_tiles_kernel(
    x_ptr, x_stride, w13_desc, scales13, w2_desc, scales2, bias13_ptr, bias2_ptr, act_ptr, out_ptr, out_stride,
    experts_ptr, rows_ptr, order_ptr, tiles_ptr, num_tiles_ptr, pairs, top_k,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, KIND: tl.constexpr, LISTED: tl.constexpr,
    GATE_UP: tl.constexpr, DOWN: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr,
    GATE_UP_N: tl.constexpr, GATE_UP_K: tl.constexpr, GATE_UP_STAGES: tl.constexpr,
    DOWN_N: tl.constexpr, DOWN_K: tl.constexpr, DOWN_STAGES: tl.constexpr,
    BIAS: tl.constexpr, LIMIT: tl.constexpr, OUT_AT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """GATE_UP: act[place] = silu(x @ gate.T) * (x @ up.T), or with a LIMIT gpt-oss's activation. DOWN: out[pair] = act
    @ down.T, biases added with BIAS.

    LISTED: rows_ptr, order_ptr, tiles_ptr and num_tiles_ptr are a `Grouping`, places grouped positions. Otherwise a
    place is a pair: out[pair] = the FFN of experts[pair], if that is not negative, on row rows[pair], or pair // top_k
    if top_k > 0; of the tiles, one for each pair, there are only the counters.
    With OUT_AT out_ptr points to the address of out, bf16, a multiple of 16. ASM: compiled, not interpreted.
    """
    if OUT_AT:
        out_ptr = tl.multiple_of(tl.load(out_ptr).to(tl.pointer_type(tl.bfloat16)), 16)
    gate_up_blocks: tl.constexpr = (INTERMEDIATE + GATE_UP_N - 1) // GATE_UP_N if GATE_UP else 0
    down_blocks: tl.constexpr = (HIDDEN + DOWN_N - 1) // DOWN_N
    tiles = pairs
    if LISTED:
        tiles = tl.load(num_tiles_ptr)
    program = tl.program_id(0)
    down_program = program - tiles * gate_up_blocks
    if GATE_UP and down_program < 0:
        _gate_up(
            program, x_ptr, x_stride, w13_desc, scales13, bias13_ptr, act_ptr, experts_ptr, rows_ptr, tiles_ptr,
            pairs, top_k, HIDDEN, INTERMEDIATE, KIND, LISTED, BLOCK_M, GROUP_M,
            GATE_UP_N, GATE_UP_K, GATE_UP_STAGES, ASM and DOWN, BIAS, LIMIT, ASM,
        )  # fmt: skip
    elif DOWN and down_program < tiles * down_blocks:
        _down(
            down_program, act_ptr, w2_desc, scales2, bias2_ptr, out_ptr, out_stride, experts_ptr, order_ptr, tiles_ptr,
            pairs, gate_up_blocks, HIDDEN, INTERMEDIATE, KIND, LISTED, BLOCK_M, GROUP_M,
            DOWN_N, DOWN_K, DOWN_STAGES, ASM and GATE_UP, BIAS, ASM,
        )  # fmt: skip


class SmallTiles:
    """`small_tiles_kernel` for a layer's weights; arguments as in `triton_expert_ffn.GroupedExperts`."""

    def __init__(
        self,
        w13: torch.Tensor | QuantizedWeight,
        w2: torch.Tensor | QuantizedWeight,
        biases: tuple[torch.Tensor, torch.Tensor] | None,
        limit: float,
    ) -> None:
        self._w13, self._w2 = w13, w2
        self._hidden, self._intermediate = w2.shape[1], w13.shape[1] // 2
        data = w2 if isinstance(w2, torch.Tensor) else w2.data
        self._biases = biases or (data, data)  # not read without biases
        self._of_pairs = torch.zeros(MAX_PAIRS, TILE_FIELDS.value, dtype=torch.int32, device=data.device)
        self._constants = {
            "HIDDEN": self._hidden, "INTERMEDIATE": self._intermediate, "KIND": _kind(w2), "BIAS": biases is not None,
            "LIMIT": float(limit), "ASM": isinstance(small_tiles_kernel, triton.JITFunction),
        }  # fmt: skip

    def ffn(
        self, x: torch.Tensor, grouping: Grouping, activations: torch.Tensor, out: torch.Tensor, tiling: SmallTiling
    ) -> None:
        """Both products of grouped pairs, in one launch or two."""
        lists = grouping.rows, grouping.rows, grouping.order, grouping.tiles, grouping.num_tiles, 0, 0
        self._launch(tiling, x, activations, out, grouping.max_tiles, lists, listed=True)

    def few_pairs(
        self, x: torch.Tensor, experts: torch.Tensor, rows: torch.Tensor | None, top_k: int,
        activations: torch.Tensor, out: torch.Tensor,
    ) -> None:  # fmt: skip
        """The same for up to MAX_PAIRS pairs that are not grouped, on unquantised weights."""
        pairs = experts.numel()
        rows, top_k = (experts, top_k) if rows is None else (rows, 0)
        lists = experts, rows, experts, self._of_pairs, experts, pairs, top_k
        tiling = _FEW_SHALLOW if self._hidden <= 2048 else _FEW_PAIRS
        self._launch(tiling, x, activations, out, pairs, lists, listed=False)

    def _launch(
        self, tiling: SmallTiling, x: torch.Tensor, activations: torch.Tensor, out: torch.Tensor, most_tiles: int,
        lists: tuple[Any, ...], listed: bool,
    ) -> None:  # fmt: skip
        first, second, out_at = tiling.gate_up, tiling.down, out.dtype == torch.int64
        for gate_up, down in [(True, True)] if tiling.one_launch else [(True, False), (False, True)]:
            gate_up_blocks = gate_up * triton.cdiv(self._intermediate, first.block_n)
            down_blocks = down * triton.cdiv(self._hidden, second.block_n)
            small_tiles_kernel[(most_tiles * (gate_up_blocks + down_blocks),)](
                x, x.stride(0), *_operands(self._w13, 2, first), *_operands(self._w2, 1, second), *self._biases,
                activations, out, self._hidden if out_at else out.stride(0), *lists,
                LISTED=listed, GATE_UP=gate_up, DOWN=down, BLOCK_M=tiling.block_m, GROUP_M=tiling.group_m,
                GATE_UP_N=first.block_n, GATE_UP_K=first.block_k, GATE_UP_STAGES=first.stages,
                DOWN_N=second.block_n, DOWN_K=second.block_k, DOWN_STAGES=second.stages,
                OUT_AT=out_at, num_warps=tiling.warps, maxnreg=tiling.registers, **self._constants,
            )  # fmt: skip


def _kind(weight: torch.Tensor | QuantizedWeight) -> str:
    if isinstance(weight, torch.Tensor):
        return "dense"
    return "mxfp4" if weight.mxfp4 else "fp8"


def _operands(
    weight: torch.Tensor | QuantizedWeight, parts: int, cut: Cut
) -> tuple[TensorDescriptor, TensorDescriptor | torch.Tensor]:
    """A product's weights and scales for the kernel; an expert's rows are those of `parts` matrices."""
    if isinstance(weight, torch.Tensor):
        matrices = weight.view(-1, weight.shape[1] // parts, weight.shape[2])
        together = 1 if cut.block_n >= _APART.value else parts
        return TensorDescriptor.from_tensor(matrices, [together, cut.block_n, cut.block_k]), weight
    rows, words = weight.shape[1] // parts, weight.data.shape[-1]
    block = [parts * cut.block_k // COLUMNS, cut.block_n]
    data = TensorDescriptor.from_tensor(weight.data.view(-1, rows, words), [*block, words])
    if weight.mxfp4:
        return data, TensorDescriptor.from_tensor(weight.scale.view(-1, rows), block)
    return data, weight.scale
