import torch

from kernels.attention import padded_key_length
from router.attention_plan import MAX_MASK_ELEMENTS, SequenceChunk, plan_attention
from router.kv_cache import BLOCK_SIZE

DIM = 64


def decode(table: list[int], position: int) -> SequenceChunk:
    return SequenceChunk(table, position, 1)


def visible(mask: torch.Tensor) -> list[int]:
    """How many keys each row of a mask sees."""
    return (mask == 0).sum(-1).flatten().tolist()


def test_decode_rows_at_regular_distances_share_a_call():
    plan = plan_attention([decode([4 * i], 10 + i) for i in range(5)], DIM)
    (call,) = plan.decodes
    assert (call.lo, call.hi, call.keys.count) == (0, 5, 5)
    assert (call.keys.first, call.keys.step) == (0, 4 * BLOCK_SIZE)
    assert visible(call.mask) == [11, 12, 13, 14, 15]
    assert plan.order is None
    assert plan.slots.tolist() == [4 * i * BLOCK_SIZE + 10 + i for i in range(5)]


def test_rows_are_brought_into_the_order_of_their_blocks():
    plan = plan_attention([decode([6], 3), decode([2], 4), decode([4], 5)], DIM)
    assert plan.order is not None
    assert plan.order.tolist() == [1, 2, 0]
    (call,) = plan.decodes
    assert (call.keys.first, call.keys.step) == (2 * BLOCK_SIZE, 2 * BLOCK_SIZE)
    assert visible(call.mask) == [5, 6, 4]


def test_an_irregular_distance_starts_another_call():
    plan = plan_attention([decode([b], 3) for b in (0, 1, 2, 5, 9)], DIM)
    assert [(call.lo, call.hi) for call in plan.decodes] == [(0, 3), (3, 5)]


def test_contexts_of_different_padded_length_do_not_share_a_call():
    plan = plan_attention([decode([0], 3), decode([1], 511), decode([2], 4)], DIM)
    assert [call.keys.length for call in plan.decodes] == [padded_key_length(4, DIM), BLOCK_SIZE]
    assert plan.order is not None
    assert plan.order.tolist() == [0, 2, 1]


def test_only_scattered_blocks_are_gathered():
    in_a_row, scattered = decode([3, 4], 600), decode([7, 1], 600)
    plan = plan_attention([in_a_row, scattered], DIM)
    viewed, gathered = plan.decodes
    assert viewed.keys.slots is None
    assert gathered.keys.slots is not None
    slots = gathered.keys.slots.tolist()
    assert len(slots) == gathered.keys.length == padded_key_length(601, DIM)
    assert slots[:2] == [7 * BLOCK_SIZE, 7 * BLOCK_SIZE + 1]
    assert slots[BLOCK_SIZE] == BLOCK_SIZE
    assert plan.slots.tolist() == [4 * BLOCK_SIZE + 88, BLOCK_SIZE + 88]


def test_blocks_beyond_the_keys_do_not_force_a_gather():
    (call,) = plan_attention([decode([3, 9], 100)], DIM).decodes
    assert call.keys.slots is None


def test_a_prefill_chunk_has_a_causal_call_of_its_own():
    plan = plan_attention([decode([0], 7), SequenceChunk([1], 5, 3)], DIM)
    (call,) = plan.prefills
    assert (call.lo, call.hi, call.padded) == (1, 4, 4)
    assert visible(call.mask) == [6, 7, 8, 9]  # the fourth row is padding
    assert call.keys.first == BLOCK_SIZE


def test_decode_rows_behind_a_prefill_chunk_are_named():
    plan = plan_attention([SequenceChunk([0], 0, 4), decode([1], 7), decode([2], 8)], DIM)
    assert plan.order is not None
    assert plan.order.tolist() == [4, 5]
    assert plan.slots.tolist() == [0, 1, 2, 3, BLOCK_SIZE + 7, 2 * BLOCK_SIZE + 8]


def test_the_mask_of_a_long_chunk_is_bounded():
    table = list(range(64))
    start = 64 * BLOCK_SIZE - 512
    calls = plan_attention([SequenceChunk(table, start, 512)], DIM).prefills
    assert len(calls) > 1
    assert all(call.mask.numel() <= MAX_MASK_ELEMENTS for call in calls)
    assert [call.lo for call in calls] + [512] == [0] + [call.hi for call in calls]
    seen = [row for call in calls for row in visible(call.mask)[: call.hi - call.lo]]
    assert seen == list(range(start + 1, start + 513))
