"""``moering chat``: a conversation in the terminal, streamed. One line is one question; piped input works the same.

Ctrl-C stops the answer that is being written, Ctrl-D leaves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException

from moering.config import option
from moering.http_client import HttpError, base, get_json, request
from moering.process import run_main

Message = dict[str, str]


@dataclass(frozen=True)
class Config:
    """Talk to a model. Every line is a question; Ctrl-C stops the answer, Ctrl-D leaves."""

    url: str = option("http://127.0.0.1:8000", "address of a gateway")
    model: str = option("", "model; the first that the server lists where not given")
    system: str = option("", "system message")
    max_tokens: int = option(512, "longest answer in tokens")
    temperature: float = option(0.7, "0 always takes the most probable token")
    api_key: str = option("", "key of the API, where it has one")


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``moering chat``."""
    return run_main("chat", Config, _run, argv)


def pieces(stream: Iterable[bytes]) -> Iterator[str]:
    """The text in a stream of chat chunks (server-sent events), up to ``[DONE]``.

    Raises `HttpError` on an error event, and where the stream breaks off or is no such stream.
    """
    try:
        for line in stream:
            if not line.startswith(b"data:"):
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise HttpError(str(event["error"]["message"]))
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""
    except (OSError, HTTPException, ValueError, KeyError, TypeError, AttributeError) as e:
        raise HttpError(f"the answer broke off: {e!r}") from e
    raise HttpError("the answer broke off")


def _run(config: Config) -> int:
    model = config.model or _first_model(config)
    history: list[Message] = [{"role": "system", "content": config.system}] if config.system else []
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        print(f"{model} at {config.url}. Ctrl-C stops an answer, Ctrl-D leaves.")
    status = 0
    while True:
        try:
            question = input(prompt)
        except EOFError:
            return status
        except KeyboardInterrupt:
            print()
            continue
        if question.strip():
            status |= _ask(config, model, history, question)


def _first_model(config: Config) -> str:
    models = get_json(f"{base(config.url)}/v1/models", key=config.api_key or None)
    try:
        return str(models["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as e:
        raise HttpError(f"{config.url} lists no model") from e


def _ask(config: Config, model: str, history: list[Message], question: str) -> int:
    """One question and its answer. Returns 1 where it failed, which leaves the history as it was."""
    asked: list[Message] = [*history, {"role": "user", "content": question}]
    answer = ""
    try:
        for text in _answer(config, model, asked):
            answer += text
            print(text, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
    except HttpError as e:
        print(end="\n" if answer else "")
        print(f"moering chat: {e}", file=sys.stderr)
        return 1
    history[:] = [*asked, {"role": "assistant", "content": answer}]
    return 0


def _answer(config: Config, model: str, messages: list[Message]) -> Iterator[str]:
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "stream": True,
    }
    url = f"{base(config.url)}/v1/chat/completions"
    with request(url, body, timeout_s=600.0, key=config.api_key or None) as response:
        yield from pieces(response)
