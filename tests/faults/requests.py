"""Requests that use all that has to survive a router, and what a client got of one, whatever pieces it came in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.integration.streams import Body, Stream, Streams, bodies


def varied(url: str, count: int, tokens: int) -> list[Body]:
    """Greedy and seeded requests with penalties, log-probabilities, usage and two choices; the last ends at a stop."""
    result = bodies(count, tokens)
    extras: list[Body] = [
        {"stream_options": {"include_usage": True}},
        {"logprobs": 2},
        {"presence_penalty": 0.6, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
        {"n": 2, "logprobs": 0, "stream_options": {"include_usage": True}},
    ]
    for index, body in enumerate(result):
        body.update(extras[index % len(extras)])
    text = whole(Streams(url, [result[-1]]).finish()[0])[0]["text"]
    result[-1]["stop"] = [late_part(text)]
    return result


def late_part(text: str) -> str:
    """Some characters that `text` has in its last quarter for the first time."""
    for at in range(len(text) * 3 // 4, len(text) - 3):
        part = text[at : at + 3]
        if text.find(part) == at and part.isprintable() and "\ufffd" not in part:
            return part
    raise AssertionError(f"nothing new in the last quarter of {text!r}")


def whole(stream: Stream) -> dict[int, dict[str, Any]]:
    """Each choice of a stream put together from its pieces; the usage is choice -1."""
    result: dict[int, dict[str, Any]] = {}
    for chunk in stream.chunks:
        if chunk.get("usage"):
            assert -1 not in result, "the usage came twice"
            result[-1] = chunk["usage"]
        for choice in chunk["choices"]:
            mine = result.setdefault(choice["index"], {"text": "", "ids": [], "digests": [], "ends": []})
            mine["text"] += choice["text"]
            mine["ids"] += choice["token_ids"]
            mine["digests"] += choice["moering"]["logits_digests"]
            mine["ends"] += [choice["finish_reason"]] if choice["finish_reason"] else []
            for name, values in (choice.get("logprobs") or {}).items():
                mine.setdefault(name, []).extend(values)
    return result


def check_whole(seen: Sequence[Stream], reference: Sequence[Stream]) -> None:
    """Every stream ended once and brought, piece by piece, what it brought without a failure."""
    for index, (stream, wanted) in enumerate(zip(seen, reference, strict=True)):
        assert stream.done_lines == 1, f"stream {index}: {stream.ends}"
        got, expected = whole(stream), whole(wanted)
        for choice in got.keys() | expected.keys():
            assert got.get(choice) == expected.get(choice), f"stream {index}, choice {choice}"
        assert all(len(c["ends"]) == 1 for i, c in got.items() if i >= 0), f"stream {index}"
