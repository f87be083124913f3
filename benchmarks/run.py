"""`make bench`: measure on this machine, print the figures with their ratios, record them.

    python -m benchmarks.run [--quick] [--no-record] [--fill RECORD]

The configuration is fixed below. A round is one launch of cpkit under torchrun and one of Open MPI
under mpirun. They alternate, so that other load on the machine affects both. Every launch checks
every bit before it times anything. Writes benchmarks/results/DATE-cpu.json with machine and
versions, and writes the figures of that file into README.md and docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import cost_check, figures, openmpi
from benchmarks.goals import goals_of
from benchmarks.launch import ROOT, keep, on_ranks, run_here, say
from benchmarks.machine import environment
from benchmarks.rows import rows_of
from cpkit.processes import run_command


@dataclass(frozen=True)
class Plan:
    """The configuration of a measurement."""

    tokens: tuple[int, ...] = (256, 1024, 2048, 8192, 16384, 65536)
    cp_sizes: tuple[int, ...] = (2, 4, 8)
    rounds: int = 3
    block_s: float = 0.2


FROZEN = Plan()
QUICK = Plan(tokens=(256, 2048), cp_sizes=(2, 4), rounds=1, block_s=0.1)


def main() -> int:
    """Run the benchmark. A wrong result is an error."""
    parser = argparse.ArgumentParser(description="Measure cpkit on this machine.")
    parser.add_argument("--quick", action="store_true", help="two sizes, one round, no record")
    parser.add_argument("--no-record", action="store_true", help="print, but write no file")
    parser.add_argument("--fill", type=Path, help="only put this record's figures into the pages")
    options = parser.parse_args()
    if options.fill:
        figures.fill_pages(ROOT, options.fill)
        return 0
    plan = QUICK if options.quick else FROZEN
    record: dict[str, Any] = {"environment": environment("make bench"), "gather": [], "barrier": []}
    record["plan"] = {**vars(plan), "warmup": 2, "strategy": "zigzag", "rows": [8, 128]}
    for gathers, barriers in measure(plan):
        record["gather"] += gathers
        record["barrier"] += barriers
    say("control path ...")
    record["control"] = control_figures(3 if options.quick else 10)
    record["cost"] = cost_check.check(record["gather"], record["environment"])
    record["goals"] = goals_of(record)
    print(figures.as_text(record))
    if not (options.quick or options.no_record):
        keep(record, "cpu", figures.fill_pages)
    return 0


def measure(plan: Plan) -> list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Measure all rounds of cpkit and Open MPI; return (gather rows, barrier rows) per cp_size.

    Each round measures all cp_sizes, so that slow changes of the machine affect all of them.
    """
    ours: dict[int, list[Any]] = {cp_size: [] for cp_size in plan.cp_sizes}
    theirs: dict[int, list[Any]] = {cp_size: [] for cp_size in plan.cp_sizes}
    missing = openmpi.available()
    for number in range(plan.rounds):
        for cp_size in plan.cp_sizes:
            say(f"gather, round {number + 1} of {plan.rounds}, cp_size {cp_size} ...")
            rows = on_ranks(cp_size, "benchmarks.gather", plan.block_s, *plan.tokens)
            ours[cp_size].append(rows)
            if not missing:
                theirs[cp_size].append(openmpi.measure(cp_size, plan.tokens, plan.block_s))
    return [rows_of(cp_size, ours[cp_size], theirs[cp_size]) for cp_size in plan.cp_sizes]


def control_figures(rounds: int) -> dict[str, Any]:
    """Measure the control path with its own workers."""
    with TemporaryDirectory() as directory:
        output = Path(directory) / "control.json"
        script = ["-m", "benchmarks.control_path", "--json", str(output)]
        run_here([*script, "--rounds", str(rounds)], quiet=True)
        return dict(json.loads(output.read_text()))


if __name__ == "__main__":
    run_command(main)
