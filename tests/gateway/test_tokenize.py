"""/tokenize and /detokenize: what a request would be computed with, and back."""

import dataclasses
import threading

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from gateway import sse
from tests.gateway.fake_router import FakeRouter
from tests.gateway.harness import gateway, run
from tests.gateway.test_bad_requests import HELLO, check_error
from tests.gateway.test_clients import port_of, raw_post


def test_there_and_back(model, ids):
    async def main():
        async with gateway(model) as g:  # no router: it needs none
            text = "Übermut\n ring"
            status, answer, _ = await g.post("/tokenize", {"model": "tiny", "prompt": text})
            assert status == 200 and answer == {
                "count": len(ids(text)), "max_model_len": 512, "tokens": ids(text), "token_strs": None,
            }  # fmt: skip
            assert (await g.post("/detokenize", {"tokens": ids(text)}))[1] == {"prompt": text}
            assert (await g.post("/tokenize", {"prompt": ""}))[1]["tokens"] == []
            assert (await g.post("/detokenize", {"tokens": []}))[1] == {"prompt": ""}

    run(main())


def test_messages_have_the_tokens_that_chat_submits(model):
    async def main():
        router = FakeRouter()
        async with gateway(model, router) as g:
            body = {"messages": HELLO, "add_generation_prompt": True}
            _, answer, _ = await g.post("/tokenize", body)
            await g.post("/v1/chat/completions", {**body, "max_tokens": 1})
            assert answer["tokens"] == router.submits[0].prompt and answer["count"] == len(router.submits[0].prompt)
            _, shorter, _ = await g.post("/tokenize", {**body, "add_generation_prompt": False})
            assert 0 < shorter["count"] < answer["count"]

    run(main())


def test_tokens_as_the_vocabulary_writes_them(model):
    async def main():
        async with gateway(model) as g:
            _, answer, _ = await g.post("/tokenize", {"prompt": "a b", "return_token_strs": True})
            assert answer["token_strs"] == model.tokenizer.encode("a b").tokens

    run(main())


def test_many_tokens_are_written_beside_the_event_loop(model, monkeypatch):
    threads, tokenizer, text_of = set(), model.tokenizer, sse._text

    def note(function):
        def noted(*args):
            threads.add(threading.get_ident())
            return function(*args)

        return noted

    class Noted:
        encode_batch_fast = tokenizer.encode_batch_fast
        id_to_token = staticmethod(note(tokenizer.id_to_token))

    monkeypatch.setattr(sse, "_text", note(text_of))

    async def main():
        async with gateway(dataclasses.replace(model, tokenizer=Noted())) as g:
            for letters, beside in ((100, False), (5000, True)):
                text = "z " * letters  # more tokens than letters
                threads.clear()
                _, answer, _ = await g.post("/tokenize", {"prompt": text, "return_token_strs": True})
                assert (threading.get_ident() not in threads) == beside
                assert answer["tokens"] == tokenizer.encode(text).ids
                assert answer["token_strs"] == tokenizer.encode(text).tokens

    run(main())


def test_who_does_not_read_the_tokens_is_cut_off(model):
    roomy = dataclasses.replace(model, max_prompt_chars=1 << 20)

    async def main():
        async with gateway(roomy, stall_timeout_s=0.2) as g:
            body = {"prompt": "z " * (1 << 19), "return_token_strs": True}  # an answer of several MB
            client = await raw_post(port_of(g), body, receive_bytes=4096, path="/tokenize")
            await g.until(lambda: g.services.guard.cut_count == 1)
            client.close()

    run(main())


def test_special_tokens_are_added_where_asked_for(model):
    tokenizer = Tokenizer.from_str(model.tokenizer.to_str())
    tokenizer.post_processor = TemplateProcessing(single="<first> $A", special_tokens=[("<first>", 7)])
    model = dataclasses.replace(model, tokenizer=tokenizer)

    async def main():
        async with gateway(model) as g:
            for body, default in (({"prompt": "a"}, True), ({"messages": HELLO}, False)):
                first = []
                for asked in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
                    _, answer, _ = await g.post("/tokenize", {**body, **asked})
                    first.append(answer["tokens"][0] == 7)
                assert first == [default, True, False]

    run(main())


def test_what_they_refuse(model):
    async def main():
        async with gateway(model) as g:
            for param, body in (
                ("prompt", {}),
                ("prompt", {"prompt": ["a"]}),
                ("messages", {"messages": []}),
                ("tools", {"messages": HELLO, "tools": [{}]}),
                ("chat_template", {"messages": HELLO, "chat_template": "x"}),
                ("add_special_tokens", {"prompt": "a", "add_special_tokens": 1}),
            ):
                status, answer, _ = await g.post("/tokenize", body)
                check_error(status, answer, 400, param)
            for tokens in (None, "a", [320], [-1], [True]):
                status, answer, _ = await g.post("/detokenize", {"tokens": tokens})
                check_error(status, answer, 400, "tokens")
            status, answer, _ = await g.post("/detokenize", {"tokens": [5] * 513})
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
            assert (await g.post("/tokenize", {"model": "other", "prompt": "a"}))[0] == 404
            assert (await g.post("/detokenize", {"model": "other", "tokens": [5]}))[0] == 404

    run(main())
