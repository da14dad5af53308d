"""The layout of quantised weights: every bit of a checkpoint's is where the kernels look for it."""

from __future__ import annotations

import pytest
import torch

from kernels.quantized_weight import FP8_PLACES, MXFP4_PLACES, pack_fp8, pack_mxfp4


def code(data: torch.Tensor, places: tuple[tuple[int, ...], ...], column: int) -> torch.Tensor:
    """The bits of one column of all rows, read from words [experts, runs, rows, words]: [experts, rows]."""
    run, within = divmod(column, 128)
    word, rest = divmod(within, 8 * len(places))
    pair, thread, odd = rest // 8, rest % 8 // 2, rest % 2
    words = data[:, run, :, data.shape[-1] // 4 * thread + word].to(torch.int64)
    bits = [words >> (place + 16 * odd) % 32 & 1 for place in places[pair]]
    return torch.stack(bits).mul(2 ** torch.arange(len(bits) - 1, -1, -1)[:, None, None]).sum(0)


def test_mxfp4_keeps_every_weight_and_fills_up_the_last_128_columns() -> None:
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (2, 8, 96), generator=generator, dtype=torch.uint8)
    scales = torch.randint(18, 145, (2, 8, 6), generator=generator, dtype=torch.uint8)
    packed = pack_mxfp4(blocks, scales)
    assert packed.mxfp4
    assert packed.shape == (2, 8, 256)
    wanted = torch.zeros(2, 8, 256, dtype=torch.int64)
    wanted[:, :, :192] = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    assert torch.equal(torch.stack([code(packed.data, MXFP4_PLACES, n) for n in range(256)], dim=-1), wanted)
    for block in range(6):
        word = packed.scale[:, block // 4].to(torch.int64) & 0xFFFFFFFF
        word = word << 8 | word >> 24 if block % 4 >= 2 else word
        assert torch.equal(word >> 16 * (block % 2) + 7 & 255, scales[:, :, block].to(torch.int64) + 110)


def test_fp8_keeps_every_weight() -> None:
    data = torch.randn(2, 128, 256, generator=torch.Generator().manual_seed(2)).to(torch.float8_e4m3fn)
    packed = pack_fp8(data, torch.ones(2, 1, 2))
    assert not packed.mxfp4
    assert packed.shape == (2, 128, 256)
    got = torch.stack([code(packed.data, FP8_PLACES, column) for column in range(256)], dim=-1)
    assert torch.equal(got, data.view(torch.uint8).to(torch.int64))


@pytest.mark.parametrize("places", [FP8_PLACES, MXFP4_PLACES])
def test_a_words_weights_do_not_share_bits(places: tuple[tuple[int, ...], ...]) -> None:
    assert sorted((place + 16 * odd) % 32 for pair in places for place in pair for odd in range(2)) == list(range(32))


def test_arguments_are_checked() -> None:
    data, scale = torch.ones(1, 128, 128).to(torch.float8_e4m3fn), torch.ones(1, 1, 1)
    with pytest.raises(ValueError, match="multiples of 128"):
        pack_fp8(data[:, :, :64], scale)
    with pytest.raises(ValueError, match="scales"):
        pack_fp8(data, scale.double())
    with pytest.raises(ValueError, match="not a number"):
        pack_fp8((data.float() * torch.nan).to(torch.float8_e4m3fn), scale)
    with pytest.raises(ValueError, match="want a multiple of 8"):
        pack_mxfp4(torch.zeros(1, 2, 16, dtype=torch.uint8), torch.full((1, 2, 1), 120, dtype=torch.uint8))
    with pytest.raises(ValueError, match="scales"):
        pack_mxfp4(torch.zeros(1, 8, 32, dtype=torch.uint8), torch.full((1, 8, 1), 120, dtype=torch.uint8))
    with pytest.raises(ValueError, match="want range"):
        pack_mxfp4(torch.zeros(1, 8, 32, dtype=torch.uint8), torch.full((1, 8, 2), 145, dtype=torch.uint8))
