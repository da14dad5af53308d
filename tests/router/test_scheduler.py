import pytest

from router.scheduler import PREFILL_LANES
from router.sequence import Sequence, Status
from router.step_cost import MAX_MIXED_RUN, MIN_PREFILL_TOKENS, StepCost
from tests.router.fake_engine import Engine, expected_output, make, shape

# --- order and budget -------------------------------------------------------------------------------------------------


def test_a_prompt_is_prefilled_in_chunks_then_decodes_and_finishes():
    engine = Engine(batched=8)
    s = engine.add(prompt=19, max_tokens=3)
    steps = []
    while (batch := engine.start()) is not None:
        steps.append(shape(batch))
        engine.end()
    assert steps == [
        [(0, 8, False)],
        [(8, 8, False)],
        [(16, 3, True)],
        [(19, 1, True)],
        [(20, 1, True)],
    ]
    assert (s.output, s.finish_reason, s.status) == (expected_output(s), "length", Status.FINISHED)
    assert engine.blocks.free_blocks == 100


@pytest.mark.parametrize(("streams", "expected"), [(6, [6]), (20, [10, 10]), (21, [11, 10])])
def test_micro_batches_share_the_decodes_equally(streams, expected):
    engine = Engine(seqs=32, batched=100, micro_batches=2)
    for _ in range(streams):
        engine.add(prompt=2, max_tokens=4)
    engine.start()
    engine.end()  # all prompts at once
    for _ in range(2):  # and so it stays
        batches = [engine.start() for _ in expected]
        assert engine.start() is None
        assert [len(b.items) for b in batches] == expected
        for _ in expected:
            engine.end()


def test_several_prompts_share_a_step_and_decodes_come_first():
    engine = Engine(batched=16)
    first, second = engine.add(prompt=5), engine.add(prompt=6)
    assert shape(engine.step()[0]) == [(0, 5, True), (0, 6, True)]
    third = engine.add(prompt=30)
    batch, _ = engine.step()
    assert [item.sequence for item in batch.items] == [first, second, third]
    assert (batch.decode_rows, batch.prefill_tokens) == (2, MIN_PREFILL_TOKENS)


def test_a_long_prompt_lets_short_ones_through_and_still_gets_at_least_half():
    engine = Engine(batched=16, max_len=400, blocks=200)
    engine.add(prompt=300, max_tokens=1)
    engine.step()
    shorts = [engine.add(prompt=8, max_tokens=1) for _ in range(5)]
    finished = []
    for _ in shorts:
        batch, done = engine.step()
        assert max(item.length for item in batch.items) >= 8
        finished += done
    assert finished == shorts


def test_two_long_prompts_halve_the_budget_and_a_third_waits():
    engine = Engine(batched=16, max_len=400, blocks=400)
    for _ in range(3):
        engine.add(prompt=300)
    batch, _ = engine.step()
    assert [item.length for item in batch.items] == [8, 8]
    assert len(engine.scheduler.running) == PREFILL_LANES and len(engine.scheduler.waiting) == 1


def test_the_budget_is_used_up_when_prompts_abound():
    engine = Engine(batched=16, seqs=50)
    for length in (7, 3, 9, 14, 2, 2, 30, 1):
        engine.add(prompt=length, max_tokens=1)
    totals = []
    while (batch := engine.start()) is not None:
        totals.append(sum(item.length for item in batch.items))
        engine.end()
    assert totals == [16, 16, 16, 16, 4]


def test_max_num_seqs_holds():
    engine = Engine(seqs=2)
    for _ in range(5):
        engine.add()
    assert len(engine.step()[0].items) == 2
    engine.run()


def test_a_sequence_that_is_admitted_is_in_a_queue_all_the_while(monkeypatch):
    """A router that drains goes when it finds both empty, on a thread of its own."""
    engine, seen = Engine(), []
    fetch, sequence = engine.prefixes.fetch, engine.add(prompt=5)

    def look(admitted):
        seen.append(admitted in engine.scheduler.waiting + engine.scheduler.running)
        fetch(admitted)

    monkeypatch.setattr(engine.prefixes, "fetch", look)
    engine.step()
    assert seen == [True] and engine.scheduler.running == [sequence] and not engine.scheduler.waiting


def test_streams_that_began_on_another_router_go_before_prompts_and_in_full_steps():
    engine = Engine(blocks=400, seqs=8, batched=64, max_len=200)
    streams = [engine.add(prompt=2, max_tokens=50) for _ in range(2)]
    engine.step()
    prompts = [engine.add(prompt=60, max_tokens=1) for _ in range(3)]
    paces = [engine.step()[0].prefill_tokens for _ in range(3)]
    assert set(paces) == {MIN_PREFILL_TOKENS}
    resumed = [engine.add(prompt=10, output=[1] * 20, max_tokens=40) for _ in range(2)]
    done = [p.num_computed for p in prompts]
    batch, _ = engine.step()
    assert {item.sequence for item in batch.items} == {*streams, *resumed}
    assert batch.prefill_tokens == 60 and not any(s.interrupted for s in resumed)
    assert [p.num_computed for p in prompts] == done
    engine.run()
    assert all(s.output == expected_output(s, [1] * 20, max_len=200) for s in resumed)


