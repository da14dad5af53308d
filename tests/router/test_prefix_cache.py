"""Prefixes are computed once, each by its own tokens, and never found where they are not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moering.prefix import prefix_keys
from tests.router.fake_engine import BLOCK, Engine, expected_output, make

PROMPT = list(range(1, 3 * BLOCK + 3))  # three full blocks and two tokens


def finish(engine, *sequences):
    engine.run()
    for s in sequences:
        assert s.output == expected_output(s)


def test_what_a_prompt_begins_with_is_computed_once():
    engine = Engine()
    finish(engine, engine.add(PROMPT))
    before = engine.computed
    other = [*PROMPT[: 2 * BLOCK], 40, 41, 42, 43, 44]
    finish(engine, engine.add(other, max_tokens=1))
    assert engine.computed - before == len(other) - 2 * BLOCK
    assert engine.prefixes.tokens_reused == 2 * BLOCK


def test_a_prompt_that_is_held_whole_still_computes_its_last_token():
    engine = Engine()
    for expected in (2 * BLOCK, BLOCK):
        before = engine.computed
        finish(engine, engine.add(PROMPT[: 2 * BLOCK], max_tokens=1))
        assert engine.computed - before == expected


def test_generated_tokens_are_part_of_the_prefix():
    engine = Engine()
    first = engine.add(PROMPT, max_tokens=3 * BLOCK)
    finish(engine, first)
    before = engine.computed
    longer = [*PROMPT, *first.output[: 2 * BLOCK], 9]
    finish(engine, engine.add(longer, max_tokens=1))
    assert engine.computed - before == len(longer) - len(longer) // BLOCK * BLOCK


def test_a_running_sequence_gives_to_those_that_come_later():
    engine = Engine(max_len=200)
    first = engine.add(PROMPT, max_tokens=50)
    engine.step()
    second = engine.add(PROMPT, max_tokens=50)
    engine.step()
    assert engine.prefixes.tokens_reused == 3 * BLOCK and not first.finish_reason
    assert not set(first.block_table) & set(second.block_table)
    engine.run()
    assert first.output == second.output == expected_output(first, max_len=200)


def test_a_preempted_sequence_finds_what_nobody_has_overwritten():
    engine = Engine(blocks=6)
    old, new = engine.add(PROMPT, max_tokens=6), engine.add([30, *PROMPT[1:6]], max_tokens=9)
    finish(engine, old, new)
    assert engine.scheduler.num_preemptions == 1 and engine.prefixes.tokens_reused == BLOCK


def test_a_sequence_that_is_not_shareable_gives_nothing_but_what_it_gave_before():
    engine = Engine(batched=BLOCK)
    s = engine.add(PROMPT, max_tokens=9)
    engine.step()
    s.shareable = False
    engine.run()
    assert len(engine.prefixes) == 1
    finish(engine, engine.add(PROMPT, max_tokens=9))
    assert engine.prefixes.tokens_reused == BLOCK


def test_the_longest_unused_prefix_makes_room_first():
    engine = Engine(blocks=8)
    prompts = [[k] * (2 * BLOCK) for k in (1, 2, 3)]
    for prompt in prompts:
        finish(engine, engine.add(prompt, max_tokens=1))
    finish(engine, engine.add([*prompts[0], 5], max_tokens=1))  # of use again, so the second is now the oldest
    reused = engine.prefixes.tokens_reused
    finish(engine, engine.add([7] * (4 * BLOCK), max_tokens=1))
    finish(engine, engine.add([*prompts[0], 5], max_tokens=1))
    assert engine.prefixes.tokens_reused - reused == 2 * BLOCK
    finish(engine, engine.add([*prompts[1], 5], max_tokens=1))
    assert engine.prefixes.tokens_reused - reused == 2 * BLOCK


def test_it_can_be_switched_off():
    engine = Engine()
    engine.prefixes._enabled = False
    for _ in range(2):
        finish(engine, engine.add(PROMPT))
    assert engine.prefixes.tokens_reused == len(engine.prefixes) == 0


@pytest.mark.parametrize("changed", range(2 * BLOCK))
def test_a_key_depends_on_all_tokens_up_to_its_end(changed):
    tokens = list(range(2 * BLOCK))
    other = [*tokens[:changed], 99, *tokens[changed + 1 :]]
    same = [a == b for a, b in zip(prefix_keys(tokens, BLOCK), prefix_keys(other, BLOCK), strict=True)]
    assert same == [changed >= BLOCK, False]


tokens_lists = st.lists(st.integers(0, 2**31), max_size=30)


@given(tokens_lists, tokens_lists, st.integers(0, 8))
def test_keys_are_equal_as_far_as_the_tokens_are(a, b, known):
    keys, others = prefix_keys(a, BLOCK), prefix_keys(b, BLOCK)
    assert len(keys) == len(a) // BLOCK
    assert prefix_keys(a, BLOCK, keys[:known]) == keys
    for i, (x, y) in enumerate(zip(keys, others, strict=False)):
        assert (x == y) == (a[: (i + 1) * BLOCK] == b[: (i + 1) * BLOCK])


def test_a_resumed_sequence_starts_from_a_held_prefix_with_its_own_output():
    engine = Engine()
    finish(engine, engine.add(PROMPT, max_tokens=1))
    s = make(PROMPT, max_tokens=9)
    whole = expected_output(s)
    s.output = whole[:5]
    assert engine.scheduler.add(s) is None
    engine.run()
    assert s.output == whole and engine.prefixes.tokens_reused == 3 * BLOCK
