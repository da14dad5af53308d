"""From the JSON body to what a router needs: the fields that chat and completions share."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from typing import Any

from gateway import fields
from gateway.errors import bad_request
from gateway.fields import Body
from moering.protocol import MISSING_EXPERT_POLICIES, Sampling

MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20
REPETITION_PENALTY = (1e-3, 1e3)  # beyond, logits overflow
_EXTENSION = ("logits_digest", "on_missing_expert")  # the fields of 'moering'

# Fields that other servers implement and this one does not: refused unless they ask for nothing.
_UNIMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "best_of": (1,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "continue_final_message": (False,),
    "chat_template": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}


@dataclass(frozen=True, slots=True)
class Options:
    """What one HTTP request asks for, apart from its prompts."""

    n: int
    echo: bool  # the prompt's text first, and its log-probabilities where the answer has them
    stream: bool
    include_usage: bool
    stop: tuple[str, ...]
    max_tokens: int | None  # None: up to the context's end; 0: nothing but the echo
    skip_special_tokens: bool
    return_token_ids: bool
    sampling: Sampling  # of choice 0; max_tokens is filled in when the prompt is known

    def sampling_for(self, choice: int, prompt_tokens: int, context_tokens: int) -> Sampling:
        """The sampling of one choice of a prompt, or a 400 when prompt and answer do not fit the context."""
        room = context_tokens - prompt_tokens
        wanted = room if self.max_tokens is None else self.max_tokens
        if room < 1 or wanted > room:
            asked = f"{prompt_tokens} in the prompt" + (f", {wanted} in the answer" if self.max_tokens else "")
            raise bad_request(
                f"This model's maximum context length is {context_tokens} tokens; the request needs more ({asked}).",
                "messages" if self.max_tokens is None else "max_tokens",
                "context_length_exceeded",
            )
        wanted = max(wanted, 1)  # a router generates at least one
        min_tokens = min(self.sampling.min_tokens, wanted)
        return dataclasses.replace(self.sampling, choice=choice, max_tokens=wanted, min_tokens=min_tokens)


def parse_options(body: Body, chat: bool, vocab_size: int, eos_ids: tuple[int, ...], max_choices: int) -> Options:
    """Check all fields but the prompt; raise `ApiError` naming the first that is wrong."""
    refuse_unimplemented(body)
    stream = fields.boolean(body, "stream", False)
    echo = _echo(body, chat)
    max_tokens = _max_tokens(body, chat, echo)
    logprobs = _chat_logprobs(body) if chat else fields.integer(body, "logprobs", -1, 0, MAX_LOGPROBS)
    extension = _extension(body)
    min_tokens = fields.integer(body, "min_tokens", 0, 0)
    stop_token_ids = _stop_token_ids(body, vocab_size, eos_ids)
    if min_tokens and len(stop_token_ids) >= vocab_size:
        raise bad_request("'min_tokens' leaves no token: all that the model has are stop ids", "min_tokens")
    return Options(
        n=fields.integer(body, "n", 1, 1, max_choices),
        echo=echo,
        stream=stream,
        include_usage=_include_usage(body, stream),
        stop=_stop_strings(body.get("stop")),
        max_tokens=max_tokens,
        skip_special_tokens=fields.boolean(body, "skip_special_tokens", True),
        return_token_ids=fields.boolean(body, "return_token_ids", False),
        sampling=Sampling(
            max_tokens=0 if max_tokens is None else max_tokens,
            min_tokens=min_tokens,
            temperature=fields.number(body, "temperature", 1.0, 0.0),
            top_k=max(0, fields.integer(body, "top_k", 0, -1)),
            top_p=fields.number(body, "top_p", 1.0, 0.0, 1.0, above=True),
            min_p=fields.number(body, "min_p", 0.0, 0.0, 1.0),
            presence_penalty=fields.number(body, "presence_penalty", 0.0, -2.0, 2.0),
            frequency_penalty=fields.number(body, "frequency_penalty", 0.0, -2.0, 2.0),
            repetition_penalty=fields.number(body, "repetition_penalty", 1.0, *REPETITION_PENALTY),
            logit_bias=_logit_bias(body, vocab_size),
            seed=_seed(body),
            stop_token_ids=stop_token_ids,
            logprobs=logprobs,
            logits_digest=fields.boolean(extension, "logits_digest", False),
            on_missing_expert=_on_missing_expert(extension),
            prompt_logprobs=echo and logprobs >= 0,
        ),
    )


def refuse_unimplemented(body: Body) -> None:
    """A known field that would be ignored is an error, so that nobody relies on it."""
    for name, neutral in _UNIMPLEMENTED.items():
        value = body.get(name)
        if value is not None and not any(type(value) is type(v) and value == v for v in neutral):
            raise bad_request(f"'{name}' is not implemented by this server", name, "unsupported_parameter")


def _echo(body: Body, chat: bool) -> bool:
    echo = fields.boolean(body, "echo", False)
    if echo and chat:
        raise bad_request("'echo' is not implemented by this server for chat", "echo", "unsupported_parameter")
    return echo


def _max_tokens(body: Body, chat: bool, echo: bool) -> int | None:
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    if chat and body.get(name) is None:
        return None
    return fields.integer(body, name, 16, 0 if echo else 1)


def _include_usage(body: Body, stream: bool) -> bool:
    if body.get("stream_options") is not None and not stream:
        raise bad_request("'stream_options' is allowed only with 'stream': true", "stream_options")
    stream_options = fields.mapping(body, "stream_options")
    if stream_options.get("continuous_usage_stats"):
        raise bad_request("'continuous_usage_stats' is not implemented by this server", "stream_options")
    return fields.boolean(stream_options, "include_usage", False)


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if type(strings) is not list or not all(isinstance(s, str) for s in strings):
        raise bad_request("'stop' must be a string or a list of strings", "stop")
    if len(strings) > MAX_STOP_STRINGS or any(not 0 < len(s) <= MAX_STOP_CHARS for s in strings):
        text = f"'stop' takes at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARS} characters"
        raise bad_request(text, "stop")
    return tuple(strings)


def _stop_token_ids(body: Body, vocab_size: int, eos_ids: tuple[int, ...]) -> list[int]:
    asked = fields.token_ids(body.get("stop_token_ids") or [], "stop_token_ids", vocab_size)
    ignore_eos = fields.boolean(body, "ignore_eos", False)
    return sorted(set(asked) | (set() if ignore_eos else set(eos_ids)))


def _seed(body: Body) -> int:
    """The client's seed, or one drawn now: a request that moves to another router must go on with the same."""
    seed = fields.integer(body, "seed", secrets.randbits(63), -(1 << 63), (1 << 64) - 1)
    return seed & ((1 << 63) - 1)