def test_interrupted_streams_catch_up_one_after_the_other_the_shortest_first():
    """If they shared the steps, all would be as late as the last."""
    engine = Engine(blocks=400, batched=64, max_len=200)
    long, short, middle = (engine.add(prompt=10, output=[1] * n, max_tokens=90) for n in (60, 20, 40))
    took = []
    while engine.scheduler.catching_up:
        batch, _ = engine.step()
        took.append([(i.sequence, i.length) for i in batch.items if i.length > 1])
    assert took == [[(short, 30), (long, 34)], [(long, 36), (middle, 27)], [(middle, 23)]]


def test_a_router_catches_up_while_a_stream_of_another_one_waits_or_runs():
    engine, seen = Engine(blocks=6, seqs=1), []

    def look():
        seen.append(engine.scheduler.catching_up)

    first = engine.add(prompt=7, max_tokens=3)
    engine.step()
    engine.scheduler._preempt(first)
    assert first.interrupted
    look()  # its own are no reason to hold up who starts
    resumed = engine.add(prompt=3, output=[1] * 4, max_tokens=9)
    look()
    engine.start()
    look()
    engine.end()
    look()
    assert resumed.decodes and seen == [False, True, True, False]


@pytest.mark.parametrize("trained", [False, True])
def test_a_2000_token_prompt_among_8_streams_keeps_steps_within_the_bound_and_progresses(trained):
    cost = StepCost()
    engine = Engine(blocks=2000, seqs=16, batched=256, max_len=4000, cost=cost)
    for _ in range(8):
        engine.add(prompt=20, max_tokens=1500)

    def step(measured=True):
        batch, done = engine.step()
        seconds = (0.03 + 0.00375 * batch.decode_rows if batch.decode_rows else 0) + 0.0035 * batch.prefill_tokens
        if measured:
            cost.record(batch.decode_rows, batch.prefill_tokens, seconds)
        return batch, seconds, done

    while any(not s.decodes for s in engine.scheduler.running + engine.scheduler.waiting):
        step(measured=trained)
    for _ in range(20):
        step(measured=trained)
    long = engine.add(prompt=2000, max_tokens=1)
    steps, stalled = 0, 0
    while long.finish_reason is None:
        batch, seconds, _ = step()
        assert batch.decode_rows == 8 and seconds <= 1.75 * 0.06
        steps += 1
        stalled += batch.prefill_tokens == 0
    assert steps <= 2000 / 8
    assert stalled <= 1 + steps / MAX_MIXED_RUN


# --- in flight --------------------------------------------------------------------------------------------------------


def test_what_is_in_flight_is_not_scheduled_again():
    engine = Engine()
    a = engine.add()
    assert [i.sequence for i in engine.start().items] == [a]
    assert engine.start() is None
    b = engine.add()
    assert [i.sequence for i in engine.start().items] == [b]
    engine.end(1)
    engine.end(0)
    engine.run()
    assert (a.output, b.output) == (expected_output(a), expected_output(b))


def test_streams_in_flight_count_for_the_budget_of_what_runs_meanwhile():
    engine = Engine(batched=64)
    engine.add(max_tokens=20)
    engine.step()
    engine.start()
    engine.add(prompt=50)
    assert shape(engine.start()) == [(0, MIN_PREFILL_TOKENS, False)]


def test_prefill_goes_on_while_all_streams_are_in_flight_even_when_a_decode_only_step_is_due():
    cost = StepCost()
    engine = Engine(batched=64, cost=cost)
    engine.add(max_tokens=20)
    engine.step()
    for _ in range(60):
        cost.record(1, 4, 0.1)
    engine.start()
    engine.add(prompt=50)
    assert shape(engine.start()) == [(0, MIN_PREFILL_TOKENS, False)]


# --- preemption -------------------------------------------------------------------------------------------------------


def test_the_newest_is_preempted_and_computes_the_same_tokens_again():
    engine = Engine(blocks=6)
    old, new = engine.add(prompt=7, max_tokens=12), engine.add(prompt=7, max_tokens=12)
    engine.run()
    assert engine.scheduler.num_preemptions >= 1
    assert (old.output, new.output) == (expected_output(old), expected_output(new))
    assert engine.blocks.free_blocks == 6


def test_a_preempted_sequence_is_first_in_the_queue():
    engine = Engine(blocks=6, batched=32)
    old, middle, new = (engine.add(prompt=7, max_tokens=9) for _ in range(3))
    later = engine.add(prompt=3)
    while engine.scheduler.num_preemptions == 0:
        engine.step()
    assert engine.scheduler.running == [old, middle]
    assert engine.scheduler.waiting == [new, later]
    assert (new.num_computed, new.block_table) == (0, [])


