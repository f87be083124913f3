"""Shared by the benchmarks: start ranks and write the record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cpkit.control.tied import tied

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def on_ranks(cp_size: int, module: str, *arguments: object) -> Any:
    """Run a module on `cp_size` ranks; return the content of the file that rank 0 wrote."""
    with TemporaryDirectory() as directory:
        output = Path(directory) / "samples.json"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cp_size}"]
        launch += [f"--log-dir={directory}", "-m", module, str(output)]
        run_here([*launch, *map(str, arguments)])
        return json.loads(output.read_text())


def run_here(arguments: list[str], *, quiet: bool = False) -> None:
    """Run this Python with these arguments from the repository root. A failure is an error."""
    subprocess.run(
        tied([sys.executable, *arguments], signal.SIGTERM),  # on which torchrun ends its ranks
        cwd=ROOT,
        check=True,
        timeout=1200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL if quiet else None,
    )


def say(text: str) -> None:
    """Print progress to stderr, because stdout has the figures."""
    print(text, file=sys.stderr, flush=True)


def keep(record: dict[str, Any], kind: str, fill_pages: Callable[[Path, Path], None]) -> None:
    """Write the dated record, and its figures into the pages that show them."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{record['environment']['date']}-{kind}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    fill_pages(ROOT, path)
    print(f"recorded in {path.relative_to(ROOT)}, figures in README.md and docs/performance.md")
