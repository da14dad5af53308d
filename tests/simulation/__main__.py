"""`python -m tests.simulation`: run many seeds, or one with its trace. `--help` lists the options."""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.run import Outcome, run, run_many


def shrink(outcome: Outcome) -> list[int]:
    """The numbers of the faults that are needed for the failure; drops one after the other while it still fails."""
    keep = list(range(len(outcome.faults)))
    for number in list(keep):
        fewer = [n for n in keep if n != number]
        if run(outcome.seed, fewer).failure:
            keep = fewer
    return keep


def replay_command(seed: int, keep: list[int] | None) -> str:
    """The command that shows a run with its trace."""
    faults = "" if keep is None else " --keep " + (",".join(map(str, keep)) or "none")
    return f"python -m tests.simulation --seed {seed}{faults}"


def show(outcome: Outcome, *, lines: int | None) -> None:
    """Print a run."""
    trace = outcome.trace if lines is None else outcome.trace[-lines:]
    print("\n".join(trace))
    print("faults:")
    for fault in outcome.faults:
        print(f"  {fault}")
    result = outcome.failure or "nothing is wrong"
    print(f"seed {outcome.seed}, digest {outcome.digest}, {outcome.virtual_s:.1f} virtual seconds: {result}")


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this seed alone and print its trace")
    parser.add_argument("--keep", help="with --seed: only these of its faults, by number; none: without any")
    parser.add_argument("--seeds", default="0:1000", help="run the seeds from:to")
    parser.add_argument("--seconds", type=float, help="stop after so many seconds")
    args = parser.parse_args()
    if args.seed is not None:
        keep = None if args.keep is None else [int(n) for n in args.keep.split(",") if n != "none"]
        outcome = run(args.seed, keep, tracing=True)
        show(outcome, lines=None)
        return int(bool(outcome.failure))
    first, _, last = args.seeds.partition(":")
    started = time.monotonic()
    done, failures, counts = run_many(range(int(first), int(last)), args.seconds)
    took_s = time.monotonic() - started
    figures = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
    print(f"{done} schedules in {took_s:.1f} s, {len(failures)} failed; {figures}")
    for outcome in failures:
        keep = shrink(outcome)
        show(run(outcome.seed, keep), lines=60)
        print(f"replay: {replay_command(outcome.seed, keep)}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
