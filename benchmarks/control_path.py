"""How long a notebook waits for its workers: `python -m benchmarks.control_path [--json PATH]`.

Starts its own workers in its own runtime directory, and stops them. Prints one row per figure:
median, 95th percentile, and the goal for two cores. Idle is the CPU time of the busiest worker
without requests, in percent of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path

import psutil

import cpkit
from benchmarks.goals import entry
from cpkit.control import launcher
from cpkit.control.launch_options import Launch
from cpkit.processes import process_id, run_command
from cpkit.timing import percentile

ROOT = Path(__file__).parents[1]
INTERVAL_S = 0.01
IDLE_S = 10.0
IDLE = "idle worker, of one core"
GOALS = {
    "launch to ready, 4 workers": (15_000, "ms"),
    "connect to running workers": (1_000, "ms"),
    "the same in a fresh process": (1_000, "ms"),
    "status round trip": (1, "ms"),
    "cp_size change to first sample": (60, "ms"),
    "next sample of a stream, 10 ms apart": (20, "ms"),
    IDLE: (1, "%"),
}


def timed_ms(action: Callable[[], object]) -> float:
    """Return the milliseconds that a call takes."""
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def launch_ms() -> float:
    """Time from the start of the agent to the first reply of the workers, which keep running."""

    def start_and_ask() -> None:
        settings = Launch(name="bench", nproc=4, owner=process_id())
        launcher.wait_until_ready(launcher.start(settings), settings)
        launcher.require("bench").close()

    return timed_ms(start_and_ask)


def connect_ms() -> float:
    """Time one `connect` and `close` in this process."""
    return timed_ms(lambda: cpkit.connect("bench", launch=False).close())


def fresh_connect_ms() -> float:
    """Time `connect` in a new process, including its imports."""
    code = "import time; t = time.perf_counter(); import cpkit; "
    code += "cpkit.connect('bench', launch=False); print((time.perf_counter() - t) * 1e3)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def first_sample_ms(lab: cpkit.Lab, cp_size: int, tokens: int) -> float:
    """Time from a request with another cp_size, as a slider sends it, to its first sample."""
    stream = lab.measure([tokens], cp_size)
    took_ms = timed_ms(lambda: next(stream))
    stream.close()
    return took_ms


def streamed_ms(lab: cpkit.Lab, samples: int, tokens: int) -> list[float]:
    """Time between consecutive samples of one measurement at its shortest interval."""
    stream = lab.measure([tokens], samples=samples + 1, interval_s=INTERVAL_S)
    next(stream)
    times_ms = [timed_ms(lambda: next(stream)) for _ in range(samples)]
    stream.close()
    return times_ms


def idle_percent(lab: cpkit.Lab) -> float:
    """Return the CPU time of the busiest worker without requests, in percent of one core."""
    workers = [psutil.Process(worker.pid) for worker in lab.status().workers]
    before_s, start = [_used_s(worker) for worker in workers], time.perf_counter()
    time.sleep(IDLE_S)
    took_s = time.perf_counter() - start
    pairs = zip(workers, before_s, strict=True)
    return max(100 * (_used_s(worker) - before) / took_s for worker, before in pairs)


def _used_s(process: psutil.Process) -> float:
    """Return the CPU time in ns from Linux's scheduler, or otherwise in ticks of 10 ms."""
    threads = list(Path(f"/proc/{process.pid}/task").glob("*/schedstat"))
    if threads:
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9
    return float(sum(process.cpu_times()[:2]))


def measure(rounds: int, tokens: int) -> Iterator[tuple[str, list[float]]]:
    """Yield every figure with all its samples."""
    names = iter(GOALS)
    yield next(names), [launch_ms()]
    with cpkit.connect("bench", launch=False) as lab:
        yield next(names), [connect_ms() for _ in range(20)]
        yield next(names), [fresh_connect_ms() for _ in range(5)]
        yield next(names), [timed_ms(lab.status) for _ in range(50 * rounds)]
        for cp_size in lab.cp_sizes:  # the first use of a cp_size creates its groups
            first_sample_ms(lab, cp_size, tokens)
        sizes = islice(cycle(lab.cp_sizes), rounds * len(lab.cp_sizes))
        yield next(names), [first_sample_ms(lab, cp_size, tokens) for cp_size in sizes]
        yield next(names), streamed_ms(lab, 10 * rounds, tokens)
        yield next(names), [idle_percent(lab) for _ in range(3)]
        lab.stop()


def row(name: str, samples: list[float]) -> dict[str, object]:
    """Return the row of one figure."""
    goal, unit = GOALS[name]
    p50, below = statistics.median(samples), name == IDLE
    (judged,) = entry(name, {(0, 0): p50}, goal, max, strict=below)
    return {
        "what": name,
        "p50": round(p50, 3),
        "p95": round(percentile(samples, 95), 3),
        "min": round(min(samples), 3),
        "goal": goal,
        "unit": unit,
        "below": below,
        "reached": judged["met"],
        "samples": len(samples),
    }


def main() -> int:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="repetitions of each figure (10)")
    parser.add_argument("--tokens", type=int, default=4096, help="of the slider's workload (4096)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cpkit-bench-") as directory:
        os.environ["JUPYTER_RUNTIME_DIR"] = directory
        rows = [row(*figure) for figure in measure(options.rounds, options.tokens)]
    print(f"{'what':38} {'p50':>10} {'p95':>10} {'goal':>8} unit {'samples':>8}")
    for r in rows:
        mark = "" if r["reached"] else "  MISSED"
        print(
            f"{r['what']:38} {r['p50']:>10} {r['p95']:>10} {r['goal']:>8} {r['unit']:4} "
            f"{r['samples']:>8}{mark}"
        )
    if options.json:
        report = {
            "taken": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
            "cpkit": cpkit.__version__,
            "workload": f"{options.tokens} tokens, 8 heads of 128 bfloat16, K and V, direct",
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
