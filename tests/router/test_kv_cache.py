import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moering.protocol import Sampling
from router.kv_cache import BLOCK_SIZE, BlockManager, KVCache
from router.prefix_cache import PrefixCache
from router.sequence import Sequence


def manager_of(num_blocks, span=1):
    return BlockManager(num_blocks, PrefixCache(1, lambda *_: None), span)


def test_the_lowest_run_is_handed_out_first():
    manager = manager_of(8)
    assert manager.allocate(2) == [0, 1]
    assert manager.allocate(3) == [2, 3, 4]
    manager.free([0, 1])
    assert manager.allocate(1) == [0]
    assert manager.free_blocks == 4


def test_a_run_is_preferred_to_lower_single_blocks():
    manager = manager_of(6)
    manager.allocate(6)
    manager.free([0, 2, 3])
    assert manager.allocate(2) == [2, 3]


def test_without_a_run_the_lowest_blocks_do():
    manager = manager_of(6)
    manager.allocate(6)
    manager.free([5, 1, 3])
    assert manager.allocate(3) == [1, 3, 5]


def test_a_sequence_grows_behind_its_last_block():
    manager = manager_of(8)
    first, other = manager.allocate(1), manager.allocate(1)
    manager.free(other)
    manager.allocate(1)
    assert manager.allocate(1, after=first[-1]) == [2]  # taken behind it: any free one
    assert manager.allocate(2, after=2) == [3, 4]


def test_spans_keep_room_to_grow_while_memory_is_plentiful():
    manager = manager_of(10, span=4)
    assert manager.allocate(1) == [0]
    assert manager.allocate(2) == [4, 5]
    assert manager.allocate(1, after=0) == [1]
    assert manager.allocate(1) == [2]  # no whole span is free any more
    manager.check_integrity()


def test_free_blocks_that_hold_prefixes_are_taken_last_and_the_longest_unused_of_them_first():
    prefixes = PrefixCache(1, lambda *_: None)
    manager = BlockManager(6, prefixes, span=2)
    for name in (1, 2):
        holding(prefixes, manager, [name])
    assert manager.allocate(1) == [4]  # the span without a prefix
    assert manager.allocate(1) == [0]  # then that of prefix 1
    assert (prefixes.last_use(0), prefixes.last_use(2) > 0) == (0, True)
    assert manager.allocate(1, after=0) == [1]
    assert manager.allocate(2) == [2, 3]
    assert len(prefixes) == 0


def test_without_a_run_the_longest_unused_blocks_do():
    prefixes = PrefixCache(1, lambda *_: None)
    manager = BlockManager(5, prefixes)
    lone = [holding(prefixes, manager, [name], keep=True) for name in range(5)]
    for block in (4, 2, 0):
        manager.free(lone[block])
    assert manager.allocate(2) == [2, 4]


def holding(prefixes, manager, prompt, keep=False):
    """The blocks of a sequence of one-token blocks that was computed, and has ended unless it is to `keep` them."""
    sequence = Sequence("a", 0, b"", prompt, [], Sampling(1), 1e9)
    sequence.block_table = manager.allocate(len(prompt))
    sequence.num_computed = len(prompt)
    prefixes.offer(sequence)
    if not keep:
        manager.free(sequence.block_table)
    return sequence.block_table


def test_more_than_there_is_is_refused_and_changes_nothing():
    manager = manager_of(2)
    with pytest.raises(ValueError, match="3 blocks asked for, 2 are free"):
        manager.allocate(3)
    assert manager.free_blocks == 2


@pytest.mark.parametrize("block", [0, 5, -1])
def test_freeing_what_is_not_handed_out_is_refused(block):
    with pytest.raises(ValueError, match=f"block {block} is not handed out"):
        manager_of(2).free([block])


operations = st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 100)), max_size=60)


@given(st.integers(1, 20), st.integers(1, 5), operations)
def test_no_block_is_lost_or_held_twice(num_blocks, span, steps):
    manager = manager_of(num_blocks, span)
    held: list[list[int]] = []
    for allocate, n, pick in steps:
        if allocate and n <= manager.free_blocks:
            after = held[pick % len(held)][-1] if held and held[pick % len(held)] else None
            held.append(manager.allocate(n, after))
            assert len(held[-1]) == n
        elif held:
            manager.free(held.pop(pick % len(held)))
        manager.check_integrity()
        blocks = [block for taken in held for block in taken]
        assert len(blocks) == len(set(blocks)) == num_blocks - manager.free_blocks
        assert all(0 <= block < num_blocks for block in blocks)


def test_check_integrity_sees_a_lost_block():
    manager = manager_of(3)
    manager._is_free[1] = False
    with pytest.raises(AssertionError, match="count of free KV blocks"):
        manager.check_integrity()


def test_the_cache_is_zeroed_and_knows_its_size():
    cache = KVCache(num_layers=2, num_kv_heads=3, head_dim=8, num_blocks=2)
    assert [tuple(layer.shape) for layer in cache.layers] == [(2 * BLOCK_SIZE, 2, 3, 8)] * 2
    assert all(not layer.any() for layer in cache.layers)
    assert cache.nbytes == 2 * KVCache.block_bytes(2, 3, 8)


def test_a_block_is_copied_in_all_layers_and_nothing_else():
    cache = KVCache(num_layers=2, num_kv_heads=1, head_dim=4, num_blocks=3)
    for layer in cache.layers:
        layer.view(3, -1).copy_(torch.arange(1.0, 4.0)[:, None].expand(3, layer.numel() // 3))
    cache.copy_block(2, 0)
    for layer in cache.layers:
        assert [set(block.tolist()) for block in layer.view(3, -1)] == [{3.0}, {2.0}, {3.0}]


def test_memory_is_taken_when_written():
    process = psutil.Process()
    before = process.memory_info().rss
    cache = KVCache(num_layers=1, num_kv_heads=8, head_dim=128, num_blocks=64)
    assert cache.nbytes == 1 << 28
    assert process.memory_info().rss - before < cache.nbytes // 4
    cache.layers[0].fill_(1)
    assert process.memory_info().rss - before > cache.nbytes // 4 * 3


def test_only_the_block_size_that_attention_needs_is_served():
    with pytest.raises(ValueError, match="block_size 16"):
        KVCache(1, 1, 8, 1, block_size=16)
