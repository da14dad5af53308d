"""Every bad input gets one clear error in OpenAI's nested body, and disturbs nobody else."""

import asyncio
import json
from typing import Any

import pytest

from tests.gateway.fake_router import FakeRouter
from tests.gateway.harness import gateway, run

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]
BAD_CHAT: dict[str, dict[str, Any]] = {  # name of the wrong field → body
    "messages": {"messages": []},
    "messages[0]": {"messages": ["hi"]},
    "messages[0].role": {"messages": [{"role": "wizard", "content": "hi"}]},
    "messages[0].content": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "messages[0].tool_calls": {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
    "temperature": {"temperature": -0.1},
    "top_p": {"top_p": 0},
    "top_k": {"top_k": -2},
    "min_p": {"min_p": 1.5},
    "n": {"n": 65},
    "seed": {"seed": "x"},
    "stop": {"stop": [""]},
    "stream": {"stream": "yes"},
    "max_tokens": {"max_tokens": 0},
    "max_completion_tokens": {"max_completion_tokens": 1.5},
    "presence_penalty": {"presence_penalty": 3},
    "repetition_penalty": {"repetition_penalty": 1e-308},
    "logit_bias": {"logit_bias": {"no": 1}},
    "top_logprobs": {"top_logprobs": 3},
    "stop_token_ids": {"stop_token_ids": [99999]},
    "stream_options": {"stream_options": {"include_usage": True}},
    "response_format": {"response_format": {"type": "json_object"}},
    "tools": {"tools": [{"type": "function"}]},
    "echo": {"echo": True},
    "chat_template_kwargs": {"chat_template_kwargs": []},
    "min_tokens": {"min_tokens": 1, "stop_token_ids": list(range(320))},
    "moering": {"moering": {"on_missing_expert": "guess"}},
    "model": {"model": 5},
}
BAD_TEXT: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": [["a"]]},
    "suffix": {"prompt": "a", "suffix": "b"},
    "echo": {"prompt": "a", "echo": "yes"},
    "best_of": {"prompt": "a", "best_of": 2},
    "logprobs": {"prompt": "a", "logprobs": 21},
}
BAD_PROMPTS = [None, "", [], [[]], ["a", ""], 5, [1, "a"], [-1], [320], [True], {"a": 1}, "\ud800"]


def check_error(status, body, expected, param=None):
    assert status == expected
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and "Traceback" not in body["error"]["message"]
    assert "/" not in body["error"]["message"].replace("/v1/completions", "").replace("application/json", "")
    if param is not None:
        assert body["error"]["param"] == param and param in body["error"]["message"]


def test_wrong_fields_are_named(model):
    async def main():
        router = FakeRouter()
        async with gateway(model, router) as g:
            for param, body in BAD_CHAT.items():
                status, answer, _ = await g.post(CHAT, {"messages": HELLO, **body})
                check_error(status, answer, 400, param)
            for param, body in BAD_TEXT.items():
                status, answer, _ = await g.post(TEXT, body)
                check_error(status, answer, 400, param)
            assert router.submits == []
            assert (await g.post(TEXT, {"prompt": [5], "max_tokens": 1}))[0] == 200

    run(main())


def test_bad_prompts_are_refused(model):
    async def main():
        router = FakeRouter()
        async with gateway(model, router) as g:
            for prompt in BAD_PROMPTS:
                status, answer, _ = await g.post(TEXT, {"prompt": prompt})
                check_error(status, answer, 400)
                assert answer["error"]["param"] == "prompt"
            assert router.submits == []

    run(main())


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "1" * 400, '"0"', "true", "[]"])
def test_numbers_must_be_finite_numbers(model, value):
    async def main():
        async with gateway(model, FakeRouter()) as g:
            headers = {"Content-Type": "application/json"}
            data = f'{{"prompt": "a", "temperature": {value}}}'
            status, answer, _ = await g.post(TEXT, data=data, headers=headers)
            check_error(status, answer, 400, "temperature")

    run(main())


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'"x"', b"\xff\xfe{}", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"]
)
def test_bodies_that_are_no_json_object(model, data):
    async def main():
        async with gateway(model, FakeRouter()) as g:
            status, answer, _ = await g.post(CHAT, data=data, headers={"Content-Type": "application/json"})
            check_error(status, answer, 400)

    run(main())


def test_a_body_that_is_not_compressed_as_its_headers_say(model, caplog):
    async def main():
        async with gateway(model, FakeRouter()) as g:
            headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
            status, answer, _ = await g.post(CHAT, data=b"plain", headers=headers)
            check_error(status, answer, 400)

    run(main())
    assert all(not r.exc_info and "\n" not in r.getMessage() for r in caplog.records)


def test_what_is_no_http_is_one_line_in_the_log(model, caplog):
    async def main():
        async with gateway(model, FakeRouter()) as g:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(g.url.rpartition(":")[2]))
            writer.write(b"GET /health HTTP/1.1\r\nContent-Length: many\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.0 400")
            writer.close()

    run(main())
    (record,) = [r for r in caplog.records if r.name == "aiohttp.server"]
    assert (record.levelname, record.exc_info) == ("WARNING", None)
    assert "from 127.0.0.1: 400" in record.getMessage() and "\n" not in record.getMessage()


