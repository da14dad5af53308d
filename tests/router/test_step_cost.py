import pytest

from router.step_cost import MAX_MIXED_RUN, MIN_PREFILL_TOKENS, StepCost

LIMIT = 256


def trained(decode=0.06, rows=8):
    cost = StepCost()
    for _ in range(5):
        cost.record(rows, 0, decode)
    return cost


def test_without_decodes_the_limit_is_the_budget():
    assert StepCost().prefill_tokens(0, LIMIT) == LIMIT
    assert trained().prefill_tokens(0, LIMIT) == LIMIT


def test_before_any_data_the_budget_is_small_but_not_nothing():
    assert [StepCost().prefill_tokens(rows, LIMIT) for rows in (1, 8, 64, 1000)] == [MIN_PREFILL_TOKENS, 5, 44, LIMIT]


def test_the_first_mixed_step_uses_what_prefill_alone_cost():
    cost = trained()
    cost.record(0, 256, 256 * 0.0035)
    assert cost.prefill_tokens(8, LIMIT) == int(0.7 * 0.06 / 0.0035)


def test_a_short_prompt_alone_says_nothing_about_tokens():
    cost = trained()
    cost.record(0, 1, 0.05)
    assert cost.prefill_tokens(8, LIMIT) == trained().prefill_tokens(8, LIMIT)


@pytest.mark.parametrize("token_seconds", [0.00002, 0.001, 0.0035])
def test_mixed_steps_converge_to_the_target(token_seconds):
    cost = trained()
    for _ in range(MAX_MIXED_RUN):
        tokens = cost.prefill_tokens(8, 10_000)
        seconds = 0.06 + 0.004 + tokens * token_seconds  # 4 ms that only mixed steps have
        cost.record(8, tokens, seconds)
    assert 1.6 * 0.06 <= seconds <= 1.75 * 0.06


def test_a_prompt_that_costs_more_as_it_grows_stays_near_the_target():
    cost, done = trained(), 0
    cost.record(0, 256, 256 * 0.0035)
    while done < 2000:
        tokens = cost.prefill_tokens(8, LIMIT)
        seconds = 0.06 + tokens * 0.0035 * (1 + done / 2000)
        cost.record(8, tokens, seconds)
        assert seconds <= 1.85 * 0.06
        done += max(tokens, 1)


def test_pauses_change_nothing():
    cost = trained()
    for _ in range(10):
        cost.record(8, 12, 0.06 + 12 * 0.0035)
    before = cost.prefill_tokens(8, LIMIT)
    cost.record(8, 12, 30.0)  # rows waited for an expert
    cost.record(8, 0, 30.0)
    cost.record(8, 12, 0.01)
    assert cost.prefill_tokens(8, LIMIT) == before


def test_a_mixed_step_that_seems_free_does_not_open_the_gate():
    cost = trained()
    cost.record(0, 256, 256 * 0.0035)
    cost.record(8, 12, 0.05)  # faster than its decodes alone
    assert cost.prefill_tokens(8, LIMIT) == 2 * 12


def test_decode_seconds_between_and_outside_the_measured_row_counts():
    cost = trained(0.06, rows=8)
    assert StepCost().decode_seconds(3) is None
    assert cost.decode_seconds(4) == pytest.approx(0.03)
    assert cost.decode_seconds(32) == pytest.approx(0.06)
    cost.record(4, 0, 0.05)
    assert cost.decode_seconds(6) == pytest.approx(0.055)


def test_after_many_mixed_steps_one_without_prefill_measures_again():
    cost = trained()
    for _ in range(MAX_MIXED_RUN):
        assert cost.prefill_tokens(8, LIMIT) >= MIN_PREFILL_TOKENS
        cost.record(8, 4, 0.08)
    assert cost.prefill_tokens(8, LIMIT) == 0
    cost.record(8, 0, 0.09)
    assert cost.prefill_tokens(8, LIMIT) >= MIN_PREFILL_TOKENS


def test_the_limit_holds():
    assert trained().prefill_tokens(8, 2) == 2