def test_what_is_in_flight_is_not_preempted_and_the_older_one_waits():
    engine = Engine(blocks=4)
    old, new = engine.add(prompt=7, max_tokens=9), engine.add(prompt=6, max_tokens=9)
    engine.step()
    engine.step()  # now `old` has 9 tokens and needs a third block; `new` has 8, and with them all that is left
    old.in_flight = True
    assert [i.sequence for i in engine.start().items] == [new]
    old.in_flight = False
    assert engine.start() is None
    engine.end()
    assert engine.scheduler.num_preemptions == 0
    assert [i.sequence for i in engine.start().items] == [old]
    assert engine.scheduler.num_preemptions == 1
    engine.end()
    engine.run()
    assert (old.output, new.output) == (expected_output(old), expected_output(new))


def test_a_sequence_that_fills_the_whole_cache_ends_with_length():
    engine = Engine(blocks=3, max_len=1000)
    s = engine.add(prompt=5, max_tokens=100)
    engine.run()
    assert (s.finish_reason, s.num_tokens) == ("length", 12)


def test_a_prompt_larger_than_the_cache_is_refused():
    engine = Engine(blocks=3, max_len=1000)
    refusal = engine.scheduler.add(make(prompt=12))
    assert refusal.code == "context_length" and "12" in refusal.message
    assert engine.start() is None


# --- ends -------------------------------------------------------------------------------------------------------------


def test_a_stop_token_ends_it_but_not_before_min_tokens():
    plain = make(prompt=[1, 2, 3], max_tokens=20)
    stop = expected_output(plain)[4]
    assert stop not in expected_output(plain)[:4]
    for min_tokens, most in ((0, 5), (5, 20)):
        engine = Engine()
        s = engine.add(prompt=plain.prompt, max_tokens=20, stop_token_ids=[stop], min_tokens=min_tokens)
        engine.run()
        assert s.output == expected_output(s) and s.output[4] == stop
        assert (len(s.output) == 5) == (min_tokens == 0) and len(s.output) <= most
        assert s.finish_reason == ("stop" if len(s.output) < 20 else "length")


def test_max_model_len_ends_it():
    engine = Engine(max_len=10)
    s = engine.add(prompt=6, max_tokens=50)
    engine.run()
    assert (len(s.output), s.finish_reason) == (4, "length")


def test_a_resumed_sequence_goes_on_where_it_was():
    engine = Engine()
    whole = engine.add(max_tokens=10)
    engine.run()
    resumed = engine.add(prompt=whole.prompt, output=whole.output[:6], max_tokens=10)
    engine.run()
    assert resumed.output == whole.output
    assert (len(resumed.prompt), resumed.finish_reason) == (3, "length")


def test_the_same_attempt_twice_is_refused_and_a_new_attempt_is_not():
    engine = Engine()
    s = engine.add()
    assert engine.scheduler.add(Sequence(s.request_id, 0, b"", [1], [], s.sampling, 1.0)).code == "bad_request"
    assert engine.scheduler.add(Sequence(s.request_id, 1, b"", [1], [], s.sampling, 1.0)) is None


def test_abort_while_waiting_and_while_running_frees_at_once():
    engine = Engine(seqs=1)
    running, waiting = engine.add(), engine.add()
    engine.step()
    for s in (waiting, running):
        assert engine.scheduler.abort(s.request_id, 0) is s
        engine.scheduler.check_integrity()
        assert (s.status, s.finish_reason, s.block_table) == (Status.FINISHED, None, [])
    assert engine.blocks.free_blocks == 100
    assert engine.scheduler.abort(running.request_id, 0) is None


def test_abort_in_flight_leaves_a_tombstone_until_its_step_ends():
    engine = Engine()
    s, other = engine.add(), engine.add()
    batch = engine.start()
    assert engine.scheduler.abort(s.request_id, 0) is s
    engine.scheduler.check_integrity()
    assert engine.blocks.free_blocks == 98 and s.block_table
    assert engine.scheduler.abort(s.request_id, 0) is None
    assert [i.sequence for i in engine.scheduler.complete(batch.items)] == [other]
    engine.scheduler.check_integrity()
    assert engine.blocks.free_blocks == 99 and s.output == []


def test_expired_lists_waiting_and_running_once_until_cancelled():
    engine = Engine(seqs=1)
    running, waiting = engine.add(deadline=10.0), engine.add(deadline=20.0)
    engine.step()
    assert engine.scheduler.expired(9.9) == []
    assert engine.scheduler.expired(10.0) == [running]
    assert engine.scheduler.expired(20.0) == [running, waiting]
    engine.scheduler.cancel(running)
    assert engine.scheduler.expired(20.0) == [waiting]


def test_check_integrity_sees_a_lost_block():
    engine = Engine()
    s = engine.add()
    engine.step()
    s.block_table = []
    with pytest.raises(AssertionError, match="lost"):
        engine.scheduler.check_integrity()
