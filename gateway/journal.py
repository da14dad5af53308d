"""The journal: one record per choice, from which any router can go on. No I/O, no clock.

A record knows the prompt, the sampling state (seed and all) and the tokens that the client's stream already holds.
Token messages carry (request, attempt, position); a record takes only those of its current attempt and only the next
position, so a router that was given up, or one that repeats itself, changes nothing. Each record ends exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moering.protocol import Failed, PromptLogprobs, Sampling, Submit, Token


@dataclass(frozen=True, slots=True)
class Failure:
    """The terminal event of a choice that could not be completed."""

    code: str
    message: str


class Scored(NamedTuple):
    """A token of a prompt with its log-probability, as in `Token`; the first one has none."""

    token_id: int
    logprob: float | None = None
    top_ids: Sequence[int] = ()
    top_logprobs: Sequence[float] = ()


Event = Token | Failure
Sink = Callable[[Event], None]


@dataclass(eq=False, slots=True)
class Record:
    """One choice of one request, until its terminal event."""

    request_id: str
    prompt: list[int]
    sampling: Sampling
    deadline: float  # on the loop's clock
    sink: Sink
    attempt: int = 0  # 0: never submitted
    emitted: list[int] = field(default_factory=list)
    prompt_logprobs: list[Scored] = field(default_factory=list)  # of prompt[1:], as far as they are asked for and here
    fruitless: int = 0  # submissions since the last token
    finished: bool = False

    @property
    def to_prefill(self) -> int:
        """Tokens that the router computes before the next one comes; 0 once that is there."""
        return len(self.prompt) + len(self.emitted) if self.fruitless else 0

    def next_submit(self, now: float) -> Submit:
        """The message that starts the next attempt; what older attempts still send is void from here on."""
        self.attempt += 1
        self.fruitless += 1
        left_s = max(0.0, self.deadline - now)
        return Submit(self.request_id, self.attempt, self.prompt, list(self.emitted), self.sampling, left_s)


class Journal:
    """All open records."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self.taken_tokens = 0
        self.dropped_tokens = 0  # stale, repeated or out of order

    def __len__(self) -> int:
        return len(self._records)

    def records(self) -> list[Record]:
        """The open records, oldest first."""
        return list(self._records.values())

    def add(self, record: Record) -> None:
        """Open a record; its id must be new."""
        if record.request_id in self._records:
            raise ValueError(f"request {record.request_id} is open already")
        self._records[record.request_id] = record

    def take(self, token: Token) -> Record | None:
        """Apply a token: the record when it was the last one, else None."""
        record = self._records.get(token.request_id)
        if record is None or token.attempt != record.attempt or token.position != len(record.emitted):
            self.dropped_tokens += 1
            return None
        record.emitted.append(token.token_id)
        record.fruitless = 0
        self.taken_tokens += 1
        record.sink(token)  # before the end: a record whose sink fails can still be ended with an error
        if token.finish_reason is not None:
            self.close(record)
        return record if record.finished else None

    def take_prompt_logprobs(self, part: PromptLogprobs) -> None:
        """Add some of a prompt's log-probabilities; those from the same position on, of an earlier computation, go."""
        record = self._records.get(part.request_id)
        if record is not None and part.attempt == record.attempt:
            columns = part.logprobs, part.top_ids, part.top_logprobs
            scored = map(Scored, record.prompt[part.start :], *columns)
            record.prompt_logprobs[part.start - 1 :] = scored

    def take_failed(self, failed: Failed) -> Record | None:
        """Apply a router's failure, if it is about the current attempt."""
        record = self._records.get(failed.request_id)
        if record is None or failed.attempt != record.attempt:
            return None
        self.fail(record, failed.code, failed.message)
        return record

    def fail(self, record: Record, code: str, message: str) -> None:
        """End a record with an error, unless it has ended."""
        if self.close(record):
            record.sink(Failure(code, message))

    def close(self, record: Record) -> bool:
        """End a record. True the first time only."""
        if record.finished:
            return False
        record.finished = True
        del self._records[record.request_id]
        return True
