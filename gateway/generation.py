"""All choices of one HTTP request, from admission to their terminal events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial

from gateway.errors import failure
from gateway.journal import Event, Failure, Record
from gateway.metrics import Metrics
from gateway.model import Model
from gateway.output import ChoiceOutput, Delta
from gateway.request import Options
from gateway.router_pool import RouterPool


class Generation:
    """Submits the choices and yields their deltas. `close` must be called in the end, whatever happened."""

    def __init__(
        self,
        request_id: str,
        prompts: list[list[int]],
        options: Options,
        model: Model,
        pool: RouterPool,
        metrics: Metrics,
        timeout_s: float,
        echoes: Sequence[str] = (),
    ) -> None:
        """`echoes`: the texts of the prompts, where answers begin with them. Raises `ApiError` when a prompt does not
        fit the context; nothing has started then."""
        self._pool, self._metrics = pool, metrics
        self._events: list[tuple[int, Event]] = []
        self._wake = asyncio.Event()
        self._started = asyncio.get_running_loop().time()
        self._last_token: dict[int, float] = {}
        self.prompts, self.options = prompts, options
        self.outputs: list[ChoiceOutput] = []
        for prompt, echo in zip(prompts, echoes or [""] * len(prompts), strict=True):
            for choice in range(options.n):
                index = len(self.outputs)
                sampling = options.sampling_for(choice, len(prompt), model.context_tokens)
                sink = partial(self._put, index)
                record = Record(f"{request_id}-{index}", prompt, sampling, self._started + timeout_s, sink)
                self.outputs.append(ChoiceOutput(index, record, model, options, echo))

    def start(self) -> None:
        """Submit all choices."""
        self._metrics.prompt_tokens.inc(sum(len(p) for p in self.prompts))
        for output in self.outputs:
            self._pool.open(output.record)

    async def deltas(self) -> AsyncIterator[list[tuple[ChoiceOutput, Delta]]]:
        """What is new, as often as there is something, until all choices have finished. Raises `ApiError`."""
        unfinished = len(self.outputs)
        while unfinished:
            await self._wake.wait()
            self._wake.clear()
            events, self._events = self._events, []
            touched: dict[int, ChoiceOutput] = {}
            for index, event in events:
                output = self.outputs[index]
                if output.finish_reason is not None:
                    continue  # tokens that crossed a stop string's abort
                if isinstance(event, Failure):
                    self._end(output, "error")
                    raise failure(event.code, event.message)
                output.push(event)
                touched[index] = output
            self._observe(touched)
            for output in touched.values():
                if output.finish_reason is not None:
                    self._pool.cancel(output.record)
                    self._end(output, output.finish_reason)
                    unfinished -= 1
            if touched:
                yield [(output, output.take()) for output in touched.values()]

    def close(self) -> None:
        """Abort what is still being computed. Idempotent."""
        for output in self.outputs:
            if output.finish_reason is None:
                output.finish_reason = "abort"
                self._pool.cancel(output.record)
                self._end(output, "abort")

    def _put(self, index: int, event: Event) -> None:
        self._events.append((index, event))
        self._wake.set()

    def _end(self, output: ChoiceOutput, reason: str) -> None:
        """The one terminal event of a choice."""
        output.finish_reason = output.finish_reason or reason
        self._metrics.requests.labels(finished_reason=reason).inc()
        self._metrics.generation_tokens.inc(output.completion_tokens)
        self._metrics.e2e_latency.observe(asyncio.get_running_loop().time() - self._started)

    def _observe(self, touched: dict[int, ChoiceOutput]) -> None:
        now = asyncio.get_running_loop().time()
        for index in touched:
            last = self._last_token.get(index)
            if last is None:
                self._metrics.time_to_first_token.observe(now - self._started)
            else:
                self._metrics.inter_token_latency.observe(now - last)
            self._last_token[index] = now
