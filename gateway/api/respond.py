"""Runs a generation and answers with it, whole or as a stream."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from aiohttp import web

from gateway.errors import ApiError
from gateway.formats import Format, Object
from gateway.generation import Generation
from gateway.offload import offload
from gateway.output import ChoiceOutput, Delta
from gateway.services import Services
from gateway.sse import DONE, EventStream, send_json

logger = logging.getLogger(__name__)

INTERNAL = ApiError(500, "internal error", code="internal")


async def respond(
    request: web.Request, services: Services, generation: Generation, formatter: Format
) -> web.StreamResponse:
    """Generate and answer. However this ends (finished, failed, client gone), nothing stays under way."""
    services.admit(len(generation.outputs))
    try:
        generation.start()
        if generation.options.stream:
            return await _stream(request, services, generation, formatter)
        return await _whole(request, services, generation, formatter)
    finally:
        generation.close()


async def _whole(
    request: web.Request, services: Services, generation: Generation, formatter: Format
) -> web.StreamResponse:
    wholes = [Delta() for _ in generation.outputs]
    async for deltas in generation.deltas():
        for output, delta in deltas:
            whole = wholes[output.index]
            whole.text += delta.text
            whole.prompt += delta.prompt
            whole.tokens += delta.tokens
            whole.finish_reason = delta.finish_reason
    size = _scores(generation.outputs[0], wholes)
    body = await offload(size, formatter.response, generation.outputs, wholes, usage(generation))
    return await send_json(request, services.guard, body, size)


async def _stream(
    request: web.Request, services: Services, generation: Generation, formatter: Format
) -> web.StreamResponse:
    if request.transport is None:
        raise ConnectionResetError("the client is gone")
    with services.guard.watch(request.transport) as watched:
        stream = EventStream(request, watched)
        try:
            async for deltas in generation.deltas():
                await _send_deltas(stream, generation.outputs, deltas, formatter)
            if generation.options.include_usage:
                await stream.send(formatter.usage_chunk(usage(generation)))
            await stream.write(DONE)
        except ApiError as e:
            if stream.response is None:
                raise
            await stream.send(e.body())
        except ConnectionError:
            raise
        except Exception:
            if stream.response is None:
                raise
            logger.exception("a stream of request %s ends with an error", generation.outputs[0].record.request_id)
            await stream.send(INTERNAL.body())
    response = stream.response
    assert response is not None  # a generation has at least one token, or it failed
    return response


async def _send_deltas(
    stream: EventStream,
    outputs: list[ChoiceOutput],
    deltas: list[tuple[ChoiceOutput, Delta]],
    formatter: Format,
) -> None:
    if stream.response is None:
        for chunk in formatter.opening(outputs):
            await stream.send(chunk)
    for output, delta in deltas:
        size = _scores(output, [delta])
        event = await offload(size, formatter.chunk, output, delta)
        if event is not None:
            await stream.send(event, size)


def _scores(output: ChoiceOutput, deltas: Iterable[Delta]) -> int:
    """How many log-probabilities these deltas of `output`, or of others of its request, bring to the client."""
    return sum(len(d.prompt) + len(d.tokens) for d in deltas) * (1 + output.record.sampling.logprobs)


def usage(generation: Generation) -> Object:
    """Token counts; a prompt counts once, however many choices it has."""
    prompt = sum(len(p) for p in generation.prompts)
    completion = sum(o.completion_tokens for o in generation.outputs)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
