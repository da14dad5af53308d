"""Writes docs/walk.md from a real run: ``python -m bench.walk --out docs/walk.md``; it takes some seconds.

One cluster of a tiny random checkpoint (`bench.traced_cluster`) gets the same request twice. The page follows the first
one through the processes, and the second one through the SIGKILL of an expert server. All figures on it, names of
functions included, come from the trace.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from string import Template
from typing import Any

import aiohttp

from bench.client import Exchange, exchange, new_session
from bench.cluster import read_status, serving
from bench.load import first_model
from bench.random_checkpoint import Shape, write
from bench.traced_cluster import KILLED
from moering.config import option, parse
from moering.errors import MoeringError

Event = dict[str, Any]

SHAPE = {"layers": 2, "hidden": 64, "intermediate": 96, "experts": 8, "heads": 4, "kv_heads": 2, "head_dim": 32}
PROMPT, CHUNK, TOKENS = 24, 16, 200
KILL_AFTER = 8
"""Tokens that the client has when an expert server is told to die."""
DECODE_STEP = 2
"""The decode step to be shown, counted from 0: the first ones touch much for the first time."""
FLAGS = ["--expert-servers", "3", "--replication", "2", "--rejoin-grace-s", "600", "--expert-server-args=--no-nice"]
FLAGS += ["--router-args", f"--max-num-batched-tokens {CHUNK}"]
DEATHS = 5
"""At most, until one loses rows: a busy machine may send them to another server before it notices."""
LIMIT_S = 120.0
LOOK_S = 0.001
CLIENT = "bench/client.py:exchange"

TEXTS = {
    "exchange": "{text}",
    "Generation.start": "request `{request}`: {prompt} ids in, at most {max_tokens} out; the journal gets its record",
    "RouterPool._route": "it goes to {server}: `Submit`",
    "Engine._submit": "attempt {attempt}, {prompt} prompt ids: queued",
    "Scheduler.schedule": "a step: {prefill} rows of the prompt, {decode} of decoding sequences",
    "Flight.launch": "layer {layer}: attention and gate of {rows} rows, {took_us} µs",
    "Exchange.submit": "layer {layer}: {rows} rows chose {pairs} (row, expert) pairs, row 0 experts {first}",
    "Connection.send": "`Dispatch` seq {seq} to {server}: layer {layer}, {rows} rows, {pairs} pairs, experts {experts}",
    "Service._answer": "seq {seqs}: {bytes_in} bytes in, {bytes_out} out as `Reply`; {took_us} µs, "
    "{compute_us} of them the product",
    "Exchange._put": "takes in seq {seq}: {pairs} outputs from {server}",
    "Flight.after_experts": "layer {layer}: outputs added in top-k order",
    "Engine._emit": "samples token {token}, position {position}: `Tokens`",
    "Journal.take": "token {token} is the next position, {position}: into the journal and the stream",
    KILLED: "**SIGKILL** of pid {pid} with seq {seqs} in hand: layer {layer}, {pairs} pairs, experts {experts}",
    "Exchange._lose": "{server}: {why}; unanswered there: seq {seqs}",
    "Dispatcher._again": "seq {seq} lost with rows {rows_lost}; sent again, and nothing else: {again}",
    "ExitReports.send": "waitpid has told [moering/supervisor.py:Supervisor._run_once](../moering/supervisor.py) "
    "that pid {pid} ended with {exit_code}: `ProvenExit` to the coordinator",
    "Supervisor._spawn": "starts {server} again",
    "Membership._proven_exit": "`ProvenExit` of {server}, pid {pid}",
    "Membership._bury": "{server}, incarnation {incarnation}, is OFFLINE: {reason}",
    "Membership._publish": "publishes epoch {epoch}: failures survivable {survivable}, "
    "{under_target} experts under {replication} replicas",
    "Engine._follow_view": "routes by epoch {epoch}",
    "Membership._register": "{server} is back: pid {pid}, incarnation {incarnation}",
    "Loader._load_all": "loads {experts} experts in {took_us} µs",
    "Exchange._welcome": "connected to {server}, incarnation {incarnation}",
    "Membership._state_changed": "{server}: {was} → {state}",
}
"""What a call means, by function; the fields are facts of `bench.traced_cluster`."""

ARROWS = {
    KILLED: ("{process}", "", "SIGKILL, seq {seqs} unanswered"),
    "Exchange._lose": ("{server}", "{process}", "{why}"),
    "Connection.send": ("{process}", "{server}", "Dispatch seq {seq}"),
    "Exchange._put": ("{server}", "{process}", "Reply seq {seq}"),
    "Engine._emit": ("{process}", "gateway-0", "Tokens, position {position}"),
    "exchange": ("gateway-0", "client", "{text}"),
    "ExitReports.send": ("{process}", "coordinator", "ProvenExit"),
    "Membership._publish": ("{process}", "router-0", "View, epoch {epoch}"),
    "Supervisor._spawn": ("{process}", "{server}", "start"),
    "Membership._register": ("{server}", "{process}", "Register"),
    "Loader._load_all": ("{process}", "", "{experts} experts loaded"),
    "Membership._state_changed": ("{server}", "{process}", "{state}"),
}
"""What goes from whom to whom, for the diagram; an empty target: it happens there."""


@dataclass(frozen=True)
class WalkConfig:
    """Write the page that follows one request, and one death, through the processes."""

    out: str = option("docs/walk.md", "the page")


@dataclass(frozen=True)
class Recording:
    """What was seen of the same request undisturbed and across a death: both by time, the latter from the SIGKILL."""

    calm: list[Event]
    death: list[Event]
    tokens: int
    equal: bool


async def record(folder: Path) -> Recording:
    """Run the cluster in `folder`. Raises `MoeringError` where something fails that should not."""
    checkpoint = write(Shape(str(folder / "tiny"), vocab=320, max_positions=1024, **SHAPE))  # type: ignore[arg-type]
    trace, log = folder / "trace", folder / "serve.log"
    launcher = ("bench.traced_cluster", str(trace))
    async with (
        serving(str(checkpoint), log, FLAGS, LIMIT_S, launcher=launcher) as url,
        new_session(LIMIT_S) as session,
        asyncio.timeout(LIMIT_S),
    ):
        body = {"model": await first_model(session, url), "prompt": list(range(20, 20 + PROMPT)), "max_tokens": TOKENS}
        body |= {"stream": True, "temperature": 0.0, "ignore_eos": True, "return_token_ids": True}
        await exchange(session, url, "completions", body)  # the first use of everything is slow
        calm = await exchange(session, url, "completions", body)
        first = _between(_read(trace), calm.started_s, calm.ended_s) + _as_events(calm)
        for _ in range(DEATHS):
            killed = await _die(session, url, body, Path(f"{trace}.kill"))
            second = _between(_read(trace), killed.started_s, float("inf")) + _as_events(killed)
            if any(name(e) == "Dispatcher._again" for e in second):
                break
        if calm.error or killed.error:
            raise MoeringError(f"a request failed: {calm.error or killed.error}")
    death = [e for e in second if e["at"] >= next(e["at"] for e in second if e["code"] == KILLED)]
    return Recording(_in_order(first), _in_order(death), len(calm.token_ids), calm.token_ids == killed.token_ids)


async def _die(session: aiohttp.ClientSession, url: str, body: dict[str, Any], kill: Path) -> Exchange:
    """The request, in whose middle an expert server dies; returns when every expert has its replicas again."""
    before, killed = await read_status(session, url), Exchange()
    streaming = asyncio.create_task(exchange(session, url, "completions", body, killed))
    while len(killed.token_ids) < KILL_AFTER and not streaming.done():
        await asyncio.sleep(LOOK_S)
    kill.touch()
    await streaming
    while (now := await read_status(session, url)).epoch == before.epoch or now.failures_survivable < 1:
        await asyncio.sleep(LOOK_S)
    return killed


def _read(trace: Path) -> list[Event]:
    return [json.loads(line) for line in trace.read_text().splitlines()]


def _between(events: list[Event], from_s: float, to_s: float) -> list[Event]:
    return [e for e in events if from_s <= e["at"] / 1e9 <= to_s]  # perf_counter is the monotonic clock on Linux


def _as_events(request: Exchange) -> list[Event]:
    """What the client did and saw; `position` is that of the last token so far."""
    position, seen = -1, [(request.started_s, -1, f"POST /v1/completions: {PROMPT} token ids, `stream`")]
    for a in request.arrivals:
        position += len(a.token_ids)
        seen.append((a.at_s, position, f"an event with token {', '.join(map(str, a.token_ids))}, position {position}"))
    seen.append((request.ended_s, position + 1, f"the stream ends after {position + 1} tokens"))
    common = {"took": 0, "process": "client", "code": CLIENT}
    return [{**common, "at": int(at_s * 1e9), "position": position, "text": text} for at_s, position, text in seen]


def _in_order(events: list[Event]) -> list[Event]:
    """By time, and ready for `TEXTS`: an expert server's reply becomes a part of the call that computed it."""
    answers = {(e["process"], seq): e for e in events if name(e) == "Service._answer" for seq in e["seqs"]}
    for e in events:
        e["took_us"] = e["took"] // 1000
        if name(e) == "Service._send" and (answer := answers.get((e["process"], e["seq"]))):
            answer |= {"compute_us": e["compute_us"], "bytes_out": e["bytes_out"]}
        if name(e) == "Dispatcher._again":
            e["again"] = ", ".join(f"rows {rows} to {server} as seq {seq}" for seq, server, rows in e["sent"])
    return sorted((e for e in events if name(e) != "Service._send"), key=lambda e: e["at"])


