"""Fault bench: kills processes under concurrent streams and writes the client's own account.

``python -m bench.faults --model default --kill expert-server --times 20 --out results/`` starts a cluster, records what
every request brings without a failure, sends the same requests again while processes are killed with SIGKILL, and
compares: tokens lost, duplicated, changed; digests of the sampled logits; the longest gap after each kill.

``python -m bench.faults --matrix`` does so for 0, 1, 2, 4, … and all of eight expert servers and writes docs/faults.md.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
import sys
from pathlib import Path

import aiohttp
import uvloop

from bench import fault_matrix
from bench.fault_pictures import draw
from bench.fault_report import markdown, report
from bench.fault_run import FaultConfig, run
from moering.config import parse
from moering.errors import MoeringError


def main(argv: list[str] | None = None) -> int:
    """Run, write the report, and say whether the promise was kept: exit status 1 when it was not."""
    try:
        config = parse(FaultConfig, sys.argv[1:] if argv is None else argv, prog="python -m bench.faults")
        Path(config.out).mkdir(parents=True, exist_ok=True)
        return fault_matrix.write(config) if config.matrix else _one(config)
    except (MoeringError, aiohttp.ClientError, TimeoutError) as e:
        print(f"bench.faults: {type(e).__name__}: {e}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:  # by SIGTERM
        return 128 + signal.SIGTERM


def _one(config: FaultConfig) -> int:
    measured = uvloop.run(run(config))
    out = Path(config.out)
    result = {"config": dataclasses.asdict(config)} | report(measured)
    (out / "faults.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (out / "faults.md").write_text(text)
    draw(measured, out)
    print(text)
    return 0 if result["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
