import dataclasses

import pytest

from moering.protocol import Sampling, Submit
from router.sequence import Refusal, Sequence, check

VOCAB, MAX_LEN = 100, 32


def make(prompt=(1, 2, 3), output=(), **sampling):
    return Sequence("r", 0, b"g", list(prompt), list(output), Sampling(**{"max_tokens": 8, **sampling}), 1.0)


def test_from_submit_takes_emitted_tokens_as_output_and_turns_the_deadline_into_a_time():
    submit = Submit("r", 2, [1, 2, 3], [4, 5], Sampling(max_tokens=9), 30.0)
    s = Sequence.from_submit(submit, b"gateway", now=100.0)
    assert (s.request_id, s.attempt, s.gateway, s.deadline) == ("r", 2, b"gateway", 130.0)
    assert (s.prompt, s.output, s.num_tokens, s.remaining) == ([1, 2, 3], [4, 5], 5, 5)
    s.output.append(6)
    assert submit.emitted == [4, 5]


def test_tokens_reads_across_the_end_of_the_prompt():
    s = make((1, 2, 3), (4, 5))
    everything = [1, 2, 3, 4, 5]
    for start in range(5):
        for length in range(1, 6 - start):
            assert s.tokens(start, length) == everything[start : start + length]


def test_a_good_sequence_is_not_refused():
    good = make((0, 99), (5,), temperature=0.0, stop_token_ids=[99], logit_bias={0: -100.0}, logprobs=20, min_p=1.0)
    assert check(good, VOCAB, MAX_LEN) is None


@pytest.mark.parametrize(
    ("sequence", "code", "names"),
    [
        (make(()), "bad_request", "empty"),
        (make((1, 100)), "bad_request", "0..99"),
        (make((1, -1)), "bad_request", "0..99"),
        (make((1,), (100,)), "bad_request", "0..99"),
        (make(stop_token_ids=[100]), "bad_request", "0..99"),
        (make(logit_bias={-1: 1.0}), "bad_request", "0..99"),
        (make((1,), (1, 2), max_tokens=2), "bad_request", "max_tokens"),
        (make(temperature=-0.1), "bad_request", "temperature"),
        (make(top_p=0.0), "bad_request", "top_p"),
        (make(min_p=1.1), "bad_request", "min_p"),
        (make(top_k=-1), "bad_request", "top_k"),
        (make(repetition_penalty=0.0), "bad_request", "repetition_penalty"),
        (make(logprobs=21), "bad_request", "logprobs"),
        (make(prompt_logprobs=True), "bad_request", "prompt_logprobs"),
        (make([1] * 30, [1, 2]), "context_length", "32"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(sequence, code, names):
    refusal = check(sequence, VOCAB, MAX_LEN)
    assert isinstance(refusal, Refusal)
    assert refusal.code == code and names in refusal.message
    assert set(dataclasses.asdict(refusal)) == {"code", "message"}