def name(event: Event) -> str:
    """The function: `Class.method`."""
    return str(event["code"]).rpartition(":")[2]


def of_request(events: list[Event]) -> list[Event]:
    """The way in, the first layer of the first chunk of the prompt, the first token, and one decode step."""
    events = [e for e in events if e["process"] not in ("coordinator", "launcher")]
    steps, layers, emitted = (
        [i for i, e in enumerate(events) if name(e) == function]
        for function in ("Scheduler.schedule", "Flight.after_experts", "Engine._emit")
    )
    decode, token = steps[2 + DECODE_STEP], emitted[1 + DECODE_STEP]  # after two steps of the prompt, and its token
    rest = [e for e in events[layers[0] + 1 : steps[2]] if name(e) in ("Scheduler.schedule", "Engine._emit")]
    step = events[decode:token]
    seqs = {e["seq"] for e in step if name(e) == "Connection.send" and e["layer"] == 0}
    ends = "Scheduler.schedule", "Flight.after_experts"
    step = [e for e in step if name(e) in ends or e.get("layer") == 0 or e.get("seq") in seqs]
    position = events[token]["position"]
    arrives = [
        next(e for e in events if name(e) == n and e["position"] >= position) for n in ("Journal.take", "exchange")
    ]
    return [*events[: layers[0] + 1], *rest, *step, events[token], *arrives]


