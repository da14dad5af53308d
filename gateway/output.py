"""From the tokens of one choice to what its client sees: text without stop strings, token ids, the finish reason."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.journal import Record, Scored
from gateway.model import Model
from gateway.request import Options
from gateway.stop_strings import StopStrings
from moering.protocol import Token


@dataclass(slots=True)
class Delta:
    """What is new of one choice since the last delta."""

    text: str = ""
    prompt: list[Scored] = field(default_factory=list)  # in the first delta, where it is echoed with log-probabilities
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None


class ChoiceOutput:
    """One choice of a request. `push` its tokens, `take` what can be sent."""

    def __init__(self, index: int, record: Record, model: Model, options: Options, echo: str = "") -> None:
        """`echo`: what the text begins with."""
        self.index = index
        self.record = record
        self.completion_tokens = 0
        self.renormalized_tokens = 0  # positions of prompt and answer computed without some of their experts
        self.finish_reason: str | None = None
        self._detokenizer = model.detokenizer(options.skip_special_tokens)
        self._stops = StopStrings(options.stop)
        self._delta = Delta(echo)
        self._echo_only = options.max_tokens == 0

    def push(self, token: Token) -> None:
        """Add the next token. Afterwards `finish_reason` is set if it was the last, also by a stop string."""
        if token.position == 0 and self.record.sampling.prompt_logprobs:
            self._delta.prompt = self._scored_prompt()
        self.renormalized_tokens += token.renormalized
        if self._echo_only:  # a router generates at least one token
            self.finish_reason = "length"
            return
        self.completion_tokens += 1
        last = token.finish_reason is not None
        # The token that ends the text is not part of it, whichever it is.
        text = "" if token.finish_reason == "stop" else self._detokenizer.push(token.token_id)
        if last:
            text += self._detokenizer.finish()
        searched = last or self.completion_tokens > self.record.sampling.min_tokens
        self._delta.text += self._stops.push(text) if searched else self._stops.skip(text)
        self._delta.tokens.append(token)
        if self._stops.hit is not None:
            self.finish_reason = "stop"
        elif last:
            self._delta.text += self._stops.finish()
            self.finish_reason = token.finish_reason

    def _scored_prompt(self) -> list[Scored]:
        prompt, scored = self.record.prompt, self.record.prompt_logprobs
        if len(scored) != len(prompt) - 1:
            raise ValueError(f"log-probabilities of {len(scored)} of {len(prompt) - 1} tokens of a prompt")
        return [Scored(prompt[0]), *scored]

    def take(self) -> Delta:
        """All that is new; the caller sends it."""
        delta, self._delta = self._delta, Delta()
        delta.finish_reason = self.finish_reason
        return delta
