"""Tokens/s against transformers' `generate` on the same checkpoint: ``python -m bench.transformers_generate``.

moering answers over HTTP, transformers in a process of its own that is idle meanwhile; they take turns in rounds, with
the same prompts and as many new tokens, greedy. The time of both includes the prompts. transformers computes as fast as
it can here: dtype, way to compute the experts and number of threads are tried at the start, for each mode.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
from tokenizers import Tokenizer
from tqdm import tqdm

from bench.client import new_session
from bench.cluster import serving
from bench.command import Figures, checkpoint_path, run_bench, verdict
from bench.generators import Answer, Prompts, Transformers, Variant, ask_moering, transformers
from bench.load import first_model
from bench.workload import Lengths, Workload
from moering.config import option

BARS = {"one": 1.5, "sequential": 4.0, "batched": 1.5}
"""Mode of transformers → moering's least ratio: one prompt, `streams` one after the other, `streams` in one call."""

HOPELESS = 3
"""What is so many times slower than the fastest with one prompt is not tried with several."""


@dataclass(frozen=True)
class Config:
    """Tokens/s against transformers' generate."""

    model: str = option("default", "checkpoint directory, or 'default'")
    serve_flags: tuple[str, ...] = option((), "flags of moering serve, separated by commas")
    rounds: int = option(4, "rounds, each with all variants in turn")
    streams: int = option(8, "concurrent streams")
    prompt_tokens: int = option(32, "tokens of each prompt")
    tokens: int = option(48, "new tokens of each prompt")
    trial_tokens: int = option(8, "new tokens of the trials that choose how transformers computes")
    threads: tuple[str, ...] = option(("1", "2"), "thread counts tried for transformers")
    dtypes: tuple[str, ...] = option(("float32", "auto"), "dtypes tried for transformers; auto: that of the weights")
    experts: tuple[str, ...] = option(
        ("grouped_mm", "batched_mm", "eager"), "its ways to compute experts that are tried"
    )
    timeout: float = option(600.0, "seconds to get ready, and without a byte after which a request counts as failed")
    out: str = option("bench-transformers", "directory for transformers_generate.json and the logs")


@dataclass(frozen=True)
class Moering:
    """The cluster under test."""

    session: aiohttp.ClientSession
    url: str
    model: str

    async def generate(self, prompts: Prompts, tokens: int) -> Answer:
        """All prompts at once."""
        return await ask_moering(self.session, self.url, self.model, prompts, tokens)


async def run(config: Config) -> Figures:
    """All rounds."""
    checkpoint, out = checkpoint_path(config.model), Path(config.out)
    prompts = make_prompts(checkpoint, config)
    cluster = serving(config.model, out / "cluster.log", config.serve_flags, config.timeout)
    with transformers(checkpoint, config.dtypes, out / "transformers.log") as theirs:
        async with cluster as url, new_session(config.timeout) as session:
            ours = Moering(session, url, await first_model(session, url))
            await ours.generate(prompts[0], config.trial_tokens)  # first use of everything: not counted
            best = await _choose(config, theirs, prompts[0])
            rounds = [await _round(config, ours, theirs, best, p) for p in tqdm(prompts[1:], disable=None)]
    return {"chosen": {mode: asdict(v) for mode, v in best.items()}, "rounds": rounds, **summary(rounds)}


def make_prompts(checkpoint: Path, config: Config) -> list[Prompts]:
    """`streams` prompts of equal length for the trials, and others for each round."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    words = Lengths(2 * config.prompt_tokens, 2 * config.prompt_tokens)  # at least as many tokens as asked for
    texts = Workload("completions", "", words, Lengths(1, 1), seed=0)

    def ids(index: int) -> list[int]:
        encoded: list[int] = tokenizer.encode(texts.body(index)["prompt"]).ids[: config.prompt_tokens]
        return encoded

    n = config.streams
    return [[ids(r * n + i) for i in range(n)] for r in range(config.rounds + 1)]


async def _choose(config: Config, theirs: Transformers, prompts: Prompts) -> dict[str, Variant]:
    """The fastest variant for each mode. One prompt after the other is as one prompt."""
    found = itertools.product(config.dtypes, config.experts, map(int, config.threads))
    one: dict[Variant, float] = {}
    for variant in tqdm([Variant(*v) for v in found], desc="trials", disable=None):
        await theirs.generate(prompts[:1], 1, False, variant)  # first use of everything: not counted
        one[variant] = (await theirs.generate(prompts[:1], config.trial_tokens, False, variant)).tokens_per_s
    batched: dict[Variant, float] = {}
    for variant, speed in one.items():
        if speed * HOPELESS >= max(one.values()):
            batched[variant] = (await theirs.generate(prompts, config.trial_tokens, True, variant)).tokens_per_s
    best = max(one, key=one.__getitem__)
    return {"one": best, "sequential": best, "batched": max(batched, key=batched.__getitem__)}


async def _round(
    config: Config, ours: Moering, theirs: Transformers, best: dict[str, Variant], prompts: Prompts
) -> dict[str, Any]:
    """Figures by mode; moering's at `streams` streams count for two modes."""
    single = await ours.generate(prompts[:1], config.tokens)
    result = {"one": compare(single, await theirs.generate(prompts[:1], config.tokens, False, best["one"]))}
    many = await ours.generate(prompts, config.tokens)
    for mode in ("sequential", "batched"):
        answer = await theirs.generate(prompts, config.tokens, mode == "batched", best[mode])
        result[mode] = compare(many, answer)
    return result


def compare(ours: Answer, theirs: Answer) -> dict[str, float]:
    """Tokens/s of both, their ratio, and how many positions agree before the first difference of each prompt."""
    pairs = list(zip(ours.outputs, theirs.outputs, strict=True))
    return {
        "moering": round(ours.tokens_per_s, 2),
        "transformers": round(theirs.tokens_per_s, 2),
        "ratio": round(ours.tokens_per_s / theirs.tokens_per_s, 3),
        "equal": sum(agreeing(a, b) for a, b in pairs),
        "tokens": sum(len(a) for a, _ in pairs),
    }


def agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens are equal before the first difference; after it the two read different texts."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def summary(rounds: list[dict[str, Any]]) -> Figures:
    """By mode: medians of the speeds and of the rounds' ratios, and all equal tokens."""
    modes = {}
    for mode, bar in BARS.items():
        cells = [r[mode] for r in rounds]
        modes[mode] = {name: median(c[name] for c in cells) for name in ("moering", "transformers", "ratio")}
        modes[mode] |= {"min": min(c["ratio"] for c in cells), "max": max(c["ratio"] for c in cells), "bar": bar}
        modes[mode] |= {name: sum(c[name] for c in cells) for name in ("equal", "tokens")}
    return {"modes": modes}


def table(figures: Figures) -> str:
    """The figures in markdown."""
    lines = [
        "| transformers | moering, tokens/s | transformers | ratio (min-max) | bar | equal tokens |",
        "|---" * 6 + "|",
    ]
    for mode, m in figures["modes"].items():
        v = figures["chosen"][mode]
        name = f"{mode}: {v['dtype']}, {v['experts']}, {v['threads']} threads"
        ratio = f"{m['ratio']:.2f} ({m['min']:.2f}-{m['max']:.2f})"
        lines.append(
            f"| {name} | {m['moering']:.1f} | {m['transformers']:.1f} | {ratio} "
            f"| {m['bar']:g}: {verdict(m['ratio'] >= m['bar'])} | {m['equal']} of {m['tokens']} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_bench("transformers_generate", Config, run, table, argv)


if __name__ == "__main__":
    sys.exit(main())