def of_death(events: list[Event]) -> list[Event]:
    """What has to do with the death that `events` begin with, until every expert has its replicas again."""
    victim = events[0]["process"]
    lost = [i for i, e in enumerate(events) if name(e) == "Dispatcher._again"]
    if not lost:
        raise MoeringError("no rows were lost with the expert server")
    again = {seq for i in lost for seq, _, _ in events[i]["sent"]}
    token = next(e for e in events[lost[-1] :] if name(e) == "Engine._emit")
    client = [e for e in events if e["code"] == CLIENT]
    arrival = next(e for e in client if e["position"] >= token["position"])
    buried = next(i for i, e in enumerate(events) if name(e) == "Membership._bury")
    published = [e for e in events[buried:] if name(e) == "Membership._publish"]
    whole = next(i for i, e in enumerate(published) if not e["under_target"])
    epochs = {e["epoch"] for e in published[: whole + 1]}

    def told(e: Event) -> bool:
        if name(e) in ("Membership._publish", "Engine._follow_view"):
            return e["epoch"] in epochs
        if name(e) in ("Connection.send", "Exchange._put"):
            return e["seq"] in again
        if name(e) == "Service._answer":
            return not again.isdisjoint(e["seqs"])
        return e in (token, arrival, client[-1]) or e.get("server", e["process"]) == victim

    return [e for e in events if told(e) and (e["at"] <= published[whole]["at"] or name(e) in AFTERWARDS)]


