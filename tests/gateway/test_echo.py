"""`echo`: the answer begins with the prompt, and so do its log-probabilities; evaluation harnesses live on that."""

import asyncio
import dataclasses
import threading

import pytest

from gateway import formats, sse
from gateway.journal import Scored
from gateway.logprobs import completion_logprobs
from moering.protocol import PromptLogprobs, Submit
from tests.gateway.fake_router import FakeRouter, says, token
from tests.gateway.harness import gateway, run

TEXT = "/v1/completions"
PROMPT = [40, 41, 42, 43]


def scores(submit: Submit, start: int, end: int) -> PromptLogprobs:
    """Of the prompt's tokens at [start, end): -position, and twice as little for the one alternative."""
    positions = range(start, end)
    return PromptLogprobs(
        submit.request_id, submit.attempt, start, [-float(p) for p in positions], [[50 + p] for p in positions],
        [[-p / 2] for p in positions],
    )  # fmt: skip


def scored(submit: Submit, position: int):
    return token(submit, position, 60, logprob=-9.5, top_ids=[61], top_logprobs=[-9.25])


async def answer(g, router: FakeRouter, body: dict) -> dict:
    """The response; the router, which holds its tokens, sends the prompt's log-probabilities in two parts."""
    task = asyncio.create_task(g.post(TEXT, {"prompt": PROMPT, "echo": True, "logprobs": 1, **body}))
    await g.until(lambda: router.submits)
    submit = router.submits[0]
    router.send(scores(submit, 1, 3), scores(submit, 3, 4))
    await g.until(lambda: [len(r.prompt_logprobs) for r in g.services.journal.records()] == [3])
    router.release()
    status, response, _ = await task
    assert status == 200, response
    return response


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_the_prompt_is_scored_as_harnesses_read_it(model, max_tokens):
    async def main():
        router = FakeRouter(script=scored, hold_at=0)
        async with gateway(model, router) as g:
            response = await answer(g, router, {"max_tokens": max_tokens, "temperature": 0})
            (choice,) = response["choices"]
            logprobs, generated = choice["logprobs"], [60] * max_tokens
            texts = [model.decode([i]) for i in [*PROMPT, *generated]]
            assert choice["text"] == "".join(texts) and choice["finish_reason"] == "length"
            assert logprobs["tokens"] == texts
            assert logprobs["token_logprobs"] == [None, -1.0, -2.0, -3.0, *[-9.5] * max_tokens]
            tops = [{model.decode([50 + p]): -p / 2} for p in (1, 2, 3)]
            assert logprobs["top_logprobs"] == [None, *tops, *[{model.decode([61]): -9.25}] * max_tokens]
            assert logprobs["text_offset"] == [sum(map(len, texts[:n])) for n in range(len(texts))]
            assert response["usage"]["completion_tokens"] == max_tokens
            assert router.submits[0].sampling.prompt_logprobs and router.submits[0].sampling.max_tokens == 1

    run(main())


def test_a_router_that_dies_between_the_parts_is_followed_by_one_that_begins_again(model):
    async def main():
        first, second = (FakeRouter(f"r{i}", script=scored, hold_at=0) for i in range(2))
        async with gateway(model, first) as g:
            body = {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 1}
            task = asyncio.create_task(g.post(TEXT, body))
            await g.until(lambda: first.submits)
            first.send(scores(first.submits[0], 1, 3))
            await g.until(lambda: [len(r.prompt_logprobs) for r in g.services.journal.records()] == [2])
            g.show(second)
            await g.until(lambda: second.submits)
            submit = second.submits[0]
            stale = dataclasses.replace(scores(first.submits[0], 1, 4), logprobs=[-99.0] * 3)
            second.send(scores(submit, 1, 2), scores(submit, 2, 4), stale)
            await g.until(lambda: [len(r.prompt_logprobs) for r in g.services.journal.records()] == [3])
            second.release()
            _, response, _ = await task
            assert response["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0, -2.0, -3.0, -9.5]
        second.kill()

    run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("prompt_tokens", "beside"), [(100, False), (300, True)])
