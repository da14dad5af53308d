"""Block-scaled fp8 weights as the hub's checkpoints have them: what `config.json` says of them, and where scales are.

A matrix `X.weight` of float8_e4m3fn codes has a `X.weight_scale_inv` with one factor for each block of 128 x 128, where
blocks at the edges may be smaller. A weight is code times factor, whatever the name says (so in transformers 5,
`integrations/finegrained_fp8.py`). Which matrices are quantised is seen from their dtype, not from the configuration's
`modules_to_not_convert`. `kernels.dequantize` widens them.
"""

from __future__ import annotations

from typing import Any

from moering.errors import CheckpointError
from moering.safetensors_shard import RawTensor

BLOCK = 128
FP8 = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16")
SCALE_SUFFIX = "_scale_inv"

# what each entry of quantization_config may be; None: absent
_SERVED: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None),
    "weight_block_size": ([BLOCK, BLOCK],),
    "scale_fmt": ("float", None),
    "expert_dtype": ("fp8", None),
}


def is_quantized(config: dict[str, Any], where: str) -> bool:
    """Whether matrices may be fp8; raise `CheckpointError` for any other quantisation."""
    quantization = config.get("quantization_config")
    if not quantization:
        return False
    given = quantization if isinstance(quantization, dict) else {}
    for key, values in _SERVED.items():
        if given.get(key) not in values:
            raise CheckpointError(
                f"{where}: quantization_config with {key} {given.get(key)!r} is not supported; supported are fp8 "
                f'weights with a scale for each block of {BLOCK} x {BLOCK}: "quant_method": "fp8", "fmt": "e4m3", '
                f'"activation_scheme": "dynamic", "weight_block_size": [{BLOCK}, {BLOCK}]'
            )
    return True


def scale_name(weight: str) -> str:
    """The name of a matrix's scales."""
    return weight + SCALE_SUFFIX


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a matrix [rows, columns]."""
    return tuple(-(-size // BLOCK) for size in shape)


def check_values(weight: RawTensor, scale: RawTensor, name: str, where: str) -> None:
    """Raise `CheckpointError`, naming the file (`where`) and the tensor, for codes or scales that are not finite."""
    if weight.data.size and int((weight.data & 127).max()) == 127:  # e4m3fn has no infinity, and only this NaN
        raise CheckpointError(f"{where}: tensor {name} has codes that are not a number")
    bits, exponent = ("<u4", 0x7F800000) if scale.dtype == "F32" else ("<u2", 0x7F80)
    if scale.data.size and int((scale.data.view(bits) & exponent).max()) == exponent:
        raise CheckpointError(f"{where}: tensor {scale_name(name)} has scales that are not finite numbers")
