"""Fuzz the readers: ``python tests/fuzz/campaign.py [--cases N] [--readers a,b] [--first K]``.

Prints a table and the faults by kind. Cases that were faults go to the regression files, one of
each kind and reader, which the tests then read on each run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

from engine import BAD, Outcome, run_cases
from readers import readers

REGRESSIONS = Path(__file__).with_name("regressions")


def main() -> int:
    """Run; 1 where a fault was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="of all readers together")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--readers", default="", help="names, by commas")
    parser.add_argument("--keep", action="store_true", help="add faults to the regression files")
    args = parser.parse_args()
    chosen = [r for r in readers() if not args.readers or r.name in args.readers.split(",")]
    per_reader = -(-args.cases // len(chosen))
    faults: dict[tuple[str, str], list[Outcome]] = {}
    print(
        f"{'reader':14s}{'cases':>8s}"
        + "".join(f"{k:>12s}" for k in BAD)
        + f"{'read':>8s}{'s':>7s}{'slowest':>9s}"
    )
    for reader in chosen:
        began, count, slowest = time.monotonic(), Counter(), (0.0, 0)
        for outcome in run_cases(reader, range(args.first, args.first + per_reader)):
            count[outcome.kind] += 1
            slowest = max(slowest, (outcome.cpu_s, outcome.case))
            if outcome.kind in BAD:
                faults.setdefault((reader.name, outcome.fault), []).append(outcome)
        figures = "".join(f"{count[kind]:12d}" for kind in BAD)
        seconds = time.monotonic() - began
        print(
            f"{reader.name:14s}{count.total():8d}{figures}{count['read']:8d}{seconds:7.1f}"
            f"{slowest[0]:7.1f} s, case {slowest[1]}",
            flush=True,
        )
    for (name, fault), outcomes in sorted(faults.items()):
        shortest = min(outcomes, key=lambda o: len(json.dumps(o.edits)))
        print(f"{name} x{len(outcomes)} {fault} | {shortest.detail.splitlines()[-1]}")
        print(f"    case {shortest.case}: {json.dumps(shortest.edits)[:200]}")
        if args.keep:
            keep(name, shortest)
    return int(bool(faults))


def keep(name: str, outcome: Outcome) -> None:
    """Add a case to the regression file of its reader."""
    REGRESSIONS.mkdir(exist_ok=True)
    with (REGRESSIONS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"was": outcome.fault, "edits": outcome.edits}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