def test_many_are_written_beside_the_event_loop(model, monkeypatch, stream, prompt_tokens, beside):
    threads = set()

    def note(module, name):
        function = getattr(module, name)

        def noted(value, *args):
            if "choices" in value or isinstance(value, list):
                threads.add((name, threading.get_ident()))
            return function(value, *args)

        monkeypatch.setattr(module, name, noted)

    note(formats, "completion_logprobs")
    note(sse, "_text")
    top = [1.0] * 20

    async def main():
        router = FakeRouter(
            script=lambda s, p: token(s, p, 60, logprob=-1.0, top_ids=list(range(20)), top_logprobs=top), hold_at=0
        )
        async with gateway(model, router) as g:
            body = {"prompt": [40] * prompt_tokens, "echo": True, "logprobs": 20, "max_tokens": 1}
            task = asyncio.create_task((g.stream if stream else g.post)(TEXT, body))
            await g.until(lambda: router.submits)
            submit, rest = router.submits[0], prompt_tokens - 1
            alternatives = [list(range(20))] * rest, [top] * rest
            router.send(PromptLogprobs(submit.request_id, submit.attempt, 1, [-1.0] * rest, *alternatives))
            await g.until(lambda: [len(r.prompt_logprobs) for r in g.services.journal.records()] == [rest])
            router.release()
            answer = await task
            answer = answer[0] if stream else answer[1]
            assert len(answer["choices"][0]["logprobs"]["tokens"]) == prompt_tokens + 1
        assert {name for name, _ in threads} == {"completion_logprobs", "_text"}
        assert (threading.get_ident() not in {thread for _, thread in threads}) == beside

    run(main())


def test_an_answer_without_them_is_an_error_and_not_a_guess(model):
    async def main():
        async with gateway(model, FakeRouter(script=scored)) as g:
            body = {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 1}
            assert (await g.post(TEXT, body))[0] == 500

    run(main())


def test_a_text_comes_back_as_it_was_sent_and_stop_strings_are_not_looked_for_in_it(model, ids):
    async def main():
        router = FakeRouter(script=says(ids("ring")))
        async with gateway(model, router) as g:
            texts = ["stop  here", "and there"]
            body = {"prompt": texts, "echo": True, "stop": "stop", "n": 2, "max_tokens": len(ids("ring"))}
            _, response, _ = await g.post(TEXT, body)
            assert [c["text"] for c in response["choices"]] == [f"{t}ring" for t in texts for _ in range(2)]
            assert all(c["logprobs"] is None for c in response["choices"])
            assert not router.submits[0].sampling.prompt_logprobs
            _, response, _ = await g.post(TEXT, {"prompt": texts[0], "echo": True, "max_tokens": 0})
            assert response["choices"][0]["text"] == texts[0] and response["usage"]["completion_tokens"] == 0

    run(main())


def test_a_stream_begins_with_the_prompt(model, ids):
    async def main():
        async with gateway(model, FakeRouter(script=says(ids("a ring")))) as g:
            body = {"prompt": "Say ", "echo": True, "max_tokens": len(ids("a ring"))}
            *events, done = await g.stream(TEXT, body)
            texts = [e["choices"][0]["text"] for e in events]
            assert "".join(texts) == "Say a ring" and texts[0].startswith("Say ") and done == "[DONE]"

    run(main())


def test_of_alternatives_with_the_same_text_the_likeliest_is_told(model):
    first, second = (next(i for i in range(320) if model.token_bytes(i) == bytes([byte])) for byte in (0xE2, 0xF0))
    top = Scored(60, -3.0, [first, 60, second], [-0.5, -3.0, -4.0])
    assert completion_logprobs([top], model, 0)["top_logprobs"] == [{"\ufffd": -0.5, model.decode([60]): -3.0}]
