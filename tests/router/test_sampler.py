import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moering.protocol import Sampling
from router.sampler import Sampler, allowed, inverse_cdf, uniform
from router.sequence import Sequence

VARIANTS = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {},
    {"temperature": 0.7, "top_k": 20},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"temperature": 1.3, "top_k": 50, "top_p": 0.8, "min_p": 0.01, "presence_penalty": 0.5},
    {"logit_bias": {3: 5.0}, "min_tokens": 9, "stop_token_ids": [1, 2]},
]


def make(prompt=(1, 2, 3), output=(), **sampling):
    return Sequence("r", 0, b"g", list(prompt), list(output), Sampling(**{"max_tokens": 99, **sampling}), 0.0)


def logits_of(rows, vocab, seed=0, scale=3.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, (rows, vocab)).astype(np.float32))


def one(row, sequence):
    (sampled,) = Sampler()(torch.as_tensor(row, dtype=torch.float32).reshape(1, -1), [sequence])
    return sampled


# --- a row depends on nothing but itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [49152, 1013])  # the odd size misaligns all rows but the first
def test_a_row_gives_the_same_alone_and_anywhere_in_a_batch(vocab):
    sequences = [
        make(output=range(i), seed=i, logprobs=5, logits_digest=True, **variant) for i, variant in enumerate(VARIANTS)
    ]
    logits = logits_of(len(sequences), vocab)
    together = Sampler()(logits, sequences)
    backwards = Sampler()(logits.flip(0).contiguous(), sequences[::-1])[::-1]
    alone = [one(row.clone(), sequence) for row, sequence in zip(logits, sequences, strict=True)]
    assert together == alone == backwards
    assert len({s.logits_digest for s in together}) == len(sequences)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_request_draws_what_it_would_have_drawn(variant):
    logits = logits_of(12, 200)
    whole = make(seed=5, **variant)
    for row in logits:
        whole.output.append(one(row, whole).token_id)
    for resumed_at in (1, 7, 11):
        resumed = make(output=whole.output[:resumed_at], seed=5, **variant)
        for row in logits[resumed_at:]:
            resumed.output.append(one(row, resumed).token_id)
        assert resumed.output == whole.output


# --- the draw ---------------------------------------------------------------------------------------------------------


def test_uniform_is_pinned():
    """A change of these numbers would change the tokens of requests that move between versions."""
    keys = [(0, 0, 0), (7, 0, 0), (7, 1, 0), (7, 0, 1), (-1, 0, 0)]
    assert [uniform(*key) for key in keys] == [
        0.011546754286331562,
        0.8720734548204873,
        0.8824668302545412,
        0.0828426870273763,
        0.23494158814525556,
    ]


def test_uniform_covers_the_interval():
    draws = np.array([uniform(1, 0, position) for position in range(4000)])
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.05


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(temperature):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -math.inf, 1.5, -0.5])
    n = 4000
    sequences = [make(output=[0] * position, temperature=temperature, seed=11) for position in range(n)]
    tokens = [s.token_id for s in Sampler()(logits.expand(n, -1).contiguous(), sequences)]
    counts = np.bincount(tokens, minlength=8)
    expected = n * torch.softmax(logits.double() / temperature, 0).numpy()
    assert counts[5] == expected[5] == 0
    possible = expected > 0
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 22.5  # 6 degrees, p = 0.001


def test_the_draw_never_takes_what_has_no_weight():
    weights = np.array([0.0, 0.25, 0.0, 0.75, 0.0])
    assert [inverse_cdf(weights, u) for u in (0.0, 0.2, 0.25, 0.9, 1.0)] == [1, 1, 3, 3, 3]


def test_seed_choice_and_position_each_change_the_draw():
    row = torch.zeros(10_000)
    variants = [make(seed=1), make(seed=2), make(seed=1, choice=1), make(seed=1, output=[5])]
    assert len({one(row, s).token_id for s in variants}) == 4


# --- filters against brute force --------------------------------------------------------------------------------------

few_levels = st.lists(st.sampled_from([0.0, -0.5, -1.0, -3.0, -40.0, -math.inf]), min_size=1, max_size=40)
any_floats = st.lists(st.floats(-60, 0), min_size=1, max_size=200)


def as_weights(exponents):
    weights = np.exp(np.array(exponents))
    return weights / weights.max() if weights.max() > 0 else np.ones_like(weights)


def ranked(weights):
    return sorted(range(len(weights)), key=lambda i: (-weights[i], i))


@settings(max_examples=300, deadline=None)
@given(few_levels | any_floats, st.integers(0, 45), st.floats(0, 1))
def test_top_k_and_min_p_keep_what_brute_force_keeps(exponents, top_k, min_p):
    weights = as_weights(exponents)
    kept = allowed(weights, Sampling(max_tokens=1, top_k=top_k, min_p=min_p))
    expected = [i for i in ranked(weights) if min_p == 0 or weights[i] >= min_p]
    expected = sorted(expected[:top_k] if top_k else expected)
    assert (list(range(len(weights))) if kept is None else kept.tolist()) == expected


@settings(max_examples=500, deadline=None)
@given(few_levels | any_floats, st.integers(0, 45), st.sampled_from([0.0, 0.01, 0.3]), st.floats(1e-6, 0.999999))
def test_top_p_keeps_the_fewest_largest_that_hold_the_mass(exponents, top_k, min_p, top_p):
    weights = as_weights(exponents)
    before = allowed(weights, Sampling(max_tokens=1, top_k=top_k, min_p=min_p))
    kept = allowed(weights, Sampling(max_tokens=1, top_k=top_k, min_p=min_p, top_p=top_p)).tolist()
    order = [i for i in ranked(weights) if before is None or i in before]
    assert kept == sorted(order[: len(kept)]) and kept
    wanted = top_p * math.fsum(weights[order])
    assert math.fsum(weights[order[: len(kept)]]) >= wanted * (1 - 1e-12)
    assert math.fsum(weights[order[: len(kept) - 1]]) < wanted * (1 + 1e-12)


