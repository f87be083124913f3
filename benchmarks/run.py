"""`make bench`: measure on this machine, print the figures with their ratios, record them.

    python -m benchmarks.run [--quick] [--cp-sizes 2,4] [--no-record]

Runs the gather benchmark once per cp_size under torchrun and the control-path benchmark against
real workers, writes benchmarks/results/DATE-cpu.json with machine and versions, and fills the
figures of README.md from that file.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import figures

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TOKENS = (256, 2048, 16384, 65536)
QUICK_TOKENS = (256, 16384)


def main() -> int:
    """Run everything; the exit code is 1 when something was wrong or failed."""
    parser = argparse.ArgumentParser(description="Measure cpkit on this machine.")
    parser.add_argument("--quick", action="store_true", help="two sizes only, nothing recorded")
    parser.add_argument("--cp-sizes", default="2,4", help="comma-separated, default 2,4")
    parser.add_argument("--no-record", action="store_true", help="print, but write no file")
    options = parser.parse_args()
    tokens = QUICK_TOKENS if options.quick else TOKENS
    rows: list[dict[str, Any]] = []
    for cp_size in [int(part) for part in options.cp_sizes.split(",")]:
        print(f"gather, cp_size {cp_size}, {len(tokens)} sizes ...", file=sys.stderr, flush=True)
        rows += gather_rows(cp_size, tokens)
    print("control path ...", file=sys.stderr, flush=True)
    record = {"environment": environment(), "gather": rows, "control": control_figures()}
    print(figures.as_text(record))
    if not (options.quick or options.no_record):
        keep(record)
    return 0


def gather_rows(cp_size: int, tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """One launch of the rank side."""
    with TemporaryDirectory() as directory:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cp_size}"]
        launch.append(f"--log-dir={directory}")
        output = Path(directory) / "rows.json"
        script = ["-m", "benchmarks.gather", str(output), *map(str, tokens)]
        run_here([*launch, *script])
        return list(json.loads(output.read_text()))


def control_figures() -> dict[str, Any]:
    """The control path against workers of its own."""
    with TemporaryDirectory() as directory:
        output = Path(directory) / "control.json"
        run_here(["-m", "benchmarks.control_path", "--json", str(output)], quiet=True)
        return dict(json.loads(output.read_text()))


def run_here(arguments: list[str], *, quiet: bool = False) -> None:
    """Run this Python with these arguments from the repository root; fails loudly."""
    subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        check=True,
        timeout=1200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL if quiet else None,
    )


def environment() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    return {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "command": "make bench",
        "commit": commit(),
        "device": "cpu",
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str:
    """The commit that was measured, marked when the tree had changes."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip() or "not a git checkout"


def processor() -> str:
    """The processor's name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def keep(record: dict[str, Any]) -> None:
    """Write the dated record and the README's figures."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{record['environment']['date']}-cpu.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    figures.fill_readme(ROOT / "README.md", path)
    print(f"recorded in {path.relative_to(ROOT)}, figures in README.md")


if __name__ == "__main__":
    sys.exit(main())
