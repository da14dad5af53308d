"""A library that computes more than 12 rows in another way, as one on an Intel Xeon does: no row may show it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from kernels import attention, linear
from kernels.row_blocks import MULTIPLE, PROBE_ROWS, largest_block

MOST = 12
OTHER_BITS = 1 + 2.0**-20


@pytest.fixture
def probed_anew() -> Iterator[None]:
    caches = (linear._row_block, attention.query_block, attention.key_tails)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(("most", "block"), [(0, 4), (4, 4), (15, 12), (70, 64), (400, 384), (PROBE_ROWS, sys.maxsize)])
def test_the_block_is_the_largest_up_to_which_all_agree(most: int, block: int) -> None:
    assert largest_block(lambda n: n <= most) == block
    assert block == sys.maxsize or block % MULTIPLE == 0


def test_a_longer_product_that_agrees_again_is_not_used() -> None:
    assert largest_block(lambda n: n != 24) == 20


@pytest.mark.usefixtures("probed_anew")
def test_rows_of_a_linear_layer_keep_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return F.linear(x, weight) * (OTHER_BITS if len(x) > MOST else 1.0)

    monkeypatch.setattr(linear, "F", Library(product))
    layer = linear.PackedLinear(torch.randn(2000, 48), "portable")
    x = torch.randn(70, 48)
    alone = torch.cat([layer(row) for row in x.split(1)])
    seen.clear()
    for n in range(1, 71):
        assert torch.equal(layer(x[:n]), alone[:n])
    assert max(seen) == MOST


@pytest.mark.usefixtures("probed_anew")
def test_queries_keep_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    flash = attention._FLASH

    def product(query: torch.Tensor, *args: object, attn_mask: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(query.shape[2])
        result = flash(query, *args, attn_mask=attn_mask)[0]
        return (result * (OTHER_BITS if query.shape[2] > MOST else 1.0),)

    monkeypatch.setattr(attention, "_FLASH", product)
    query, key, value = torch.randn(3, 2, 2, 512, 32).unbind()
    mask = torch.zeros(1, 1, 512, 512).masked_fill_(~torch.ones(512, 512, dtype=torch.bool).tril(), float("-inf"))
    fours = [attention.attend(query[:, :, i : i + 4], key, value, mask[:, :, i : i + 4]) for i in range(0, 512, 4)]
    seen.clear()
    for n in (4, 16, 100, 512):
        whole = attention.attend(query[:, :, :n], key, value, mask[:, :, :n])
        assert torch.equal(whole, torch.cat(fours, 2)[:, :, :n])
    assert max(seen) == MOST


class Library:
    """`torch.nn.functional` with another product."""

    pad = staticmethod(F.pad)

    def __init__(self, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.linear = product
