"""One attention layer against a plain computation in fp64; its bits are test_decoder's matter, but for many threads."""

import pytest
import torch

from moering.checkpoint import Checkpoint
from router.attention import Attention, _rotate, keys_values, pair_rows, rotary_table
from router.attention_plan import KeyView, SequenceChunk, plan_attention
from router.kv_cache import KVCache
from router.model_config import MoEModelConfig
from tests.tiny import write_checkpoint


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rotate_half_reference(x: torch.Tensor, theta: float) -> torch.Tensor:
    """x [n, heads, d] at positions 0 … n-1, as the model families define the rotary embedding."""
    dim = x.shape[-1]
    angles = torch.arange(len(x)).double()[:, None] / theta ** (torch.arange(0, dim, 2).double() / dim)
    cos, sin = (f.repeat(1, 2)[:, None] for f in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (8, 1), (1, 1), (4, 4)])
def test_a_layer_is_grouped_query_attention(tmp_path, heads, kv_heads):
    path = write_checkpoint(tmp_path, layers=1, heads=heads, kv_heads=kv_heads, head_dim=16)
    config = MoEModelConfig.from_checkpoint(Checkpoint(path))
    shapes = {"q_proj": (heads * 16, 64), "k_proj": (kv_heads * 16, 64), "v_proj": (kv_heads * 16, 64)}
    weights = {name: torch.randn(shape) / 8 for name, shape in (shapes | {"o_proj": (64, heads * 16)}).items()}
    x = torch.randn(11, 64)

    q, k, v = (((x @ weights[n].T).double()).view(11, -1, 16) for n in ("q_proj", "k_proj", "v_proj"))
    q, k = (rotate_half_reference(t, config.rope_theta) for t in (q, k))
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / 4 + torch.full((11, 11), float("-inf")).triu(1)
    mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
    expected = mixed @ weights["o_proj"].double().T

    attention, cache = Attention(config, weights, "auto"), KVCache(1, kv_heads, 16, 2).layers[0]
    rotation = rotary_table(config, 11).unsqueeze(1)
    prefill = plan_attention([SequenceChunk([1], 0, 10)], 16)
    decode = plan_attention([SequenceChunk([1], 10, 1)], 16)
    first = attention(x[:10], rotation[:10], prefill, cache)
    last = attention(x[10:], rotation[10:], decode, cache)
    assert (torch.cat((first, last)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_rotary_embedding_has_the_same_bits_on_any_threads(threads):
    heads, rotation = torch.randn(300, 40, 128), torch.randn(300, 1, 64, dtype=torch.complex64)
    torch.set_num_threads(1)
    alone = heads.clone()
    for row in range(300):
        _rotate(alone[row : row + 1], rotation[row : row + 1])
    torch.set_num_threads(threads)
    for rows in (*range(20, 40), 299, 300):
        together = heads[:rows].clone()
        _rotate(together, rotation[:rows])
        assert torch.equal(together, alone[:rows])


def test_pair_rows_puts_what_turns_together_side_by_side():
    assert pair_rows(torch.arange(8), 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert pair_rows(torch.arange(8)[:, None], 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_keys_and_values_are_views_unless_gathered():
    cache = torch.randn(8, 2, 3, 4)  # slots, key or value, heads, dim
    key, value = keys_values(cache, KeyView(count=2, length=3, first=1, step=4))
    assert torch.equal(key, torch.stack((cache[1:4, 0], cache[5:8, 0])).transpose(1, 2))
    assert torch.equal(value, torch.stack((cache[1:4, 1], cache[5:8, 1])).transpose(1, 2))
    assert key.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
    slots = torch.tensor([6, 0, 7])
    key, value = keys_values(cache, KeyView(count=1, length=3, first=6, step=0, slots=slots))
    assert torch.equal(key[0], cache[slots, 0].transpose(0, 1))
    assert torch.equal(value[0], cache[slots, 1].transpose(0, 1))
