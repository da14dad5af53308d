import random

import pytest

from router.step_cost import MAX_MIXED_RUN, MIN_PREFILL_TOKENS, StepCost

LIMIT = 256


def trained(decode=0.06, rows=8, least=None):
    """A cost that knows what decodes take, and what the least prefill does beside them."""
    cost = StepCost()
    for _ in range(5):
        cost.record(rows, 0, decode)
    assert cost.prefill_tokens(rows, LIMIT) == MIN_PREFILL_TOKENS
    cost.record(rows, MIN_PREFILL_TOKENS, decode if least is None else least)
    return cost


def test_without_decodes_the_limit_is_the_budget():
    assert StepCost().prefill_tokens(0, LIMIT) == LIMIT
    assert trained().prefill_tokens(0, LIMIT) == LIMIT


def test_the_first_two_steps_beside_decodes_measure():
    cost = StepCost()
    cost.record(0, 256, 256 * 0.0035)
    assert cost.prefill_tokens(3, LIMIT) == 0
    cost.record(3, 0, 0.06)
    assert cost.prefill_tokens(3, LIMIT) == MIN_PREFILL_TOKENS
    cost.record(3, MIN_PREFILL_TOKENS, 0.07)
    assert cost.prefill_tokens(3, LIMIT) == MIN_PREFILL_TOKENS + int((1.7 * 0.06 - 0.07) / 0.0035)


def test_where_any_prefill_reaches_the_bound_a_step_that_costs_a_quarter_more_is_worth_it():
    cost = trained(0.086, rows=2, least=0.150)
    cost.record(0, 256, 256 * 0.0035)
    assert cost.prefill_tokens(2, LIMIT) == MIN_PREFILL_TOKENS + int(0.25 * 0.150 / 0.0035)


def test_the_first_mixed_step_uses_what_prefill_alone_cost():
    cost = trained()
    cost.record(0, 256, 256 * 0.0035)
    assert cost.prefill_tokens(8, LIMIT) == MIN_PREFILL_TOKENS + int(0.7 * 0.06 / 0.0035)


def test_a_short_prompt_alone_says_nothing_about_tokens():
    cost = trained()
    cost.record(0, 1, 0.05)
    assert cost.prefill_tokens(8, LIMIT) == trained().prefill_tokens(8, LIMIT)


@pytest.mark.parametrize("token_seconds", [0.0003, 0.001, 0.0035])
def test_mixed_steps_converge_to_the_target(token_seconds):
    cost = trained()
    for _ in range(150):
        tokens = cost.prefill_tokens(8, 10_000)
        seconds = 0.06 + (0.004 + tokens * token_seconds if tokens else 0.0)  # 4 ms that only mixed steps have
        cost.record(8, tokens, seconds)
        if tokens:
            last = seconds
    assert 1.3 * 0.06 <= last <= 1.75 * 0.06


@pytest.mark.parametrize("spread", [0.1, 0.2, 0.35])
def test_noise_and_what_every_mixed_step_costs_do_not_starve_prefill(spread):
    """15 ms for any prefill and 1.6 ms a token leave room for 25 beside decodes of 80 ms."""
    cost, rng, given, slow = StepCost(), random.Random(1), [], 0
    for _ in range(20):
        cost.record(8, 0, 0.08 * rng.lognormvariate(0, spread))
    limit = 1.7 * cost.decode_seconds(8)
    for _ in range(2000):
        tokens = cost.prefill_tokens(8, LIMIT)
        seconds = (0.08 + (0.015 + tokens * 0.0016 if tokens else 0.0)) * rng.lognormvariate(0, spread)
        cost.record(8, tokens, seconds)
        given.append(tokens)
        slow += seconds > 1.2 * limit
    assert sum(given[500:]) / 1500 > 12
    assert slow < 0.1 * len(given)


def test_a_prompt_that_costs_more_as_it_grows_stays_near_the_target():
    cost, done = trained(), 0
    cost.record(0, 256, 256 * 0.0035)
    while done < 2000:
        tokens = cost.prefill_tokens(8, LIMIT)
        seconds = 0.06 + tokens * 0.0035 * (1 + done / 2000)
        cost.record(8, tokens, seconds)
        assert seconds <= 1.95 * 0.06
        done += max(tokens, 1)


def test_a_pause_costs_a_third_of_the_pace_at_most():
    cost = trained()
    for _ in range(10):
        cost.record(8, cost.prefill_tokens(8, LIMIT), 0.07)
    before = cost.prefill_tokens(8, LIMIT)
    cost.record(8, before, 30.0)  # rows waited for an expert
    assert before * 2 // 3 <= cost.prefill_tokens(8, LIMIT) < before


def test_pauses_while_it_measures_open_no_gate():
    cost = StepCost()
    cost.record(0, 256, 256 * 0.0035)
    for _ in range(4):
        cost.record(8, 0, 0.06)
    cost.record(8, 0, 30.0)
    assert cost.prefill_tokens(8, LIMIT) == MIN_PREFILL_TOKENS
    cost.record(8, MIN_PREFILL_TOKENS, 30.0)
    assert cost.prefill_tokens(8, LIMIT) == MIN_PREFILL_TOKENS + int(0.25 * 2 * 0.06 / 0.0035)


def test_the_end_of_a_prompt_teaches_nothing():
    cost = trained()
    cost.record(0, 256, 256 * 0.0035)
    before = cost.prefill_tokens(8, LIMIT)
    cost.record(8, 1, 0.05)
    cost.record(8, 2, 0.5)
    assert cost.prefill_tokens(8, LIMIT) == before


def test_steps_in_which_interrupted_streams_catch_up_teach_nothing():
    for measured in (True, False):
        cost = trained()
        cost.record(0, 256, 256 * 0.0035)
        if measured:
            assert cost.prefill_tokens(8, LIMIT) == MIN_PREFILL_TOKENS + int(0.7 * 0.06 / 0.0035)
        cost.record(8, LIMIT, 1.0)
        assert cost.prefill_tokens(8, LIMIT) == MIN_PREFILL_TOKENS + int(0.7 * 0.06 / 0.0035)


def test_what_the_limit_allows_can_be_given_up_at_once():
    cost = trained()
    for _ in range(200):
        cost.record(8, cost.prefill_tokens(8, 16), 0.07)
    assert cost.prefill_tokens(8, 16) == 16
    for _ in range(4):
        cost.record(8, cost.prefill_tokens(8, 16), 0.2)
    assert cost.prefill_tokens(8, 16) < 10


def test_decode_seconds_between_and_outside_the_measured_row_counts():
    cost = trained(0.06, rows=8)
    assert cost.decode_seconds(4) == pytest.approx(0.03)
    assert cost.decode_seconds(32) == pytest.approx(0.06)
    cost.record(4, 0, 0.05)
    assert cost.decode_seconds(6) == pytest.approx(0.055)


def test_after_many_mixed_steps_two_measure_again():
    cost = trained()
    for _ in range(MAX_MIXED_RUN - 1):
        assert cost.prefill_tokens(8, LIMIT) > MIN_PREFILL_TOKENS
        cost.record(8, 5, 0.08)
    assert cost.prefill_tokens(8, LIMIT) == 0
    cost.record(8, 0, 0.09)
    assert cost.prefill_tokens(8, LIMIT) == MIN_PREFILL_TOKENS
    cost.record(8, MIN_PREFILL_TOKENS, 0.09)
    assert cost.prefill_tokens(8, LIMIT) > MIN_PREFILL_TOKENS


def test_the_limit_holds():
    assert trained().prefill_tokens(8, 2) == 2
