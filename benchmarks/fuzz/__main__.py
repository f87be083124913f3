"""`python -m benchmarks.fuzz`: gather random batches, and compare every bit with a definition.

    python -m benchmarks.fuzz --gathers 100000      # writes benchmarks/results/DATE-fuzz.json
    python -m benchmarks.fuzz --seed 1234567        # runs one case alone

A case has random lengths, strategy, cp_size, dtypes, shapes, memory layouts, algorithm and call. In
a tenth of the cases one rank first passes bad arguments: every rank must raise ValueError, and the
gather after it must be right. Exits with 0 if all cases passed, 1 if one failed, 2 if none ran in
time, and 130 after Ctrl-C, which prints what was done.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.fuzz.case import WORLD_BY_DIGIT, WORLDS, draw, world_of
from benchmarks.launch import RESULTS, ROOT, say
from benchmarks.machine import environment
from cpkit.control.tied import tied
from cpkit.processes import run_command

_COMMAND = "python -m benchmarks.fuzz"
_GATHERS_PER_ROUND = 50000
_STUCK_S = 240.0  # without progress; a rank waits at most 100 s for its peers
_MOST_FAILURES = 5


@dataclass
class Total:
    """What all launches have run."""

    cases: int = 0
    gathers: int = 0
    refused: int = 0
    launches: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    next_seeds: dict[int, int] = field(default_factory=dict)

    def add(self, world: int, done: dict[str, Any]) -> None:
        """Add the progress of one launch."""
        for name in ("cases", "gathers", "refused"):
            setattr(self, name, getattr(self, name) + done[name])
        self.launches += 1
        self.counts.update(done["counts"])
        self.failures += done["failures"]
        self.next_seeds[world] = max(done["next_seed"], self.next_seeds.get(world, 0))
        for failure in done["failures"]:
            say(f"FAILED: {explained(failure)}")

    def line(self) -> str:
        """Return what was done in one line."""
        failed = len({failure["seed"] for failure in self.failures})
        return (
            f"{self.gathers} gathers in {self.cases} cases, {self.refused} calls refused, "
            f"{failed} cases failed"
        )


def explained(failure: dict[str, Any]) -> str:
    """Return a failure as text, with the command that replays it."""
    return (
        f"rank {failure['rank']}: {failure['problem']}\n{failure['case']}\n"
        f"replay: {_COMMAND} --seed {failure['seed']}"
    )


def main() -> int:
    """Run the fuzz test, and return its exit code."""
    options = _options()
    if options.seed is not None:
        return replay(options.seed)
    first = random.SystemRandom().randrange(1 << 40) if options.first is None else options.first
    say(f"the first seed is {first}; {options.gathers} gathers, at most {options.deadline_s:g} s")
    command = (
        f"{_COMMAND} --gathers {options.gathers} --first {first} "
        f"--deadline-s {options.deadline_s:g}"
    )
    where = environment(command)
    total, code = Total(), 0
    start = time.monotonic()
    try:
        run(total, first, options.gathers, start + options.deadline_s)
    except KeyboardInterrupt:
        code = 130
    took_s = time.monotonic() - start
    print(f"{total.line()}, {took_s:.0f} s")
    if options.record and not code:
        record(total, where, took_s)
    if total.failures:
        return 1
    return code or (0 if total.gathers else 2)


def run(total: Total, first: int, gathers: int, stop_at: float) -> None:
    """Launch all numbers of ranks in turn, until enough gathers are done or time is over."""
    while total.gathers < gathers and time.monotonic() < stop_at:
        missing = min(gathers - total.gathers, _GATHERS_PER_ROUND)
        for world in WORLDS:
            quota = -(-missing * WORLD_BY_DIGIT.count(world) // len(WORLD_BY_DIGIT))
            seed = total.next_seeds.get(world, first)
            seconds = stop_at - time.monotonic()
            if seconds > 0 and not _is_hopeless(total):
                launch(total, world, seed, quota, seconds)
        if _is_hopeless(total):
            return


def _is_hopeless(total: Total) -> bool:
    return len({failure["seed"] for failure in total.failures}) >= _MOST_FAILURES


def launch(total: Total, world: int, seed: int, gathers: int, seconds: float) -> None:
    """Run cases on `world` ranks; add what they did, also if this is interrupted."""
    with TemporaryDirectory(prefix="cpkit-fuzz-") as name:
        directory = Path(name)
        arguments = [str(directory), str(seed), str(gathers), str(seconds)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={world}", f"--log-dir={directory / 'logs'}"]
        with (directory / "output").open("w") as output:
            agent = subprocess.Popen(
                # torchrun ends its ranks on SIGTERM
                tied([*command, "-m", "benchmarks.fuzz.ranks", *arguments], signal.SIGTERM),
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C in the terminal interrupts this process only
            )
            try:
                problem = wait(agent, directory, total, world)
            finally:
                if agent.poll() is None:
                    agent.terminate()
                    agent.wait()
                total.add(world, progress(directory, seed))
        if problem:
            total.add(world, _ended(directory, world, seed, problem))


def wait(agent: subprocess.Popen[bytes], directory: Path, total: Total, world: int) -> str:
    """Print progress until the launch has ended; return "" or why it did not end well."""
    seen, changed, shown = 0, time.monotonic(), 0.0
    while agent.poll() is None:
        time.sleep(0.1)
        gathers = progress(directory, 0)["gathers"]
        now = time.monotonic()
        if gathers != seen:
            seen, changed = gathers, now
        if now > shown + 10:
            shown = now
            say(f"{total.gathers + gathers} gathers; now on {world} ranks")
        if now > changed + _STUCK_S:
            return f"no progress for {_STUCK_S:g} s"
    return "" if agent.returncode == 0 else f"torchrun exited with {agent.returncode}"


def progress(directory: Path, seed: int) -> dict[str, Any]:
    """Return what rank 0 has written; nothing done if it has written nothing yet."""
    try:
        return dict(json.loads((directory / "progress.json").read_text()))
    except FileNotFoundError:
        nothing = {"cases": 0, "gathers": 0, "refused": 0, "counts": {}, "failures": []}
        return {**nothing, "next_seed": seed}


def _ended(directory: Path, world: int, seed: int, problem: str) -> dict[str, Any]:
    """Return a failure of the case in which a launch has ended."""
    current = [directory / str(rank) for rank in range(world)]
    seeds = [int(file.read_text()) for file in current if file.exists()]
    bad = max(seeds, default=seed)
    output = (directory / "output").read_text()[-2000:]
    failure = {"seed": bad, "rank": -1, "problem": f"{problem}\n{output}", "case": repr(draw(bad))}
    return {**progress(Path("/nonexistent"), bad + 1), "failures": [failure]}


def replay(seed: int) -> int:
    """Run one case alone, and print what it is."""
    print(draw(seed))
    total = Total()
    launch(total, world_of(seed), seed, 1, 600)
    print(total.line())
    return int(bool(total.failures))


def record(total: Total, where: dict[str, Any], took_s: float) -> None:
    """Write the dated record."""
    del where["open_mpi"]  # not part of this
    content = {
        "environment": where,
        "took_s": round(took_s),
        "gathers": total.gathers,
        "cases": total.cases,
        "refused_calls": total.refused,
        "launches": total.launches,
        "failures": total.failures,
        "gathers_by": dict(sorted(total.counts.items())),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{where['date']}-fuzz.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"recorded in {path.relative_to(ROOT)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=_COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--gathers",
        type=int,
        default=10000,
        help="at least how many (default: 10000)",
    )
    parser.add_argument(
        "--deadline-s", type=float, default=3600, help="stop after this time (default: 3600)"
    )
    parser.add_argument("--first", type=int, help="the first seed (default: random, and printed)")
    parser.add_argument("--seed", type=int, help="run only the case with this seed")
    parser.add_argument(
        "--no-record",
        dest="record",
        action="store_false",
        help="keep the record of this day",
    )
    options = parser.parse_args()
    if options.gathers < 1:
        parser.error(f"--gathers is {options.gathers}; it must be a whole number, 1 or more")
    return options


if __name__ == "__main__":
    run_command(main)
