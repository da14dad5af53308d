"""The kernel that packs fp8 codes gives the words of the reference, and reads and writes nothing else."""

from __future__ import annotations

import pytest
import torch

from kernels.quantized_weight import pack_fp8
from kernels.triton_pack import pack_fp8_into

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, POISON, MARGIN = (0x7F, 0xFF), 0x5AFE5AFE, 4096
FINITE = torch.tensor([code for code in range(256) if code not in NAN], dtype=torch.uint8)


def surrounded(inner: torch.Tensor, poison: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(a larger tensor, the part of it that is a copy of `inner`)."""
    whole = torch.full((inner.numel() + 2 * MARGIN,), poison, dtype=inner.dtype, device=DEVICE)
    part = whole[MARGIN:-MARGIN].view(inner.shape)
    part.copy_(inner)
    return whole, part


def pack(codes: torch.Tensor) -> torch.Tensor:
    """The words of codes that have NaN around them."""
    rows, depth = codes.shape
    _, inner = surrounded(codes, NAN[0])
    whole, words = surrounded(torch.zeros(depth // 128, rows, 32, dtype=torch.int32), POISON)
    pack_fp8_into(words, inner)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert bool((whole[:MARGIN] == POISON).all()) and bool((whole[-MARGIN:] == POISON).all())
    return words.cpu()


@pytest.mark.parametrize(("rows", "depth"), [(128, 128), (128, 640), (384, 128), (256, 384)])
def test_the_words_are_those_of_the_reference(rows: int, depth: int) -> None:
    generator = torch.Generator().manual_seed(rows + depth)
    codes = FINITE[torch.randint(len(FINITE), (rows, depth), generator=generator)]
    words = pack(codes)
    assert torch.equal(
        words, pack_fp8(codes.view(torch.float8_e4m3fn)[None], torch.ones(1, rows // 128, depth // 128)).data[0]
    )


def test_every_code_in_every_column() -> None:
    codes = FINITE[(torch.arange(256)[:, None] + 7 * torch.arange(128)) % len(FINITE)]
    words = pack(codes)
    assert torch.equal(words, pack_fp8(codes.view(torch.float8_e4m3fn)[None], torch.ones(1, 2, 1)).data[0])


def test_arguments_are_checked() -> None:
    codes, words = torch.zeros(128, 256, dtype=torch.uint8), torch.zeros(2, 128, 32, dtype=torch.int32)
    with pytest.raises(ValueError, match="multiples of 128"):
        pack_fp8_into(words, codes[:, :64].contiguous())
    with pytest.raises(ValueError, match="want contiguous bytes"):
        pack_fp8_into(words[:1], codes[:, :128])
    for wrong in words[:1], words.float(), torch.zeros(2, 32, 128, dtype=torch.int32).transpose(1, 2):
        with pytest.raises(ValueError, match=r"want \(2, 128, 32\) int32, contiguous"):
            pack_fp8_into(wrong, codes)
