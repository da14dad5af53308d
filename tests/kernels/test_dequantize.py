"""fp8 weights become the numbers that they stand for."""

from __future__ import annotations

import pytest
import torch

from kernels.dequantize import FP16_LIMIT, dequantize, to_fp16
from kernels.linear import PackedLinear, resolve_backend


@pytest.mark.parametrize("shape", [(128, 256), (200, 130), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_code_times_scale(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 127, shape, generator=generator, dtype=torch.uint8)
    codes |= torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8) << 7
    weights = codes.view(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128), generator=generator).to(dtype)
    widened = dequantize(weights, scale)
    assert widened.dtype == torch.float32 and widened.is_contiguous()
    for row in (0, shape[0] // 2, shape[0] - 1):
        for column in (0, shape[1] // 2, shape[1] - 1):
            exact = float(weights[row, column].double() * scale[row // 128, column // 128].double())
            assert float(widened[row, column]) == float(torch.tensor(exact, dtype=torch.float32))


def test_packed_weights_are_the_nearest_fp16_ones() -> None:
    codes = (torch.randn(128, 128, generator=torch.Generator().manual_seed(1)) * 100).to(torch.float8_e4m3fn)
    widened = dequantize(codes, torch.tensor([[0.00123]]))
    packable = to_fp16(widened)
    assert packable.dtype == torch.float16
    assert float(((packable.double() - widened.double()).abs() / widened.double().abs().clamp(2**-14)).max()) <= 2**-11
    assert PackedLinear(packable).backend == resolve_backend("auto")


def test_weights_beyond_fp16_stay_as_they_are() -> None:
    codes = torch.full((4, 4), 448.0).to(torch.float8_e4m3fn)
    largest = torch.tensor([[FP16_LIMIT / 448]])
    for scale in (largest, -largest):
        widened = dequantize(codes, scale)
        assert to_fp16(widened) is widened
        linear = PackedLinear(to_fp16(widened))
        assert torch.equal(linear(torch.ones(1, 4)), widened.sum(1)[None])
    assert to_fp16(dequantize(codes, largest * 0.999)).dtype == torch.float16
