"""Experts, attention and gate on a CPU (`csrc/native.c`), where a C compiler was there when moering was installed.

Arguments that name memory are addresses of contiguous arrays, float32 where nothing else is said; strides count values
between rows. Nothing is checked here.
"""

PANEL: int
"""Outputs of a weight are packed in groups of so many."""
BLOCK: int
"""Keys of a block of the KV cache."""
MAX_DIM: int
"""The largest size of a head, which is a multiple of 16."""
MAX_QUERIES: int
"""The most heads that attend together: of one row at least the heads of one key and value head."""
STRUCT_BYTES: int
"""Of the structures that Python fills in, together: another sum is that of an older build."""

def pack_fp16(weight: int, n: int, k: int, packed: int) -> None:
    """Lay out `weight` [n, k] as [panels, k, PANEL] at `packed`; outputs that the last panel lacks are 0."""

def pack_fp32(weight: int, n: int, k: int, packed: int) -> None:
    """The same for fp32."""

def linear(weight: int, x: int, x_stride: int, rows: int, out: int, out_stride: int, threads: int) -> None:
    """`x` [rows, k] times a `kernels.native_linear.Weight` [n, k] transposed into `out` [rows, n]."""

def expert_ffn(gate_up: int, down: int, x: int, rows: int, both: int, out: int, threads: int) -> None:
    """`down(silu(gate(x)) * up(x))` of `x` [rows, hidden] into `out`, with `Weight`s [2 * inter, hidden] and [hidden,
    inter]; `both` is room for [rows, 2 * inter]."""

def rms_norm(x: int, weight: int, eps: float, rows: int, n: int, out: int) -> None:
    """`x / sqrt(mean(x²) + eps) * weight` of each row of [rows, n]; `out` may be `x`."""

def until_experts(model: int, layer: int, batch: int, threads: int) -> None:
    """Attention and gate of a layer, on the structures of `kernels.native_decoder`."""

def after_experts(model: int, batch: int, outputs: int) -> None:
    """Experts' `outputs` [rows, top_k, hidden], weighted, onto the residual, in top-k order."""

def use(instructions: str) -> bool:
    """Compute with "avx512" or "avx2" from now on, False where the processor does not have it; at first with the best
    that it has. The bits are the same."""
