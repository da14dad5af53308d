"""What going on without experts costs in quality: ``python -m bench.renormalize --model default``.

Bits per byte of a fixed text against the share of the model's experts that are missing, with the router's own decoder
and its own arithmetic for missing experts (`router.missing`), in one process. Two ways to choose the missing ones:

* ``apart``: never two that one row may pick together. In the default model these are the pairs (0, 1), (2, 3), …, so
  every row keeps one of its two experts: what `renormalize` costs by itself.
* ``any``: any experts. A row that loses all of its experts would end its request; here it goes on with nothing from the
  layer, and the share of the text's tokens that meet such a layer is reported beside the figure.

Points that ``<out>/points.jsonl`` already has are not computed again, so that a run can be done in pieces.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tokenizers import Tokenizer

from bench.command import Figures, checkpoint_path, run_bench
from bench.quality_picture import draw
from moering.checkpoint import Checkpoint
from moering.config import option
from moering.errors import ConfigError
from router.attention_plan import SequenceChunk
from router.decoder import Decoder
from router.kv_cache import BLOCK_SIZE, KVCache
from router.micro_batch import MicroBatch
from router.missing import hopeless, leave_out
from tests.local_experts import LocalExperts

TEXT = Path(__file__).parents[1] / "tests" / "calibration_text.txt"
WAYS = ("apart", "any")
STEP_TOKENS = 256
Pair = tuple[int, int]
"""Layer, expert."""


@dataclass(frozen=True)
class Config:
    """Bits per byte of a text against the share of missing experts."""

    model: str = option("default", "checkpoint directory, or 'default'; experts 2p and 2p + 1 are its pairs")
    text: str = option(str(TEXT), "file with the text")
    shares: tuple[str, ...] = option(
        ("0", "1/16", "1/8", "3/16", "1/4", "3/8", "1/2"), "shares of missing experts, separated by commas"
    )
    seeds: int = option(4, "random choices of experts for each share")
    threads: int = option(1, "threads of a product of many rows")
    out: str = option("bench-renormalize", "directory for renormalize.json, points.jsonl and the picture")

    def __post_init__(self) -> None:
        if self.seeds < 1 or not all(0 <= s < 1 for s in self.fractions):
            raise ConfigError("seeds must be positive, shares at least 0 and below 1")

    @property
    def fractions(self) -> list[Fraction]:
        """The shares as numbers."""
        try:
            return [Fraction(s) for s in self.shares]
        except (ValueError, ZeroDivisionError) as e:
            raise ConfigError(f"shares: {e}") from e


@dataclass(frozen=True)
class Point:
    """One choice of missing experts. `ended` is the share of tokens with a layer of which no expert is left."""

    way: str
    share: str
    seed: int
    bits_per_byte: float
    touched: float  # share of tokens that lack at least one expert in at least one layer
    ended: float


class Experts:
    """All experts but the missing ones, as the router goes on without them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._experts = LocalExperts(checkpoint)
        self.layers, self.experts = checkpoint.num_layers, checkpoint.num_experts
        self.forget()

    def forget(self, missing: frozenset[Pair] = frozenset()) -> None:
        """Miss these from now on."""
        self._gone = torch.zeros(self.layers, self.experts, dtype=torch.bool)
        for layer, expert in missing:
            self._gone[layer, expert] = True

    def run(self, mb: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill `mb.expert_output`, and `topk_weights` anew; which rows lack an expert, and which all: bool [rows]."""
        self._experts.run(mb)
        gone = self._gone[mb.layer][mb.topk_ids]
        slots = gone.flatten().nonzero().flatten()
        lost = torch.zeros(mb.rows, dtype=torch.bool)
        lost[hopeless(mb.topk_weights, slots)] = True
        leave_out(mb.topk_weights, (gone & ~lost.unsqueeze(1)).flatten().nonzero().flatten())
        mb.expert_output[gone | lost.unsqueeze(1)] = 0.0
        return gone.any(1), lost


def choose(way: str, share: Fraction, seed: int, layers: int, experts: int) -> frozenset[Pair]:
    """The missing experts: `share` of all, to the nearest one."""
    rng, count = random.Random(f"{way}/{share}/{seed}"), round(share * layers * experts)
    if way == "any":
        return frozenset(rng.sample([(layer, e) for layer in range(layers) for e in range(experts)], count))
    pairs = rng.sample([(layer, e) for layer in range(layers) for e in range(0, experts, 2)], count)
    return frozenset((layer, e + rng.randrange(2)) for layer, e in pairs)


@torch.inference_mode()
def read(decoder: Decoder, experts: Experts, ids: list[int]) -> tuple[float, float, float]:
    """Bits of ids[1:], each given those before; the shares of ids that lack an expert somewhere, and all of a layer."""
    bits, touched, ended = 0.0, 0, 0
    table = list(range(-(-len(ids) // BLOCK_SIZE)))
    for start in range(0, len(ids), STEP_TOKENS):
        part = ids[start : start + STEP_TOKENS]
        mb = decoder.start(part, [SequenceChunk(table, start, len(part))])
        lacks, lost = torch.zeros(len(part), dtype=torch.bool), torch.zeros(len(part), dtype=torch.bool)
        for _ in range(experts.layers):
            decoder.until_experts(mb)
            some, all_ = experts.run(mb)
            lacks, lost = lacks | some, lost | all_
            decoder.after_experts(mb)
        following = torch.tensor(ids[start + 1 : start + len(part) + 1])
        logprobs = torch.log_softmax(decoder.logits(mb, list(range(len(following)))).double(), 1)
        bits -= float(logprobs.gather(1, following.unsqueeze(1)).sum()) / 0.6931471805599453
        touched, ended = touched + int(lacks.sum()), ended + int(lost.sum())
    return bits, touched / len(ids), ended / len(ids)


async def run(config: Config) -> Figures:
    """Compute what is not there yet."""
    torch.set_num_threads(config.threads)
    path, out = checkpoint_path(config.model), Path(config.out)
    points = list(_measure(config, path, out / "points.jsonl"))
    draw(points, out / "renormalize.png")
    return {"points": [dataclasses.asdict(p) for p in points], "rows": summary(points)}


def _measure(config: Config, path: Path, file: Path) -> Iterator[Point]:
    known = [Point(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(p.way, p.share, p.seed): p for p in known}
    wanted = [(way, share, seed) for way in WAYS for share in config.shares for seed in range(config.seeds)]
    wanted = [w for w in wanted if Fraction(w[1]) or w[2] == 0]  # nothing missing is the same for every seed
    if all(w in done for w in wanted):
        yield from (done[w] for w in wanted)
        return
    checkpoint, tokenizer = Checkpoint(path), Tokenizer.from_file(str(path / "tokenizer.json"))
    ids = tokenizer.encode(Path(config.text).read_text()).ids
    size = len(tokenizer.decode(ids[1:]).encode())
    layout = checkpoint.layout
    cache = KVCache(layout.num_layers, layout.num_kv_heads, layout.head_dim, -(-len(ids) // BLOCK_SIZE))
    decoder, experts = Decoder(checkpoint, cache), Experts(checkpoint)
    for way, share, seed in wanted:
        if (way, share, seed) not in done:
            experts.forget(choose(way, Fraction(share), seed, experts.layers, experts.experts))
            bits, touched, ended = read(decoder, experts, ids)
            point = done[way, share, seed] = Point(way, share, seed, bits / size, touched, ended)
            with file.open("a") as f:
                f.write(json.dumps(dataclasses.asdict(point)) + "\n")
        yield done[way, share, seed]


def summary(points: list[Point]) -> list[dict[str, Any]]:
    """Per way and share, over the seeds."""
    rows = []
    for way, share in dict.fromkeys((p.way, p.share) for p in points):
        mine = [p for p in points if (p.way, p.share) == (way, share)]
        bits = [p.bits_per_byte for p in mine]
        rows.append(
            {
                "way": way,
                "share": share,
                "bits_per_byte": [round(v, 3) for v in (mean(bits), min(bits), max(bits))],
                "touched": round(mean(p.touched for p in mine), 3),
                "ended": round(mean(p.ended for p in mine), 3),
            }
        )
    return rows


def table(figures: Figures) -> str:
    """The figures in markdown."""
    lines = [
        "| missing | choice | bits per byte, mean (min-max) | tokens that lack an expert | that lack all of a layer |",
        "|---|---|---|---|---|",
    ]
    for row in figures["rows"]:
        average, low, high = row["bits_per_byte"]
        shares = f"{100 * row['touched']:.0f} % | {100 * row['ended']:.0f} %"
        lines.append(f"| {row['share']} | {row['way']} | {average:.3f} ({low:.3f}-{high:.3f}) | {shares} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_bench("renormalize", Config, run, table, argv)


if __name__ == "__main__":
    sys.exit(main())
