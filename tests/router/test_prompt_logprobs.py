"""Log-probabilities of prompts, by the engine, beside those of a plain forward pass."""

import pytest
import torch

from router import prompt_logprobs
from tests import tiny
from tests.router.decoding import Model, random_tokens

TOP = 3
SHORT, LONG = random_tokens(9, seed=1), random_tokens(1100, seed=2)  # the long one has two blocks of the KV cache


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"), layers=2)


@pytest.fixture(scope="module")
def expected(checkpoint):
    """float64 [prompt, vocabulary]: row i says how likely each token is after i + 1 of them."""
    model = Model.open(checkpoint)
    return lambda prompt: torch.log_softmax(model.prefill(prompt, [0, 1, 2]).double(), 1)


def check(client, name, prompt, rows):
    """The messages about a prompt say, together and in order, what `rows` say."""
    parts = client.prompt_logprobs[name]
    assert [p.start for p in parts] == [1 + sum(len(q.logprobs) for q in parts[:n]) for n in range(len(parts))]
    own = [value for part in parts for value in part.logprobs]
    assert own == pytest.approx(rows[:-1].gather(1, torch.tensor(prompt[1:])[:, None]).flatten().tolist(), abs=1e-9)
    best = rows[:-1].topk(TOP)
    assert [ids for part in parts for ids in part.top_ids] == best.indices.tolist()
    values = [value for part in parts for top in part.top_logprobs for value in top]
    assert values == pytest.approx(best.values.flatten().tolist(), abs=1e-9)


@pytest.mark.parametrize("cluster", [{}, {"max_num_batched_tokens": 5}, {"micro_batches": 2}], indirect=True)
def test_they_are_those_of_the_whole_prompt_whatever_the_steps_are(client, expected):
    for n in range(4):
        client.submit(f"plain {n}", SHORT[n:])
        client.submit(f"scored {n}", SHORT[n:], logprobs=TOP, prompt_logprobs=True, max_tokens=1)
    client.until_ended(8)
    for n in range(4):
        check(client, f"scored {n}", SHORT[n:], expected(SHORT[n:]))
    assert len(client.prompt_logprobs) == 4


def test_a_prompt_whose_blocks_are_held_already_is_scored_from_its_first_token(client, cluster, expected):
    rows, prefixes = expected(LONG), cluster.engine._scheduler.prefixes
    for n in range(2):
        client.submit(f"q{n}", LONG, logprobs=TOP, prompt_logprobs=True, max_tokens=1)
        client.until_ended(n + 1)
        check(client, f"q{n}", LONG, rows)
    assert prefixes.tokens_reused == 0
    client.submit("plain", LONG, max_tokens=1)
    client.until_ended(3)
    assert prefixes.tokens_reused == 1024, "a prompt that is not scored uses what those have left"
    parts = client.prompt_logprobs["q0"]
    assert max(len(p.logprobs) for p in parts) == prompt_logprobs.ROWS == 64, "a row of logits is long: few at a time"


def test_a_stream_that_goes_on_has_sent_them_already(client):
    client.tokens["resumed"] = [(5, None), (6, None)]
    client.submit("resumed", SHORT, [5, 6], logprobs=TOP, prompt_logprobs=True, max_tokens=4)
    client.until_ended(1)
    assert len(client.tokens["resumed"]) == 4 and not client.prompt_logprobs


def test_a_prompt_whose_logits_are_not_finite_ends_with_one_error(client, cluster, monkeypatch):
    monkeypatch.setattr(prompt_logprobs, "logprobs", lambda *args: None)
    client.submit("q", SHORT, logprobs=0, prompt_logprobs=True, max_tokens=1)
    client.until_ended(1)
    client.submit("plain", SHORT, max_tokens=2)
    client.until_ended(2)
    assert client.failures == {"q": "internal"} and set(client.tokens) == {"plain"}
    cluster.engine._scheduler.check_integrity()


def test_a_prompt_of_one_token_has_none(client):
    client.submit("q", SHORT[:1], logprobs=TOP, prompt_logprobs=True, max_tokens=1)
    client.until_ended(1)
    assert not client.failures and not client.prompt_logprobs
