"""Chat and completions against a scripted router, over real HTTP."""

import openai

from tests.gateway.fake_router import FakeRouter, says
from tests.gateway.harness import gateway, run

HELLO = [{"role": "user", "content": "hi"}]


def test_chat_answers_with_text_and_usage(model, ids):
    async def main():
        router = FakeRouter(script=says(ids("Hello wörld"), eos=2))
        async with gateway(model, router) as g:
            status, body, _ = await g.post("/v1/chat/completions", {"model": "tiny", "messages": HELLO})
            assert status == 200
            assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
            assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hello wörld", "refusal": None}
            assert body["choices"][0]["finish_reason"] == "stop"
            prompt = model.tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n").ids
            assert router.submits[0].prompt == prompt
            answer = len(ids("Hello wörld")) + 1
            assert body["usage"] == {
                "prompt_tokens": len(prompt),
                "completion_tokens": answer,
                "total_tokens": len(prompt) + answer,
            }

    run(main())


def test_streamed_text_equals_the_whole_and_ends_with_done(model, ids):
    async def main():
        text = "Grüße, 世界 🎉!"
        async with gateway(model, FakeRouter(script=says(ids(text), eos=2))) as g:
            options = {"model": "tiny", "messages": HELLO, "stream_options": {"include_usage": True}}
            events = await g.stream("/v1/chat/completions", options)
            assert events[-1] == "[DONE]"
            *chunks, usage = events[:-1]
            assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text
            assert not any("\ufffd" in c["choices"][0]["delta"].get("content", "") for c in chunks)
            assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
            assert all(c["usage"] is None for c in chunks)
            assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(ids(text)) + 1
            assert len({c["id"] for c in events[:-1]}) == 1

    run(main())


def test_the_openai_client_chats(model, ids):
    async def main():
        async with gateway(model, FakeRouter(script=says(ids("one two"), eos=2))) as g:
            client = openai.AsyncOpenAI(base_url=g.url + "/v1", api_key="none", max_retries=0)
            async with client:
                assert [m.id async for m in client.models.list()] == ["tiny"]
                whole = await client.chat.completions.create(model="tiny", messages=HELLO)
                assert whole.choices[0].message.content == "one two"
                stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
                pieces = [c.choices[0].delta.content or "" async for c in stream]
                assert "".join(pieces) == "one two"
                text = await client.completions.create(model="tiny", prompt="x", max_tokens=3)
                assert text.choices[0].text == "one" and text.choices[0].finish_reason == "length"

    run(main())


def test_content_parts_and_the_developer_role_reach_the_template(model, ids):
    async def main():
        router = FakeRouter(script=says(ids("ok"), eos=2))
        async with gateway(model, router) as g:
            parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
            messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
            assert (await g.post("/v1/chat/completions", {"messages": messages}))[0] == 200
            text = "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n"
            assert router.submits[0].prompt == model.tokenizer.encode(text).ids

    run(main())


def test_completions_take_all_four_shapes_of_prompt(model, ids):
    async def main():
        router = FakeRouter()
        async with gateway(model, router) as g:
            for prompt in ("ab", ["ab", "cd"], [5, 6, 7], [[5, 6], [7]]):
                status, body, _ = await g.post("/v1/completions", {"prompt": prompt, "max_tokens": 2})
                assert status == 200 and body["object"] == "text_completion"
                assert [c["index"] for c in body["choices"]] == list(range(len(body["choices"])))
            assert [s.prompt for s in router.submits] == [ids("ab"), ids("ab"), ids("cd"), [5, 6, 7], [5, 6], [7]]

    run(main())


def test_n_choices_share_a_seed_and_differ_by_choice(model):
    async def main():
        router = FakeRouter()
        async with gateway(model, router) as g:
            request = {"prompt": [5], "max_tokens": 8, "n": 3, "seed": 11, "return_token_ids": True}
            _, whole, _ = await g.post("/v1/completions", request)
            assert [s.sampling.choice for s in router.submits] == [0, 1, 2]
            assert {s.sampling.seed for s in router.submits} == {11}
            texts = [c["text"] for c in whole["choices"]]
            assert len(set(texts)) == 3
            assert whole["usage"] == {"prompt_tokens": 1, "completion_tokens": 24, "total_tokens": 25}
            streamed = ["", "", ""]
            for event in (await g.stream("/v1/completions", request))[:-1]:
                streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
            assert streamed == texts

    run(main())


def test_without_a_seed_each_request_draws_one(model):
    async def main():
        router = FakeRouter()
        async with gateway(model, router) as g:
            for _ in range(2):
                await g.post("/v1/completions", {"prompt": [5], "max_tokens": 1})
            assert router.submits[0].sampling.seed != router.submits[1].sampling.seed

    run(main())


def test_token_ids_and_digests_come_back_on_request(model, ids):
    async def main():
        def script(submit, position):
            new = says(ids("héllo"), eos=2)(submit, position)
            return type(new)(
                new.request_id, new.attempt, position, new.token_id, new.finish_reason, logits_digest=f"d{position}"
            )

        router = FakeRouter(script=script)
        async with gateway(model, router) as g:
            request = {"messages": HELLO, "return_token_ids": True, "moering": {"logits_digest": True}}
            events = (await g.stream("/v1/chat/completions", request))[:-1]
            assert router.submits[0].sampling.logits_digest is True
            assert events[0]["prompt_token_ids"] == router.submits[0].prompt
            choices = [e["choices"][0] for e in events[1:]]
            assert [t for c in choices for t in c["token_ids"]] == [*ids("héllo"), 2]
            digests = [d for c in choices for d in c["moering"]["logits_digests"]]
            assert digests == [f"d{i}" for i in range(len(ids("héllo")) + 1)]
            _, whole, _ = await g.post("/v1/chat/completions", request)
            assert whole["choices"][0]["token_ids"] == [*ids("héllo"), 2]
            assert whole["choices"][0]["moering"]["logits_digests"] == digests

    run(main())


def test_log_probabilities_have_openais_shapes(model, ids):
    async def main():
        def script(submit, position):
            a, b = ids("a")[0], ids("b")[0]
            return type(says([a])(submit, 0))(
                submit.request_id, submit.attempt, position, a, "length" if position == 1 else None,
                -0.5, [a, b], [-0.5, -1.5],
            )  # fmt: skip

        async with gateway(model, FakeRouter(script=script)) as g:
            request = {"messages": HELLO, "max_tokens": 2, "logprobs": True, "top_logprobs": 2}
            _, chat, _ = await g.post("/v1/chat/completions", request)
            first = chat["choices"][0]["logprobs"]["content"][0]
            assert (first["token"], first["logprob"], first["bytes"]) == ("a", -0.5, [97])
            assert [t["token"] for t in first["top_logprobs"]] == ["a", "b"]
            _, text, _ = await g.post("/v1/completions", {"prompt": [5], "max_tokens": 2, "logprobs": 2})
            assert text["choices"][0]["logprobs"] == {
                "tokens": ["a", "a"],
                "token_logprobs": [-0.5, -0.5],
                "top_logprobs": [{"a": -0.5, "b": -1.5}] * 2,
                "text_offset": [0, 1],
            }

    run(main())
