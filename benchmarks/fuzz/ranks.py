"""The rank side of the fuzz test.

    torchrun … -m benchmarks.fuzz.ranks DIRECTORY FIRST_SEED GATHERS SECONDS

Runs the cases of this number of ranks from FIRST_SEED on, until GATHERS are done or SECONDS are
over, or until a case fails. Rank 0 writes progress.json once a second and at the end; each rank
writes its current seed into DIRECTORY/RANK, so that a case that ends the process is known.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from benchmarks.fuzz.calls import RankCase
from benchmarks.fuzz.case import Case, draw, world_of
from cpkit.group import CPGroup, init_context_parallel
from cpkit.processes import leave

_LONGEST_TEXT = 3000
_CASE_S, _HARNESS_S = 30, 100  # a rank that waits for a peer in vain reports it to the others


@dataclass
class Done:
    """What this rank has run; `failures` are by rank, of the only case that failed."""

    cases: int = 0
    gathers: int = 0
    refused: int = 0
    next_seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, case: Case, views: list[str]) -> None:
        """Count one case on this rank."""
        self.cases += 1
        self.gathers += case.gathers
        self.refused += bool(case.fault)
        self.counts.update(dict.fromkeys(dimensions(case), case.gathers))
        self.counts.update(f"view: {view}" for view in views)


def dimensions(case: Case) -> Iterator[str]:
    """Yield what the gathers of a case are counted by."""
    yield f"cp_size: {case.cp_size}"
    yield f"ranks: {world_of(case.seed)}"
    yield f"strategy: {case.strategy}"
    yield f"sequences: {len(case.lengths)}"
    yield f"call: {case.call}"
    yield f"algorithm: {case.algorithm}"
    yield f"symmetric: {case.symmetric}"
    yield f"tensors: {len(case.kinds)}"
    for kind in set(case.kinds):
        yield f"dtype: {str(kind.dtype).removeprefix('torch.')}"
        yield f"trailing: {list(kind.trailing)}"
    if case.fault:
        yield f"refused: {case.call}, {case.fault}"


def seeds_from(first: int, world: int) -> Iterator[int]:
    """Yield the seeds of cases for this number of ranks, from `first` on."""
    seed = first
    while True:
        if world_of(seed) == world:
            yield seed
        seed += 1


def run_case(case: Case, done: Done) -> str:
    """Run one case on this rank; return "" or what was wrong."""
    try:
        rank_case = RankCase(case)
        rank_case.run()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the result of the case
        frames = "".join(traceback.format_tb(error.__traceback__)[-2:])
        return f"{type(error).__name__}: {error}\n{frames}"[:_LONGEST_TEXT]
    done.add(case, rank_case.views)
    return ""


def run_cases(
    seeds: Iterator[int], harness: CPGroup, gathers: int, stop_at: float, directory: Path | None
) -> Done:
    """Run cases until one fails on any rank, or rank 0 has done enough."""
    done, written_at = Done(), time.monotonic()
    current = directory and os.open(directory / str(dist.get_rank()), os.O_WRONLY | os.O_CREAT)
    for seed in seeds:
        if current:
            os.pwrite(current, b"%20d" % seed, 0)
        with deadline(_CASE_S):
            problem = run_case(draw(seed), done)
        done.next_seed = seed + 1
        enough = done.gathers >= gathers or time.monotonic() > stop_at
        with deadline(_HARNESS_S):
            answers = harness.exchange(b"enough" if enough and not problem else problem.encode())
        problems = [answer.decode(errors="replace") for answer in answers]
        if any(each not in ("", "enough") for each in problems):
            done.failures = [
                {"seed": seed, "rank": rank, "problem": text, "case": repr(draw(seed))}
                for rank, text in enumerate(problems)
                if text not in ("", "enough")
            ]
            break
        if problems[0] == "enough":
            break
        if directory and time.monotonic() > written_at + 1:
            written_at = time.monotonic()
            write(done, directory)
    return done


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Limit how long this rank waits for its peers."""
    with mock.patch.dict(os.environ, CPKIT_DEADLINE_S=str(seconds)):
        yield


def write(done: Done, directory: Path) -> None:
    """Replace the progress file; only rank 0 does so."""
    if dist.get_rank() == 0:
        new = directory / "progress.new"
        new.write_text(json.dumps(vars(done)))
        new.replace(directory / "progress.json")


def main() -> None:
    """Run the cases, write what was done."""
    warnings.filterwarnings("ignore", message="ComplexHalf")
    directory, first, gathers, seconds = sys.argv[1:]
    stop_at = time.monotonic() + float(seconds)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    harness = init_context_parallel(world, "harness")
    done = run_cases(seeds_from(int(first), world), harness, int(gathers), stop_at, Path(directory))
    write(done, Path(directory))
    harness.barrier()
    leave(0)


if __name__ == "__main__":
    main()