def test_content_type_size_model_and_method(model):
    async def main():
        async with gateway(model, FakeRouter(), max_body_bytes=10_000) as g:
            status, answer, _ = await g.post(CHAT, data=b"{}", headers={"Content-Type": "text/plain"})
            check_error(status, answer, 415)
            status, answer, _ = await g.post(CHAT, {"messages": HELLO, "pad": "x" * 10_000})
            check_error(status, answer, 413)
            status, answer, _ = await g.post(CHAT, {"model": "gpt-4", "messages": HELLO})
            check_error(status, answer, 404, "model")
            assert answer["error"]["code"] == "model_not_found"
            status, text, _ = await g.get("/v1/nothing")
            check_error(status, json.loads(text), 404)
            status, text, headers = await g.get(CHAT)
            check_error(status, json.loads(text), 405)
            assert headers["Allow"] == "POST"
            status, text, _ = await g.get("/v1/models/gpt-4")
            check_error(status, json.loads(text), 404)

    run(main())


async def answer_to(g, head: str, body: bytes | None = None, version: str = "1.1") -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the response to a raw request. HTTP/1.0 sends its body at once, 1.1 when told to."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(g.url.rpartition(":")[2]))
    first = f"POST {TEXT} HTTP/{version}\r\nHost: x\r\nContent-Type: application/json"
    writer.write(f"{first}\r\n{head}\r\n\r\n".encode())
    if version == "1.0" and body is not None:
        writer.write(body)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
    if " 100 " in lines[0]:
        assert body is not None and version == "1.1"
        writer.write(body)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
    headers = dict(line.split(": ", 1) for line in lines[1:] if line)
    answer = await reader.readexactly(int(headers["Content-Length"]))
    writer.close()
    return int(lines[0].split()[1]), headers, answer


def test_who_asks_before_sending_a_body_is_answered_before_it_is_sent(model):
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()

    async def main():
        async with gateway(model, FakeRouter(), max_body_bytes=10_000) as g:
            asks, length = "Expect: 100-continue\r\nContent-Length: ", len(body)
            status, headers, answer = await answer_to(g, f"{asks}10001")
            check_error(status, json.loads(answer), 413)
            assert headers["Connection"] == "close" and headers["X-Request-Id"]
            status, headers, answer = await answer_to(g, f"Expect: a miracle\r\nContent-Length: {length}")
            check_error(status, json.loads(answer), 417)
            assert headers["Connection"] == "close"
            for version in ("1.0", "1.1"):
                status, _, answer = await answer_to(g, f"{asks}{length}", body, version)
                assert status == 200 and json.loads(answer)["choices"]
            _, text, _ = await g.get("/metrics")
            assert 'moering_http_responses_total{status="413"} 1.0' in text

    run(main())


def test_a_prompt_over_the_context(model):
    async def main():
        router = FakeRouter()
        async with gateway(model, router) as g:  # 512 tokens
            long = [{"role": "user", "content": "x " * 600}]
            for path, body in (
                (CHAT, {"messages": long}),
                (TEXT, {"prompt": "x" * (model.max_prompt_chars + 1)}),
                (CHAT, {"messages": HELLO, "max_tokens": 511}),
                (TEXT, {"prompt": [5] * 512, "max_tokens": 1}),
                (TEXT, {"prompt": [5] * 500, "max_tokens": 13}),
            ):
                status, answer, _ = await g.post(path, body)
                check_error(status, answer, 400)
                assert "maximum context length is 512" in answer["error"]["message"]
                assert answer["error"]["code"] == "context_length_exceeded"
            assert router.submits == []
            assert (await g.post(TEXT, {"prompt": [5] * 500, "max_tokens": 12}))[0] == 200

    run(main())


def test_unknown_fields_and_neutral_values_are_accepted(model):
    async def main():
        async with gateway(model, FakeRouter()) as g:
            harmless = {
                "best_of": 1, "logprobs": None, "suffix": None, "echo": False, "user": "me", "whatever": {"x": 1},
                "response_format": {"type": "text"}, "tools": None, "stop": [], "stream_options": None,
            }  # fmt: skip
            assert (await g.post(TEXT, {"prompt": "a", "max_tokens": 1, **harmless}))[0] == 200

    run(main())


def test_a_template_that_refuses_is_the_clients_error(model, tmp_path):
    from gateway.chat_template import ChatTemplate
    from gateway.errors import ApiError

    refusing = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ApiError, match="roles must alternate") as e:
        refusing.render([], True, {})
    assert e.value.status == 400
    escaping = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {})
    with pytest.raises(ApiError):
        escaping.render([], True, {})
    spinning = ChatTemplate("{% for i in range(10**9) %}x{% endfor %}", {})
    with pytest.raises(ApiError):
        spinning.render([], True, {})


def test_one_id_that_does_not_stop_is_enough_for_min_tokens(model):
    async def main():
        async with gateway(model, FakeRouter()) as g:
            body = {"prompt": "a", "max_tokens": 1, "min_tokens": 1, "stop_token_ids": list(range(1, 320))}
            assert (await g.post(TEXT, {**body, "ignore_eos": True}))[0] == 200
            everything = {**body, "stop_token_ids": list(range(320)), "min_tokens": 0}
            assert (await g.post(TEXT, everything))[0] == 200

    run(main())