def _logit_bias(body: Body, vocab_size: int) -> dict[int, float]:
    bias = {}
    for key, value in fields.mapping(body, "logit_bias").items():
        if not key.isascii() or not key.isdigit() or len(key) > 9 or int(key) >= vocab_size:
            raise bad_request("the keys of 'logit_bias' must be token ids of the model", "logit_bias")
        if type(value) not in (int, float):
            raise bad_request("the values of 'logit_bias' must be numbers", "logit_bias")
        bias[int(key)] = fields.finite(value, "logit_bias", -100.0, 100.0)
    return bias


def _chat_logprobs(body: Body) -> int:
    wanted = fields.boolean(body, "logprobs", False)
    top = fields.integer(body, "top_logprobs", 0, 0, MAX_LOGPROBS)
    if top and not wanted:
        raise bad_request("'top_logprobs' needs 'logprobs': true", "top_logprobs")
    return top if wanted else -1


def _extension(body: Body) -> Body:
    """Our own object of a request. Nobody else's client sends it, so a name that is unknown there is a mistake."""
    extension = fields.mapping(body, "moering")
    unknown = [str(name)[:40] for name in extension if name not in _EXTENSION]
    if unknown:
        raise bad_request(f"'moering' has no field {unknown[0]!r}; there are {', '.join(_EXTENSION)}", "moering")
    return extension


def _on_missing_expert(extension: Body) -> str:
    value = extension.get("on_missing_expert")
    if value is None:
        return "wait"
    if value not in MISSING_EXPERT_POLICIES:
        policies = ", ".join(f"'{p}'" for p in MISSING_EXPERT_POLICIES)
        raise bad_request(f"'moering.on_missing_expert' must be one of {policies}", "moering")
    return str(value)
