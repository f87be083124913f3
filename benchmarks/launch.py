"""What both benchmarks do around their figures: start ranks, keep the record."""

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
    """Run a module on so many ranks; what rank 0 wrote to the file of its first argument."""
    with TemporaryDirectory() as directory:
        output = Path(directory) / "samples.json"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cp_size}"]
        launch += [f"--log-dir={directory}", "-m", module, str(output)]
        run_here([*launch, *map(str, arguments)])
        return json.loads(output.read_text())


def run_here(arguments: list[str], *, quiet: bool = False) -> None:
    """Run this Python with these arguments from the repository root; fails loudly."""
    subprocess.run(
        tied([sys.executable, *arguments], signal.SIGTERM),  # at which torchrun ends its ranks
        cwd=ROOT,
        check=True,
        timeout=1200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL if quiet else None,
    )


def say(text: str) -> None:
    """Progress, apart from the figures."""
    print(text, file=sys.stderr, flush=True)


def keep(record: dict[str, Any], kind: str, fill_pages: Callable[[Path, Path], None]) -> None:
    """Write the dated record, and put its figures into the pages that show them."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{record['environment']['date']}-{kind}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    fill_pages(ROOT, path)
    print(f"recorded in {path.relative_to(ROOT)}, figures in README.md and docs/performance.md")
