"""``python -m bench.hot_experts``: how even hot experts leave the servers of a layer, simulated up to 64 servers.

Compared are the plan of `moering.ring`, the consistent-hash ring alone, and EPLB's published greedy rule (DeepSeek,
"Expert Parallelism Load Balancer", github.com/deepseek-ai/EPLB, README; written anew from its description: give a
replica more to the expert with the largest load per replica until all places are taken, then pack the replicas, the
heaviest first, each on the least loaded server that has a place). All have room for 25 % more than two replicas of
each expert. The ring and EPLB's rule divide an expert's tokens evenly over its replicas. Only arithmetic: the figures
follow from the seed, on whatever machine.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moering.balance import max_over_mean, server_loads
from moering.config import option, parse
from moering.drift import MOVED_SHARE, TOLERATED
from moering.ring import Member, Plan, plan
from moering.ring_board import server_seed, walk_order

REPLICATION, ROOM = 2, 1.25
Row = dict[str, float | int | str]
Rule = Callable[[Plan | None, np.ndarray, int], Plan]
"""(the plan before, tokens [layers, experts], servers) → the plan."""


@dataclass(frozen=True)
class Config:
    """Simulate the balance of hot experts, and write a table and a picture."""

    servers: str = option("4,8,16,32,64", "numbers of servers")
    layers: int = option(8, "MoE layers")
    experts: int = option(256, "experts of a layer")
    zipf: float = option(1.0, "exponent of the popularity")
    steps: int = option(10, "times that the popularity drifts")
    drift: float = option(0.2, "standard deviation of the logarithm of an expert's popularity, per step")
    seed: int = option(0, "of the random numbers")
    output: str = option("docs/hot-experts.md", "page to write; the picture goes to pictures/ beside it")


def members(servers: int, pairs: int) -> list[Member]:
    """Servers that together have room for `ROOM` times all replicas."""
    return [Member(f"s{i}", int(np.ceil(ROOM * REPLICATION * pairs / servers))) for i in range(servers)]


def ours(previous: Plan | None, tokens: np.ndarray, servers: int) -> Plan:
    """What the coordinator does: a plan at the start, later only if a layer is out of balance (`moering.drift`)."""
    if previous is not None and imbalance(previous, tokens).max() <= TOLERATED:
        return previous
    moves = 0 if previous is None else max(2, int(MOVED_SHARE * REPLICATION * tokens.size))
    layers, experts = tokens.shape
    return plan(previous, members(servers, tokens.size), tokens, REPLICATION, layers, experts, moves)


def ring_alone(previous: Plan | None, tokens: np.ndarray, servers: int) -> Plan:
    """The first servers of each expert's walk, whatever the popularity."""
    names = tuple(f"s{i}" for i in range(servers))
    seeds = np.array([server_seed(name) for name in names], np.uint64)
    rows = np.stack([walk_order(seeds, layer, tokens.shape[1])[:, :REPLICATION] for layer in range(len(tokens))])
    return Plan(names, rows.astype(np.int16), np.full(tokens.shape, REPLICATION, np.uint8))


def eplb_rule(previous: Plan | None, tokens: np.ndarray, servers: int) -> Plan:
    """Replicas by load, packed by least load, from scratch each time. See the module."""
    experts = tokens.shape[1]
    places = int(ROOM * REPLICATION * experts) // servers
    packed = [_pack(layer, _replicate(layer, places * servers, servers), places, servers) for layer in tokens]
    width = max(len(row) for rows in packed for row in rows)
    replicas = np.array([[row + [-1] * (width - len(row)) for row in rows] for rows in packed], np.int16)
    return Plan(tuple(f"s{i}" for i in range(servers)), replicas, (replicas >= 0).sum(axis=2).astype(np.uint8))


def _replicate(tokens: np.ndarray, places: int, most: int) -> list[int]:
    copies = [1] * len(tokens)
    heap = [(-float(load), expert) for expert, load in enumerate(tokens)]
    heapq.heapify(heap)
    left = places - len(tokens)
    while left and heap:
        _, expert = heapq.heappop(heap)
        copies[expert] += 1
        left -= 1
        if copies[expert] < most:
            heapq.heappush(heap, (-float(tokens[expert]) / copies[expert], expert))
    return copies


def _pack(tokens: np.ndarray, copies: list[int], places: int, servers: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in copies]
    load, room = [0.0] * servers, [places] * servers
    for expert in sorted(range(len(copies)), key=lambda e: (-tokens[e] / copies[e], e)):
        for _ in range(copies[expert]):
            able = [s for s in range(servers) if room[s] and s not in rows[expert]]
            if not able:
                break  # its places are on servers that have the expert: a copy less
            server = min(able, key=lambda s: (load[s], s))
            rows[expert].append(server)
            load[server] += float(tokens[expert]) / copies[expert]
            room[server] -= 1
    return rows


