"""What a request may ask for when an expert has no live replica, and what its answer says about it."""

import dataclasses
from typing import Any

import pytest

from tests.gateway.fake_router import FakeRouter, counts
from tests.gateway.harness import gateway, run

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]
GONE = {0: 5, 2: 1}  # the prompt's five positions, and one of the answer's


def some_renormalized(submit, position):
    token = counts(submit, position)
    return dataclasses.replace(token, renormalized=GONE.get(position, 0))


@pytest.mark.parametrize("policy", [None, "wait", "fail", "renormalize"])
def test_the_policy_reaches_the_router(model, policy):
    async def main():
        router = FakeRouter()
        async with gateway(model, router) as g:
            extension = {} if policy is None else {"on_missing_expert": policy}
            status, _, _ = await g.post(TEXT, {"prompt": [5], "max_tokens": 1, "moering": extension})
            assert status == 200
            assert router.submits[0].sampling.on_missing_expert == (policy or "wait")

    run(main())


@pytest.mark.parametrize("extension", [{"on_missing_experts": "fail"}, {"on_missing_expert": 3}, {"": 1}, []])
def test_what_is_not_known_is_refused(model, extension):
    async def main():
        router = FakeRouter()
        async with gateway(model, router) as g:
            status, body, _ = await g.post(CHAT, {"messages": HELLO, "moering": extension})
            assert (status, body["error"]["param"]) == (400, "moering")
            assert router.submits == []

    run(main())


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_renormalized_tokens_are_flagged(model, path):
    async def main():
        request: dict[str, Any] = {"messages": HELLO} if path == CHAT else {"prompt": [5, 6, 7, 8, 9]}
        request |= {"max_tokens": 4, "n": 2, "moering": {"on_missing_expert": "renormalize"}}
        async with gateway(model, FakeRouter(script=some_renormalized)) as g:
            _, whole, _ = await g.post(path, request)
            assert [c["moering"] for c in whole["choices"]] == [{"renormalized_tokens": 6}] * 2
            events = (await g.stream(path, request))[:-1]
            flagged = [c["moering"] for e in events for c in e["choices"] if "moering" in c]
            assert flagged == [{"renormalized_tokens": 6}] * 2  # with the last chunk of each choice
            events = (await g.stream(path, {**request, "n": 1, "return_token_ids": True}))[:-1]
            each = [n for e in events for c in e["choices"] for n in c.get("moering", {}).get("renormalized", [])]
            assert each == [5, 0, 1, 0]

    run(main())


def test_a_request_that_did_not_ask_is_not_bothered(model):
    async def main():
        async with gateway(model, FakeRouter()) as g:
            _, whole, _ = await g.post(TEXT, {"prompt": [5], "max_tokens": 4, "return_token_ids": True})
            assert "moering" not in whole["choices"][0]

    run(main())
