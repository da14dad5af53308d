"""OpenAI's response objects, built from choices and their deltas."""

from __future__ import annotations

import time
from typing import Any, Protocol

from gateway.journal import Scored
from gateway.logprobs import chat_logprobs, completion_logprobs
from gateway.model import Model
from gateway.output import ChoiceOutput, Delta
from gateway.request import Options
from moering.protocol import Token

Object = dict[str, Any]


class Format(Protocol):
    """How an endpoint writes what was generated."""

    def opening(self, outputs: list[ChoiceOutput]) -> list[Object]:
        """Chunks before the first delta."""

    def chunk(self, output: ChoiceOutput, delta: Delta) -> Object | None:
        """The chunk for one delta; None when there is nothing to say yet."""

    def usage_chunk(self, usage: Object) -> Object:
        """The last chunk of a stream that asked for its usage."""

    def response(self, outputs: list[ChoiceOutput], deltas: list[Delta], usage: Object) -> Object:
        """The whole response; `deltas[i]` is all of `outputs[i]`."""


class _Base:
    """What both endpoints' objects share."""

    def __init__(self, kind: str, response_id: str, model: Model, options: Options) -> None:
        self._model, self._options = model, options
        self._head = {"id": response_id, "object": kind, "created": int(time.time()), "model": model.name}
        self._usage_in_chunks = {"usage": None} if options.stream and options.include_usage else {}

    def usage_chunk(self, usage: Object) -> Object:
        """See `Format`."""
        return {**self._head, "choices": [], "usage": usage}

    def _extras(self, output: ChoiceOutput, delta: Delta) -> Object:
        """Fields of a choice that only some requests ask for."""
        extras: Object = {}
        if self._options.return_token_ids:
            extras["token_ids"] = [t.token_id for t in delta.tokens]
        ours = self._extension(output, delta)
        if ours:
            extras["moering"] = ours
        return extras

    def _extension(self, output: ChoiceOutput, delta: Delta) -> Object:
        """The `moering` object of a choice: what is exact, and what is not."""
        sampling = self._options.sampling
        ours: Object = {}
        if sampling.logits_digest:
            ours["logits_digests"] = [t.logits_digest for t in delta.tokens]
        if sampling.on_missing_expert == "renormalize":
            if self._options.return_token_ids:
                ours["renormalized"] = [t.renormalized for t in delta.tokens]
            if delta.finish_reason is not None:
                ours["renormalized_tokens"] = output.renormalized_tokens
        return ours

    def _silent(self, delta: Delta) -> bool:
        """Whether a delta holds nothing that this client asked for."""
        sampling = self._options.sampling
        wants_tokens = self._options.return_token_ids or sampling.logits_digest or sampling.logprobs >= 0
        return not delta.text and delta.finish_reason is None and not wants_tokens


class ChatFormat(_Base):
    """`chat.completion` and its chunks."""

    def __init__(self, response_id: str, model: Model, options: Options) -> None:
        super().__init__("chat.completion.chunk" if options.stream else "chat.completion", response_id, model, options)

    def opening(self, outputs: list[ChoiceOutput]) -> list[Object]:
        """See `Format`."""
        chunks: list[Object] = []
        for output in outputs:
            delta = {"role": "assistant", "content": ""}
            chunk = self._chunk({"index": output.index, "delta": delta, "logprobs": None, "finish_reason": None})
            if self._options.return_token_ids and not chunks:
                chunk["prompt_token_ids"] = output.record.prompt
            chunks.append(chunk)
        return chunks

    def chunk(self, output: ChoiceOutput, delta: Delta) -> Object | None:
        """See `Format`."""
        if self._silent(delta):
            return None
        return self._chunk({
            "index": output.index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta.tokens),
            "finish_reason": delta.finish_reason,
            **self._extras(output, delta),
        })  # fmt: skip

    def response(self, outputs: list[ChoiceOutput], deltas: list[Delta], usage: Object) -> Object:
        """See `Format`."""
        choices = [
            {
                "index": output.index,
                "message": {"role": "assistant", "content": delta.text, "refusal": None},
                "logprobs": self._logprobs(delta.tokens),
                "finish_reason": delta.finish_reason,
                **self._extras(output, delta),
            }
            for output, delta in zip(outputs, deltas, strict=True)
        ]
        prompt = {"prompt_token_ids": outputs[0].record.prompt} if self._options.return_token_ids else {}
        return {**self._head, "choices": choices, "usage": usage, **prompt}

    def _chunk(self, choice: Object) -> Object:
        return {**self._head, "choices": [choice], **self._usage_in_chunks}

    def _logprobs(self, tokens: list[Token]) -> Object | None:
        return chat_logprobs(tokens, self._model) if self._options.sampling.logprobs >= 0 else None


class CompletionFormat(_Base):
    """`text_completion`, whole and in chunks."""

    def __init__(self, response_id: str, model: Model, options: Options) -> None:
        super().__init__("text_completion", response_id, model, options)
        self._offsets: dict[int, int] = {}  # characters of the tokens sent so far, by choice
        self._opened: set[int] = set()  # choices whose first chunk has gone out

    def opening(self, outputs: list[ChoiceOutput]) -> list[Object]:
        """See `Format`."""
        return []

    def chunk(self, output: ChoiceOutput, delta: Delta) -> Object | None:
        """See `Format`."""
        if self._silent(delta):
            return None
        return {**self._head, "choices": [self._choice(output, delta)], **self._usage_in_chunks}

    def response(self, outputs: list[ChoiceOutput], deltas: list[Delta], usage: Object) -> Object:
        """See `Format`."""
        choices = [self._choice(output, delta) for output, delta in zip(outputs, deltas, strict=True)]
        return {**self._head, "choices": choices, "usage": usage}

    def _choice(self, output: ChoiceOutput, delta: Delta) -> Object:
        choice = {
            "index": output.index,
            "text": delta.text,
            "logprobs": self._logprobs(output.index, [*delta.prompt, *delta.tokens]),
            "finish_reason": delta.finish_reason,
            **self._extras(output, delta),
        }
        if self._options.return_token_ids and output.index not in self._opened:
            choice["prompt_token_ids"] = output.record.prompt
        self._opened.add(output.index)
        return choice

    def _logprobs(self, index: int, tokens: list[Token | Scored]) -> Object | None:
        if self._options.sampling.logprobs < 0:
            return None
        offset = self._offsets.get(index, 0)
        result = completion_logprobs(tokens, self._model, offset)
        self._offsets[index] = offset + sum(len(text) for text in result["tokens"])
        return result