RULES: dict[str, Rule] = {"ours": ours, "ring alone": ring_alone, "EPLB's rule": eplb_rule}


def imbalance(p: Plan, tokens: np.ndarray) -> np.ndarray:
    """Max/mean of tokens per server, [layers]."""
    return max_over_mean(server_loads(p.replicas, p.ways, tokens, len(p.servers)))


def moved(before: Plan, after: Plan) -> int:
    """Replicas that servers have to load."""
    return sum(int((after.mask_of(s) & ~before.mask_of(s)).sum()) for s in after.servers)


def drifting(config: Config) -> list[np.ndarray]:
    """The popularity at the start and after each step."""
    rng = np.random.default_rng(config.seed)
    rank = (np.arange(config.experts) + 1.0) ** -config.zipf
    tokens = [np.stack([rng.permutation(rank) for _ in range(config.layers)])]
    for _ in range(config.steps):
        tokens.append(tokens[-1] * np.exp(rng.normal(0, config.drift, tokens[-1].shape)))
    return tokens


def simulate(name: str, servers: int, popularity: Sequence[np.ndarray]) -> Row:
    """One rule on so many servers: balance at the start, and over the steps, before and after planning."""
    p = RULES[name](None, popularity[0], servers)
    row: Row = {"rule": name, "servers": servers, "replicas": int((p.replicas >= 0).sum())}
    row["single"] = int(((p.replicas >= 0).sum(axis=2) < 2).sum())
    start = imbalance(p, popularity[0])
    stale, after, moves = [], [], []
    for tokens in popularity[1:]:
        stale.append(imbalance(p, tokens))
        before, p = p, RULES[name](p, tokens, servers)
        after.append(imbalance(p, tokens))
        moves.append(moved(before, p))
    row |= {"mean": start.mean(), "worst": start.max(), "stale": np.mean(stale), "drifted": np.mean(after)}
    return row | {"drifted_worst": np.max(after), "moved": np.mean(moves)}


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    head = (
        "| servers | rule | static: mean of layers | static: worst layer | drift, before the re-plan | drift, after it "
    )
    head += (
        "| drift, worst layer | replicas moved per re-plan | of all | experts with one replica |\n"
        + "|---" * 10
        + "|\n"
    )
    return head + "".join(
        f"| {r['servers']} | {r['rule']} | {r['mean']:.2f} | {r['worst']:.2f} | {r['stale']:.2f} | {r['drifted']:.2f} "
        f"| {r['drifted_worst']:.2f} | {r['moved']:.1f} | {100 * float(r['moved']) / int(r['replicas']):.2f} % "
        f"| {r['single']} |\n"
        for r in rows
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Balance and moves over the number of servers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for name in RULES:
        mine = [r for r in rows if r["rule"] == name]
        servers = [r["servers"] for r in mine]
        left.plot(servers, [r["drifted"] for r in mine], "o-", label=name)
        right.plot(servers, [100 * float(r["moved"]) / int(r["replicas"]) for r in mine], "o-", label=name)
    left.set(xlabel="servers", ylabel="max/mean of tokens, mean of layers", title="under drift", xscale="log")
    right.set(xlabel="servers", ylabel="% of replicas moved per re-plan", title="price", xscale="log", yscale="symlog")
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse(Config, sys.argv[1:] if argv is None else argv, prog="bench.hot_experts")
    popularity = drifting(config)
    rows = [simulate(name, int(n), popularity) for n in config.servers.split(",") for name in RULES]
    page = Path(config.output)
    draw(rows, page.parent / "pictures" / "hot_experts.png")
    page.write_text(PAGE.format(c=config, table=table(rows)), encoding="utf-8")
    print(table(rows))
    return 0


PAGE = """# Hot experts

Written by `python -m bench.hot_experts`: arithmetic, no machine, the same figures from the same seed ({c.seed}).
{c.layers} layers of {c.experts} experts, popularity Zipf {c.zipf}, two replicas of each expert and room for 25 % more.
Then {c.steps} steps of drift: each expert's popularity times exp(N(0, {c.drift})), a new plan after each. What counts
is max/mean of tokens per server within a layer, since layers run one after another.

{table}
![Balance under drift and its price](pictures/hot_experts.png)

*ours*: `moering.ring`, as `moering.drift` uses it. *ring alone*: rendezvous hashing, tokens divided over both replicas.
*EPLB's rule*: the greedy rule that DeepSeek's EPLB publishes (github.com/deepseek-ai/EPLB), written anew from its
description, planned from scratch each time; its cold experts keep one replica, so that any death loses some.
"""


if __name__ == "__main__":
    raise SystemExit(main())
