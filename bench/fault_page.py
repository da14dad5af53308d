"""docs/faults.md from the figures of the fault matrix."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

from bench.fault_report import ROWS, rows_cell

Figures = dict[str, Any]
# Above this load average before the start somebody else was at work.
BUSY = 0.7
BUSY_NOTE = (
    "\n\n**The machine was busy with other work: times and rates here are a placeholder and no measurement. "
    "The counts of tokens hold.**"
)
TOKENS = ("dead", "requests", "tokens", "lost", "duplicated", "changed", "other digests", "renormalised", "errors",
          ROWS)  # fmt: skip
STEPS = ("dead", "detected", "next token", "reloaded", "redundant", "caught up")
GAPS = ("dead", "affected", "p50", "p99", "max", "unaffected", "p50", "p99", "max", "longest without a fault")
RATES = ("dead", "before", "during", "after", "during: gap p50 ms", "p99", "max")


def page(result: Figures) -> str:
    """The whole page. `result` is what faults.json holds."""
    config, cases, calm = result["config"], result["cases"], f"{result['config']['calm']:g}"
    plain = [c for c in cases if c["dead"] and c["name"] == str(c["dead"])]
    one = next((c for c in plain if c["dead"] == 1), None)
    reloaded = (f"{_median_worst(f['reloaded_s'] for f in c['faults'])} s ({c['name']} dead)" for c in plain)
    return Template(Path(__file__).with_suffix(".md").read_text()).substitute(
        machine=_machine(result), busy=BUSY_NOTE if result["load"] > BUSY else "",
        problem=f"\n\n**The run ended early:** {result['problem']}" if result["problem"] else "",
        servers=result["servers"], replication=config["replication"], survivable=config["replication"] - 1,
        streams=config["streams"], times=result["times"], calm=calm, cores=os.cpu_count(),
        tokens=_table(TOKENS, map(_tokens, cases)), steps=_table(STEPS, map(_steps, cases)),
        gaps=_table(GAPS, map(_gaps, cases)), rates=_table(RATES, map(_rates, cases)),
        redistribution=_one_dead(one, result["servers"]) if one else "*Not run.*",
        several=_several(cases, plain, config["replication"]),
        most=max((c["dead"] for c in plain if c["kept"]), default=0),
        reloaded="; ".join(reloaded) or "*not run*",
    )  # fmt: skip


def _machine(result: Figures) -> str:
    command = f"--model {_name(result['config']['model'])} --expert-servers {result['servers']}"
    return (
        f"`{command}`, {datetime.date.today()}, {os.cpu_count()} cores of {_processor()}, Python "
        f"{platform.python_version()}, PyTorch {version('torch')}; load average before the start {result['load']}."
    )


def _one_dead(case: Figures, servers: int) -> str:
    token, calm, rates, rows = case["next_token_ms"], case["calm_gap_ms"], case["tokens_per_s"], case["counters"]
    redundant = _median_worst(f["redundant_s"] for f in case["faults"])
    again = rows.get("rows_resent", 0) + rows.get("hedged_rows", 0)
    return (
        "Nothing is redistributed at that moment: each expert of the dead server has a replica, which gets the rows "
        f"that were on their way. One of {servers} dead, {len(case['faults'])} times: {again} "
        f"rows were sent again, {rows.get('tokens_recomputed', 0)} tokens computed again. A stream had its next token "
        f"{_ms(token['p50'])} ms after the kill (median; worst {_ms(token['max'])}); without a failure its tokens are "
        f"{_ms(calm['p50'])} ms apart (median; longest {_ms(calm['max'])}). What is paid is paid later: a new process "
        f"starts and loads beside the traffic. Until every expert had its replicas again, {redundant} s (median, "
        f"worst), throughput was {_share(rates['during'], rates['before'])} of that before, and "
        f"{_share(rates['after'], rates['before'])} after."
    )


def _several(cases: Sequence[Figures], plain: Sequence[Figures], replication: int) -> str:
    others = [c for c in cases if c["dead"] and c not in plain]
    return "\n".join(
        f"* {c['name']}: the longest gap was {_ms(_longest(c))} ms; {_what_came(c)}; redundant after "
        f"{_median_worst(f['redundant_s'] for f in c['faults'])} s (median, worst)."
        for c in [*(c for c in plain if c["dead"] >= replication), *others]
    )


def _what_came(c: Figures) -> str:
    a = c["account"]
    if renormalized := c["counters"].get("tokens_renormalized"):
        return f"{renormalized} tokens without an expert, {a['errors']} of {a['requests']} requests ended by an error"
    return f"{_wrong(c)} tokens lost, duplicated or changed, {a['errors']} errors in {a['requests']} requests"


def _tokens(c: Figures) -> list[Any]:
    a, rows = c["account"], c["counters"]
    digests = a["changed_digests"] + a["missing_digests"]
    row = [a[n] for n in ("requests", "tokens", "lost", "duplicated", "changed")]
    return [c["name"], *row, digests, rows.get("tokens_renormalized", "-"), a["errors"], rows_cell(rows)]


def _steps(c: Figures) -> list[Any]:
    names = ("detected_s", "next_token_s", "reloaded_s", "redundant_s", "caught_up_s")
    return [c["name"], *(_median_worst(f[n] for f in c["faults"]) for n in names)]


def _gaps(c: Figures) -> list[Any]:
    groups = [c["longest_ms"][n] for n in ("affected", "unaffected")]
    cells = [v for g in groups for v in (g["streams"], *(_ms(g[q]) for q in ("p50", "p99", "max")))]
    return [c["name"], *cells, _ms(c["calm_gap_ms"]["max"])]


def _rates(c: Figures) -> list[Any]:
    rates = ["-" if v is None else f"{v:.1f}" for v in c["tokens_per_s"].values()]
    return [c["name"], *rates, *(_ms(c["gap_ms"][q]) for q in ("p50", "p99", "max"))]


def _longest(c: Figures) -> float | None:
    return max((v for g in c["longest_ms"].values() if (v := g["max"]) is not None), default=None)


def _wrong(c: Figures) -> int:
    return sum(c["account"][n] for n in ("lost", "duplicated", "changed"))


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(c) for c in row) + " |" for row in rows)])


def _median_worst(seconds: Iterable[float | None]) -> str:
    """As "median, worst"; a step that did not come is the worst."""
    values = list(seconds)
    seen = [v for v in values if v is not None]
    if not seen:
        return "never" if values else "-"
    worst = f"{max(seen):.2f}" if len(seen) == len(values) else "never"
    return f"{median(seen):.2f}, {worst}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _share(value: float | None, of: float | None) -> str:
    return "-" if value is None or not of else f"{100 * value / of:.0f} %"


def _name(model: str) -> str:
    return model if model == "default" else Path(model).name


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
