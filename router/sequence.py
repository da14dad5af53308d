"""One request inside the router: its tokens, how far they are computed, and what would make it unacceptable."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from moering.protocol import MISSING_EXPERT_POLICIES, Sampling, Submit


class Status(enum.Enum):
    """WAITING: holds no blocks. RUNNING: holds blocks. FINISHED: ended; still holds its blocks while in flight."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False, slots=True)
class Sequence:
    """A request and its progress.

    `output` starts as what the client already has (a request resumed from another router), so the next token's
    position is `len(output)` and penalties, limits and the prompt's length are what they would have been there. The
    fields from `status` on are the scheduler's and its prefix cache's, but for `shareable`, which the engine clears.
    """

    request_id: str
    attempt: int
    gateway: bytes  # zmq identity of the gateway that asked
    prompt: list[int]
    output: list[int]
    sampling: Sampling
    deadline: float  # on the caller's clock
    renormalized: int = 0  # positions computed without some of their experts since the last token was sent
    status: Status = Status.WAITING
    finish_reason: str | None = None  # "stop" | "length"; None while it runs and when it was cancelled
    num_computed: int = 0  # leading tokens whose keys and values are in the cache
    block_table: list[int] = field(default_factory=list)
    in_flight: bool = False  # between schedule() and complete(): its rows may wait for an expert
    shareable: bool = True  # False for good once its keys and values are not those of its tokens (renormalised)
    block_keys: list[bytes] = field(default_factory=list)  # names of its first full blocks, as far as computed
    arrival: int = 0  # order of admission to the scheduler; decides who is served and who is preempted

    @classmethod
    def from_submit(cls, submit: Submit, gateway: bytes, now: float) -> Sequence:
        """The sequence that `submit`, received at `now`, asks for."""
        return cls(
            request_id=submit.request_id,
            attempt=submit.attempt,
            gateway=gateway,
            prompt=submit.prompt,
            output=list(submit.emitted),
            sampling=submit.sampling,
            deadline=now + submit.deadline_s,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: prompt and output."""
        return len(self.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Known tokens still to be computed. The last of them yields the next token."""
        return self.num_tokens - self.num_computed

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of its prompt are asked for, and still to be sent: before the first token."""
        return self.sampling.prompt_logprobs and not self.output and self.status is not Status.FINISHED

    @property
    def decodes(self) -> bool:
        """Whether its next chunk is one ordinary decode step."""
        return self.remaining == 1 and bool(self.output)

    @property
    def interrupted(self) -> bool:
        """Whether its client has tokens of it, and its keys and values have to be computed again before the next."""
        return self.remaining > 1 and bool(self.output)

    def tokens(self, start: int, length: int) -> list[int]:
        """Token ids at positions [start, start + length)."""
        split, end = len(self.prompt), start + length
        return self.prompt[start:end] + self.output[max(start - split, 0) : max(end - split, 0)]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a sequence cannot be served; `code` is one of those of `protocol.Failed`."""

    code: str
    message: str


def check(sequence: Sequence, vocab_size: int, max_model_len: int) -> Refusal | None:
    """The reason to refuse `sequence`, or None. Gateways check too: this keeps one bad peer from hurting a batch."""
    s = sequence.sampling
    ids = (sequence.prompt, sequence.output, s.stop_token_ids, s.logit_bias)
    wrong = [
        (not sequence.prompt, "the prompt is empty"),
        (any(i and (min(i) < 0 or max(i) >= vocab_size) for i in ids), f"a token id is not within 0..{vocab_size - 1}"),
        (s.max_tokens <= len(sequence.output), f"max_tokens {s.max_tokens} leaves nothing to generate"),
        (s.temperature < 0, f"temperature {s.temperature} is negative"),
        (not 0 < s.top_p <= 1, f"top_p {s.top_p} is not within (0, 1]"),
        (not 0 <= s.min_p <= 1, f"min_p {s.min_p} is not within [0, 1]"),
        (s.top_k < 0, f"top_k {s.top_k} is negative"),
        (s.repetition_penalty <= 0, f"repetition_penalty {s.repetition_penalty} is not positive"),
        (not -1 <= s.logprobs <= 20, f"logprobs {s.logprobs} is not within -1..20"),
        (s.prompt_logprobs and s.logprobs < 0, "prompt_logprobs are asked for without logprobs"),
        (
            s.on_missing_expert not in MISSING_EXPERT_POLICIES,
            f"on_missing_expert {s.on_missing_expert!r:.40} is not one of {', '.join(MISSING_EXPERT_POLICIES)}",
        ),
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            return Refusal("bad_request", message)
    if sequence.num_tokens >= max_model_len:
        have = f"{sequence.num_tokens} tokens leave no room"
        return Refusal("context_length", f"{have}; the maximum context length is {max_model_len}")
    return None