def test_filters_limit_what_is_drawn():
    row = logits_of(1, 300, scale=1.0)[0]
    for limits, most in (({"top_k": 3}, 3), ({"top_p": 1e-6}, 1), ({"min_p": 1.0}, 1)):
        drawn = {one(row, make(output=[0] * position, **limits)).token_id for position in range(150)}
        assert drawn <= set(row.topk(most).indices.tolist())
        assert len(drawn) == most


# --- greedy, mask, bias, penalties ------------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_id_of_equal_ones():
    assert one([0.0, 2.0, 1.0, 2.0, 2.0], make(temperature=0.0)).token_id == 1


def test_stop_ids_are_masked_until_min_tokens():
    row, limits = [0.0, 9.0, 8.0, 1.0], {"stop_token_ids": [1, 2], "min_tokens": 2}
    greedy = [one(row, make(output=[0] * n, temperature=0.0, **limits)).token_id for n in range(4)]
    assert greedy == [3, 3, 1, 1]
    assert one(row, make(output=[0] * 2, temperature=0.0, logit_bias={0: 1.0}, **limits)).token_id == 1
    drawn = {one(row, make(output=[0], seed=seed, **limits)).token_id for seed in range(100)}
    assert drawn == {0, 3}


def test_logit_bias_is_added():
    row = [1.0, 0.0, 0.0]
    assert one(row, make(prompt=[0], temperature=0.0, logit_bias={2: 1.5})).token_id == 2
    assert one(row, make(prompt=[0], temperature=0.0, logit_bias={0: -100.0, 1: 0.25})).token_id == 1
    assert one(row, make(prompt=[0], temperature=0.0, logit_bias={0: 0.5, 1: 1.25})).token_id == 0


def penalized(row, prompt, output, repetition, frequency, presence):
    """What vLLM's documentation says, token by token."""
    result = []
    for token, raw in enumerate(row):
        logit = raw
        if token in prompt or token in output:
            logit = logit / repetition if logit > 0 else logit * repetition
        logit -= frequency * output.count(token)
        logit -= presence * (token in output)
        result.append(logit)
    return result


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=6, max_size=6),
    st.lists(st.integers(0, 5), min_size=1, max_size=6),
    st.lists(st.integers(0, 5), max_size=8),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([-1.0, 0.0, 0.5]),
    st.sampled_from([-0.75, 0.0, 0.25]),
)
def test_penalties_match_the_reference(row, prompt, output, repetition, frequency, presence):
    expected = penalized(row, prompt, output, repetition, frequency, presence)
    penalties = {"repetition_penalty": repetition, "frequency_penalty": frequency, "presence_penalty": presence}
    assert one(row, make(prompt, output, temperature=0.0, **penalties)).token_id == int(np.argmax(expected))
    already_penalized = one(expected, make(prompt, output, seed=3))
    assert one(row, make(prompt, output, seed=3, **penalties)).token_id == already_penalized.token_id


# --- what is reported -------------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_raw_logits_best_first():
    row = logits_of(1, 500)[0]
    expected = torch.log_softmax(row.double(), 0)
    sampled = one(row, make(temperature=0.3, logprobs=4, logit_bias={7: 90.0}, repetition_penalty=1.5))
    assert sampled.token_id == 7
    assert sampled.logprob == pytest.approx(float(expected[7]), rel=1e-12)
    top = expected.topk(4)
    assert sampled.top_ids == top.indices.tolist()
    assert sampled.top_logprobs == pytest.approx(top.values.tolist(), rel=1e-12)


def test_equal_top_logprobs_are_listed_by_id():
    assert one([1.0, 3.0, 1.0, 3.0, 1.0], make(temperature=0.0, logprobs=3)).top_ids == [1, 3, 0]


def test_nothing_is_reported_unasked_and_zero_means_the_token_alone():
    row = logits_of(1, 50)[0]
    quiet, token_alone = one(row, make()), one(row, make(logprobs=0))
    assert (quiet.logprob, quiet.top_ids, quiet.logits_digest) == (None, [], None)
    assert token_alone.logprob is not None and token_alone.top_ids == []


def test_the_digest_is_of_the_raw_bytes_whatever_the_sampling():
    row = logits_of(1, 50)[0]
    expected = hashlib.blake2b(row.numpy().tobytes(), digest_size=8).hexdigest()
    assert one(row, make(logits_digest=True, temperature=0.2, logit_bias={1: 3.0})).logits_digest == expected
    row[49] = torch.nextafter(row[49], torch.tensor(math.inf))
    assert one(row, make(logits_digest=True)).logits_digest != expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_without_a_finite_maximum_fails_and_its_neighbours_do_not(variant):
    logits = logits_of(3, 20)
    logits[1, 13] = math.nan
    before, broken, after = Sampler()(logits, [make(**variant) for _ in range(3)])
    assert broken is None
    assert before == one(logits[0], make(**variant)) and after == one(logits[2], make(**variant))


def test_everything_masked_fails():
    assert one([1.0, 2.0], make(stop_token_ids=[0, 1], min_tokens=1)) is None
