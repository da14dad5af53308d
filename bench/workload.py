"""What is sent, and when: prompts, lengths and arrival times, all drawn from seeds so that a run can be repeated."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Short words that common tokenizers keep whole, so that a text of n words is close to n tokens.
_TEXT = (
    "the a of and to in is it that was for on are as with his they at be this from have or by one had not but what "
    "all were when we there can an your which their said if do will each about how up out them then she many some "
    "so these would other into has more her two like him see time could no make than first been its who now people "
    "my made over did down only way find use may water long little very after words called just where most know"
)


@dataclass(frozen=True)
class Lengths:
    """A fixed length in tokens, or a uniform choice from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read "128" or "64-256"; raises `ValueError`."""
        low, _, high = text.partition("-")
        lengths = cls(int(low), int(high or low))
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError(f"{text!r} is not a length of at least 1, nor a range of them like 64-256")
        return lengths

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return rng.randint(self.low, self.high)


@dataclass(frozen=True)
class Workload:
    """A seeded, endless list of requests. Request `index` is the same whatever was drawn before it.

    With `vocab_size` prompts of the completions API are lists of token ids below it, else they are text of about the
    wanted length. `extra` is merged into each body.
    """

    api: str
    model: str
    prompt: Lengths
    output: Lengths
    seed: int
    stream: bool = True
    temperature: float = 0.0
    vocab_size: int | None = None
    ignore_eos: bool = False

    def body(self, index: int) -> dict[str, Any]:
        """The JSON of request `index`."""
        rng = random.Random(f"{self.seed}/{index}")
        body: dict[str, Any] = {"model": self.model, "temperature": self.temperature, "stream": self.stream}
        body |= self._prompt(rng)
        body["max_tokens"] = self.output.draw(rng)
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        if self.temperature > 0:
            body["seed"] = rng.randrange(1 << 31)
        if self.ignore_eos:
            body["ignore_eos"] = True
        return body

    def _prompt(self, rng: random.Random) -> dict[str, Any]:
        length = self.prompt.draw(rng)
        if self.api == "completions" and self.vocab_size:
            return {"prompt": [rng.randrange(self.vocab_size) for _ in range(length)]}
        text = " ".join(rng.choices(_TEXT.split(), k=length))
        return {"messages": [{"role": "user", "content": text}]} if self.api == "chat" else {"prompt": text}


def poisson_times(rate_per_s: float, seed: int) -> Iterator[float]:
    """Endless arrival times of an open loop, in seconds from its start: gaps are exponential with mean 1 / rate."""
    rng = random.Random(f"arrivals/{seed}")
    return itertools.accumulate(rng.expovariate(rate_per_s) for _ in itertools.count())
