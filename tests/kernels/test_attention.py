import pytest
import torch
import torch.nn.functional as F

from kernels.attention import KEY_BLOCK, attend, key_tails, padded_key_length

HEADS = 2


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def causal_mask(positions: torch.Tensor, keys: int) -> torch.Tensor:
    hidden = torch.arange(keys) > positions[:, None]
    return torch.zeros(1, 1, len(positions), keys).masked_fill_(hidden, float("-inf"))


def attend_at(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, keys: int) -> torch.Tensor:
    """Query rows [heads, m, d] at positions start, start + 1, … over the first `keys` keys."""
    mask = causal_mask(torch.arange(start, start + query.shape[1]), keys)
    return attend(query[None], key[None, :, :keys], value[None, :, :keys], mask)[0]


def decode_at(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: int, keys: int) -> torch.Tensor:
    """One row of `query` [heads, m, d], padded to 4: what every other call is compared with."""
    padded = F.pad(query[:, position, None], (0, 0, 0, 3))
    mask = causal_mask(torch.tensor([position] * 4), keys)
    return attend(padded[None], key[None, :, :keys], value[None, :, :keys], mask)[0, :, 0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_bits_at_every_position_are_those_of_whole_blocks(head_dim, threads):
    context = 2 * KEY_BLOCK
    generator = torch.Generator().manual_seed(head_dim)
    query, key, value = torch.randn(3, HEADS, context, head_dim, generator=generator)
    torch.set_num_threads(1)
    whole = torch.stack(
        [decode_at(query, key, value, p, (p // KEY_BLOCK + 1) * KEY_BLOCK) for p in range(context)], dim=1
    )
    torch.set_num_threads(threads)
    short = [decode_at(query, key, value, p, padded_key_length(p + 1, head_dim)) for p in range(context)]
    assert [p for p in range(context) if not torch.equal(short[p], whole[:, p])] == []
    for rows in (4, 20, 36, 100, 256, 512):
        for start in (0, 1, 61, 190, 300, 450, 511):
            keys = padded_key_length(start + rows, head_dim)
            chunk = attend_at(query[:, start : start + rows], key, value, start, keys)
            assert torch.equal(chunk, whole[:, start : start + rows]), (rows, start)


def test_a_batch_has_the_bits_of_its_rows():
    query, key, value = torch.randn(3, 5, HEADS, 64, 32)
    mask = causal_mask(torch.arange(4), 64)
    batch = attend(query[:, :, :4], key, value, mask)
    for i in range(5):
        assert torch.equal(attend(query[i : i + 1, :, :4], key[i : i + 1], value[i : i + 1], mask)[0], batch[i])


def test_it_is_softmax_attention():
    query, key, value = torch.randn(3, 1, HEADS, 64, 32)
    mask = causal_mask(torch.arange(64), 64)
    scores = query.double() @ key.double().transpose(2, 3) / 32**0.5 + mask
    assert (attend(query, key, value, mask) - scores.softmax(-1) @ value.double()).abs().max() < 1e-5


def test_key_lengths_are_whole_blocks_and_a_tail():
    tails = key_tails(64)
    assert tails == tuple(sorted(tails))
    assert tails[-1] == KEY_BLOCK
    assert padded_key_length(KEY_BLOCK, 64) == KEY_BLOCK
    for keys in (1, 64, 65, 200, 511, 513, 1300):
        full, tail = divmod(padded_key_length(keys, 64) - 1, KEY_BLOCK)
        assert tail + 1 in tails
        assert 0 <= full * KEY_BLOCK + tail + 1 - keys < KEY_BLOCK
