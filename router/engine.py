"""The router's loop: receive, schedule, forward, sample, reply; one thread, blocking sockets.

A forward is split at each MoE layer. Between two layers a micro-batch waits in the exchange for its experts' results,
and a GPU computes it while others are served, so several may be in flight. When experts of some rows have no live
replica, those sequences *park* or do what else they asked for (`router.parking`); the others go on.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import zmq

from moering.protocol import Abort, Submit, Token, View
from moering.transport import Wakeup
from router import prompt_logprobs
from router.catch_up import CatchUp
from router.decoder import Decoder, Launched
from router.exchange import Exchange, Finished
from router.flight import Flight
from router.frontend import Frontend
from router.parking import Parking
from router.sampler import Sampled, Sampler
from router.scheduler import Scheduler
from router.sequence import Sequence, Status

logger = logging.getLogger(__name__)

IDLE_POLL_MS = 100  # how often deadlines and reconnections are looked at while nothing happens
REPORT_S = 1.0  # between the figures sent to gateways
NOT_FINITE = "the model's output is not finite"


class Engine:
    """Serves requests until `stop`. `view_changed` and `stop` may be called from any thread."""

    def __init__(
        self,
        decoder: Decoder,
        scheduler: Scheduler,
        exchange: Exchange,
        frontend: Frontend,
        poller: zmq.Poller,
        *,
        sampler: Sampler,
        threads: int,
        micro_batches: int,
        missing_expert_timeout_s: float,
        catch_up: CatchUp,
        spin_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._decoder, self._scheduler, self._exchange, self._frontend = decoder, scheduler, exchange, frontend
        self._sampler, self._catch_up = sampler, catch_up
        self._poller, self._clock, self._threads = poller, clock, threads
        self._micro_batches, self._spin_s = micro_batches, spin_s
        self._parking = Parking(exchange, missing_expert_timeout_s, self._fail_missing, self._drop)
        self._wakeup = Wakeup()
        poller.register(self._wakeup.fd, zmq.POLLIN)
        for socket in (frontend.socket, frontend.monitor):
            poller.register(socket, zmq.POLLIN)
        self._new_view: View | None = None
        self._stopping = self._acquainted = False
        self._next_look_s = self._next_report_s = 0.0
        self._flights: set[Flight] = set()
        self._launched: deque[tuple[Launched, Flight]] = deque()  # those that a GPU computes, in its order
        self.view: View | None = None  # the one that routes
        self.progress = 0
        self.forwards = self.forward_rows = self.forwards_dropped = 0
        self.tokens_renormalized = self.requests_without_replica = 0
        self._loads = np.zeros((0, 0), np.int64)  # tokens per expert, of one shape of the model
        self._taken = self._loads, self._loads  # these, and what they were when they were taken last

    # --- from other threads ---

    def view_changed(self, view: View) -> None:
        """Route by this view from the next turn of the loop on."""
        self._new_view = view
        self._wakeup.set()

    def stop(self) -> None:
        """End `run` after the turn in hand."""
        self._stopping = True
        self._wakeup.set()

    @property
    def numerics(self) -> str:
        """Equal in routers at which a stream may go on with equal bits."""
        numerics: str = self._decoder.numerics
        return numerics

    @property
    def queued(self) -> int:
        """Requests that run or wait."""
        return len(self._scheduler.waiting) + len(self._scheduler.running)

    @property
    def gateways(self) -> int:
        """Gateways that are connected."""
        return self._frontend.gateways

    def take_loads(self) -> np.ndarray:
        """Tokens per expert since the last call, int64 [layers, experts]. For one other thread.

        Nothing of the engine's is changed: its thread counts on meanwhile, and may begin anew with another shape.
        """
        loads = self._loads
        counted, (of, before) = loads.copy(), self._taken
        self._taken = loads, counted
        return counted - before if of is loads else counted

    def counters(self) -> dict[str, float]:
        """Counts since the start."""
        return {
            **dataclasses.asdict(self._exchange.dispatcher.counters),
            "forwards": self.forwards,
            "forward_rows": self.forward_rows,
            "forwards_dropped": self.forwards_dropped,
            "tokens_renormalized": self.tokens_renormalized,
            "requests_without_replica": self.requests_without_replica,
            "preemptions": self._scheduler.num_preemptions,
            "tokens_recomputed": self._scheduler.tokens_recomputed,
            "prefix_tokens_reused": self._scheduler.prefixes.tokens_reused,
        }

    def gauges(self) -> dict[str, float]:
        """The state of now. May be read by any thread."""
        return {
            "requests_running": len(self._scheduler.running),
            "requests_waiting": len(self._scheduler.waiting),
            "requests_parked": sum(len(f.items) for f in list(self._parking.flights)),
            "forwards_in_flight": len(self._flights) + len(self._parking.flights),
            "kv_blocks_in_use": self._scheduler.blocks_in_use,
            "expert_servers_passed_over": len(self._exchange.passed_over),
        }

    # --- the loop ---

    def run(self) -> None:
        """Serve until `stop`."""
        with torch.inference_mode():
            while not self._stopping:
                self._look()
                self._start()
                self._poll()
                reached = self._take_launched()
                for finished in self._exchange.take_finished():
                    self._advance(finished)
                self.progress += reached or not self._launched  # a GPU that hangs is no progress
        self._exchange.close()
        self._frontend.close()
        self._catch_up.close()

    def _poll(self) -> None:
        """Wait until something happens, and take note of it."""
        ready = self._spin() if self._spin_s else None
        if ready is None:
            due_ms = 0.0 if self._launched else 1000 * (self._exchange.due_s - self._clock())
            ready = self._poller.poll(math.ceil(min(IDLE_POLL_MS, max(0.0, due_ms))))
        sockets = [socket for socket, _ in ready]
        if self._wakeup.fd in sockets:
            self._wakeup.clear()
            self._follow_view()
        if self._frontend.socket in sockets:
            self._receive()
        if self._frontend.monitor in sockets and self._frontend.lost_one():
            self._receive()  # has libzmq take note, so that sending to that gateway fails from now on
            self._next_look_s = self._next_report_s = 0.0
        self._exchange.handle(ready)
        self._exchange.tick()
        if self._exchange.changed:
            self._exchange.changed = False
            self._retry_parked()

    def _spin(self) -> list[tuple[Any, int]] | None:
        """Look for answers and for the end of a GPU's work, for `spin_s`, while any is awaited: a thread that sleeps
        wakes up late. None: nothing has happened."""
        until_s = self._clock() + self._spin_s
        while (awaited := self._exchange.due_s < math.inf) or self._launched:
            if self._launched:
                first = self._launched[0][0]
                if not awaited:
                    first.synchronize()
                if first.query():
                    return []
            if self._clock() >= until_s:
                break
            if ready := self._poller.poll(0):
                return ready
        return None

    def _take_launched(self) -> bool:
        """Send out what the GPU has computed by now; whether there was any."""
        reached = False
        while self._launched and self._launched[0][0].query():
            self._reached(self._launched.popleft()[1])
            reached = True
        return reached

    def _receive(self) -> None:
        for gateway, message in self._frontend.receive():
            if isinstance(message, Submit):
                self._submit(gateway, message)
            elif isinstance(message, Abort):
                self._scheduler.abort(message.request_id, message.attempt)

    def _follow_view(self) -> None:
        view, self._new_view = self._new_view, None
        if view is not None:
            self._exchange.view_changed(view)
            self.view = view
            if self._loads.shape != (view.layers, view.experts):
                self._loads = np.zeros((view.layers, view.experts), np.int64)

    def _submit(self, gateway: bytes, submit: Submit) -> None:
        sequence = Sequence.from_submit(submit, gateway, self._clock())
        refusal = self._scheduler.add(sequence)
        if sequence.interrupted:
            self._catch_up.tell(self._scheduler.catching_up)  # at once: the dead router's successor starts already
        if refusal is not None:
            self._frontend.fail(gateway, submit.request_id, submit.attempt, refusal.code, refusal.message)

    def _look(self) -> None:
        """What time alone brings about: deadlines, reconnections, requests of dead gateways."""
        now = self._clock()
        if now < self._next_look_s:
            return
        self._next_look_s = now + IDLE_POLL_MS / 1000
        if now >= self._next_report_s:
            self._next_report_s = now + REPORT_S
            balance = self._exchange.dispatcher.load_balance()
            self._frontend.report(self.counters(), self.gauges(), self._exchange.passed_over, *balance)
        self._exchange.connect_missing()
        self._catch_up.tell(self._scheduler.catching_up)
        for sequence in self._scheduler.expired(now):
            self._fail(sequence, "timeout", "the request's deadline has passed")
        for flight in self._parking.look(now):
            self._go_on(flight)
        if self._frontend.gone:
            gone, self._frontend.gone = self._frontend.gone, set()
            queued = [*self._scheduler.waiting, *self._scheduler.running]
            abandoned = [s for s in queued if s.gateway in gone and s.status is not Status.FINISHED]
            logger.warning("a gateway's connection is gone: %d requests of it are aborted", len(abandoned))
            for sequence in abandoned:
                self._scheduler.cancel(sequence)

    def _start(self) -> None:
        """Fill up the micro-batches in flight; parked ones do not count.

        At first nothing is begun before the servers of the plan have answered: all that waits would be parked, and then
        go through the layers at once, each row as late as the last.
        """
        if not self._acquainted:
            self._acquainted = self._exchange.acquainted
            if not self._acquainted:
                return
        while len(self._flights) < self._micro_batches and (batch := self._scheduler.schedule()) is not None:
            flight = Flight(self._decoder, batch.items, self._threads, self._clock())
            self._flights.add(flight)
            self.forwards += 1
            self.forward_rows += flight.rows
            self._to_experts(flight)

    # --- a flight through the layers ---

    def _to_experts(self, flight: Flight) -> None:
        launched = flight.launch()
        if launched is None:
            self._reached(flight)
        else:
            self._launched.append((launched, flight))

    def _reached(self, flight: Flight) -> None:
        """The gate of this layer has chosen."""
        flight.expert_rows.begin_layer()
        if self._loads.size:
            counts = np.bincount(flight.topk_ids.reshape(-1), minlength=self._loads.shape[1])
            self._loads[flight.layer] += counts
            self._exchange.dispatcher.balance.chosen(flight.layer, counts)
        self._exchange.submit(flight)

    def _advance(self, finished: Finished) -> None:
        flight: Flight = finished.micro_batch
        if len(finished.poisoned):
            for sequence in flight.sequences_of(finished.poisoned):
                self._fail(sequence, "poison", "this request was being computed at several failures in a row")
        if not len(finished.missing):
            self._pass(flight)
            return
        self._flights.discard(flight)
        rest = self._parking.park(flight, finished.missing, finished.deaths, self._clock())
        if rest is not None:
            self._go_on(rest)

    def _go_on(self, flight: Flight) -> None:
        """Rows that are out of the parking, or were never in it."""
        self._flights.add(flight)
        self._pass(flight)

    def _pass(self, flight: Flight) -> None:
        """The experts of this layer are done."""
        if flight.after_experts():
            self._land(flight)
        else:
            self._to_experts(flight)

    def _land(self, flight: Flight) -> None:
        """The last layer is done: sample, report, and free what has ended."""
        self._flights.discard(flight)
        for item, rows in zip(flight.items, flight.renormalized_rows(), strict=True):
            item.sequence.renormalized += rows
            item.sequence.shareable &= not rows
            self.tokens_renormalized += rows
        self._score_prompts(flight)  # first: who fails by that is not sampled from
        chunks = self._scheduler.complete(flight.items)
        if chunks:
            sequences = [chunk.sequence for chunk in chunks]
            logits = flight.logits(flight.last_rows(chunks))
            for sequence, sampled in zip(sequences, self._sampler(logits, sequences), strict=True):
                self._emit(sequence, sampled)
            self._frontend.flush()
        if not flight.was_parked:
            shape = flight.batch
            self._scheduler.cost.record(shape.decode_rows, shape.prefill_tokens, self._clock() - flight.started_s)

    def _score_prompts(self, flight: Flight) -> None:
        """Send what this flight has of the log-probabilities of prompts whose requests ask for them."""
        if not any(item.sequence.scores_prompt for item in flight.items):
            return
        for item, first in zip(flight.items, flight.first_rows, strict=True):
            for rows in prompt_logprobs.parts(item):
                scores = prompt_logprobs.score(flight.logits([first + row for row in rows]), item, rows)
                if scores is None:
                    self._fail(item.sequence, "internal", NOT_FINITE)
                    break
                self._frontend.send(item.sequence.gateway, scores)

    def _emit(self, sequence: Sequence, sampled: Sampled | None) -> None:
        if sampled is None:
            self._fail(sequence, "internal", NOT_FINITE)
            return
        position = len(sequence.output)
        reason = self._scheduler.update(sequence, sampled.token_id)
        token = Token(
            sequence.request_id, sequence.attempt, position, sampled.token_id, reason, sampled.logprob,
            sampled.top_ids, sampled.top_logprobs, sampled.logits_digest, sequence.renormalized,
        )  # fmt: skip
        sequence.renormalized = 0
        self._frontend.add(sequence.gateway, token)

    # --- experts without a live replica ---

    def _retry_parked(self) -> None:
        """The routes have changed: send what is missing, as far as that is possible now."""
        for flight in self._parking.retry():
            self._flights.add(flight)
            self._exchange.submit(flight, flight.missing, flight.missing_deaths)

    def _fail_missing(self, sequence: Sequence, message: str) -> None:
        self.requests_without_replica += sequence.status is not Status.FINISHED
        self._fail(sequence, "no_replica", message)

    def _drop(self, flight: Flight) -> None:
        """Nobody waits for this flight any more: free what it holds."""
        self._scheduler.complete(flight.items)
        self.forwards_dropped += 1

    def _fail(self, sequence: Sequence, code: str, message: str) -> None:
        """End a request with an error, once. In flight, its rows go on as tombstones."""
        if sequence.status is not Status.FINISHED:
            self._scheduler.cancel(sequence)
            self._frontend.fail(sequence.gateway, sequence.request_id, sequence.attempt, code, message)