AFTERWARDS = "Engine._follow_view", "Exchange._welcome", "exchange"
"""What may come after redundancy is restored."""


def table(events: list[Event]) -> list[str]:
    """The events in markdown, times in µs from the first one."""
    began = events[0]["at"]
    lines = ["| µs | process | what | code |", "|---:|---|---|---|"]
    for e in events:
        file = e["code"].partition(":")[0]
        code = "" if e["code"] == KILLED else f"[{e['code']}](../{file})"
        text = re.sub(r"\b1 (row|pair|output|id|expert|token)s\b", r"1 \1", TEXTS[name(e)].format(**e))
        lines.append(f"| {(e['at'] - began) // 1000:,} | {e['process']} | {text} | {code} |")
    return lines


def diagram(events: list[Event], width: int = 12) -> list[str]:
    """The messages among `events`, one a line, from process to process."""
    servers = sorted({e[key] for e in events for key in ("server", "process") if e.get(key, "").startswith("expert-")})
    lanes = ["client", "gateway-0", "router-0", *servers, "launcher", "coordinator"]
    lines = ["".join(lane.center(width) for lane in lanes).rstrip()]
    for e in events:
        if name(e) not in ARROWS:
            continue
        source, target, label = (part.format(**e) for part in ARROWS[name(e)])
        line = list("".join("|".center(width) for _ in lanes))
        at = [lanes.index(lane) * width + (width - 1) // 2 for lane in (source, target or source)]
        left, right = sorted(at)
        line[left + 1 : right] = "-" * (right - left - 1)
        line[at[1]] = "*" if not target else ">" if at[1] > at[0] else "<"
        lines.append(f"{''.join(line)} {label}")
    return lines


def page(recording: Recording) -> str:
    """The whole page. Raises `MoeringError` where the run was not what the page says."""
    death = of_death(recording.death)
    if not recording.equal:
        raise MoeringError("the stream across the death has other tokens")
    epochs = [e["epoch"] for e in death if name(e) == "Membership._publish"]
    lost = sum(len(e["rows_lost"]) for e in death if name(e) == "Dispatcher._again")
    return TEMPLATE.substitute(
        **SHAPE, prompt=PROMPT, chunk=CHUNK, tokens=recording.tokens, cores=os.cpu_count(), day=date.today(),
        request="\n".join(table(of_request(recording.calm))), death="\n".join(table(death)),
        diagram="\n".join(diagram(death)), victim=death[0]["process"], lost=lost, before=epochs[0] - 1,
        after=epochs[-1],
    )  # fmt: skip


TEMPLATE = Template(Path(__file__).with_suffix(".md").read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> int:
    """Run, and write the page."""
    try:
        config = parse(WalkConfig, sys.argv[1:] if argv is None else argv, prog="python -m bench.walk")
        with tempfile.TemporaryDirectory(prefix="walk-") as folder:
            Path(config.out).write_text(page(asyncio.run(record(Path(folder)))), encoding="utf-8")
    except (MoeringError, aiohttp.ClientError, TimeoutError) as e:
        print(f"bench.walk: {type(e).__name__}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
