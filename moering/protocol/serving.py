"""Messages that serve requests: every connection's hello, router and expert server, gateway and router."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from moering.protocol.frames import message

# --- every connection ------------------------------------------------------------------------------------------------


@message("hello")
@dataclass(frozen=True, slots=True)
class Hello:
    """First message of the connecting side. A mismatch of model or digest is refused with both values named."""

    server_id: str
    incarnation: int
    model: str
    digest: str  # of the checkpoint; "" where the peer does not read one (gateway)
    shared_rows: str = ""  # from a router: memory that it offers to share (`moering.shared_rows`)
    shared_slots: int = 0  # and how many slots it needs there
    dtype: str = "float32"  # that a router would like rows to have, if that is what the server computes in
    doorbell: str = ""  # pipes for the messages about rows in shared memory (`moering.doorbell`)

    def asks_for_another(self, server_id: str, model: str, digest: str) -> str:
        """The reason with which the server of this id, model and digest refuses."""
        return (
            f"{server_id} serves {model} with digest {digest:.16}…, "
            f"{self.server_id} asks for {self.model} with digest {self.digest:.16}…"
        )


@message("welcome")
@dataclass(frozen=True, slots=True)
class Welcome:
    """The bound side accepts.

    `credit_rows` bounds the rows that may be outstanding at once, `max_rows` the pairs of one message.
    """

    server_id: str
    incarnation: int
    credit_rows: int
    max_rows: int
    slot_rows: int = 0  # what a slot of the memory offered with hello holds in each direction; 0: it is not used
    dtype: str = "float32"  # of all rows of this connection, both ways
    doorbell: bool = False  # whether the pipes offered with hello are used


@message("refused")
@dataclass(frozen=True, slots=True)
class Refused:
    """The bound side will not work with the sender; `fatal` means that asking again cannot help."""

    reason: str
    fatal: bool


@message("failed")
@dataclass(frozen=True, slots=True)
class Failed:
    """One request or dispatch ended with an error. `code` is machine-readable, `message` is for a person."""

    request_id: str  # or, from an expert server, "router_incarnation/sequence"
    attempt: int
    code: str  # "bad_request" | "context_length" | "no_replica" | "timeout" | "poison" | "internal" | "overloaded"
    message: str


# --- router ⇄ expert server ------------------------------------------------------------------------------------------


@message("not_here")
@dataclass(frozen=True, slots=True)
class NotHere:
    """The server does not hold an expert of the dispatch. `epoch` is that of the newest plan it knows."""

    router: int
    seq: int
    incarnation: int
    epoch: int


# --- gateway ⇄ router ------------------------------------------------------------------------------------------------


MISSING_EXPERT_POLICIES = ("wait", "fail", "renormalize")
"""What a request does about an expert without a live replica: wait until one is loaded, end with an error, or go on
without it, the weights of the row's other experts raised to the same sum."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of one choice are drawn. Draws depend only on (seed, choice, position): a resumed request goes on.

    temperature 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 switch a filter off.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    choice: int = 0
    stop_token_ids: list[int] = dataclasses.field(default_factory=list)  # ends the request; end-of-text ids included
    logprobs: int = -1  # -1: none; 0..20: that of the token, and this many alternatives
    logits_digest: bool = False  # send a digest of the sampled logits with each token
    on_missing_expert: str = "wait"  # one of MISSING_EXPERT_POLICIES
    prompt_logprobs: bool = False  # `logprobs` also of the prompt, before the first token


@message("submit")
@dataclass(frozen=True, slots=True)
class Submit:
    """A request, or its continuation on another router: then `emitted` holds what the client already has."""

    request_id: str
    attempt: int
    prompt: list[int]
    emitted: list[int]
    sampling: Sampling
    deadline_s: float  # seconds from receipt


@message("abort")
@dataclass(frozen=True, slots=True)
class Abort:
    """Nobody waits for this request any more."""

    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token. `position` counts generated tokens from 0; the gateway takes only the next one, once."""

    request_id: str
    attempt: int
    position: int
    token_id: int
    finish_reason: str | None = None  # "stop" | "length" on the last token
    logprob: float | None = None
    top_ids: list[int] = dataclasses.field(default_factory=list)
    top_logprobs: list[float] = dataclasses.field(default_factory=list)
    logits_digest: str | None = None
    renormalized: int = 0  # positions computed without some of their experts since the token before, or the start


@message("tokens")
@dataclass(frozen=True, slots=True)
class Tokens:
    """All tokens that one step produced for one gateway."""

    tokens: list[Token]


@message("prompt_logprobs")
@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of some of a prompt's tokens, those from position `start` ≥ 1 on: the first token has none.

    They come in order and before the first `Token`, from the start again when the prompt is computed again. For each
    token as in `Token`: its own, and as many alternatives as the request asked for.
    """

    request_id: str
    attempt: int
    start: int
    logprobs: list[float]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]


@message("router_stats")
@dataclass(frozen=True, slots=True)
class RouterStats:
    """What a router counts since its start, and its gauges of now, for its gateways to show. Sent every second."""

    server_id: str
    counters: dict[str, float]
    gauges: dict[str, float]
    passed_over: dict[str, str] = dataclasses.field(default_factory=dict)  # expert server id → why others come first
    expert_balance: list[float] = dataclasses.field(default_factory=list)  # max/mean of rows per layer, of late;
    server_balance: list[float] = dataclasses.field(default_factory=list)  # 0 for a layer without any
