"""Log-probabilities in the two shapes that OpenAI's endpoints have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.journal import Scored
from gateway.model import Model
from moering.protocol import Token

_MISSING = -9999.0  # what OpenAI sends for a probability of zero


def chat_logprobs(tokens: list[Token], model: Model) -> dict[str, Any]:
    """`{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}`."""
    content = []
    for token in tokens:
        top = [_entry(i, p, model) for i, p in zip(token.top_ids, token.top_logprobs, strict=False)]
        content.append({**_entry(token.token_id, token.logprob, model), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[Token | Scored], model: Model, offset: int) -> dict[str, Any]:
    """`{"tokens", "token_logprobs", "top_logprobs", "text_offset"}`; `offset` is where the first token starts.

    What has no log-probability, as the first token of a prompt, has null.
    """
    texts = [_text(t.token_id, model) for t in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [t.logprob for t in tokens],
        "top_logprobs": [None if t.logprob is None else _top(t, model) for t in tokens],
        "text_offset": offsets,
    }


def _top(token: Token | Scored, model: Model) -> dict[str, float]:
    """By text: of tokens that have the same, as parts of characters do, the likeliest. They come best first."""
    top: dict[str, float] = {}
    for token_id, logprob in zip(token.top_ids, token.top_logprobs, strict=False):
        top.setdefault(_text(token_id, model), logprob)
    return top


def _entry(token_id: int, logprob: float | None, model: Model) -> dict[str, Any]:
    data = model.token_bytes(token_id)
    text = data.decode("utf-8", "replace")
    return {"token": text, "logprob": _MISSING if logprob is None else logprob, "bytes": list(data)}


def _text(token_id: int, model: Model) -> str:
    return model.token_bytes(token_id).decode("utf-8", "replace")
