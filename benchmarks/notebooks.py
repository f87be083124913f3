"""Run the committed notebooks on this machine, and record device, times and errors.

    python -m benchmarks.notebooks [--nproc 4] [--no-record] [01 02 03]

The notebooks choose their device: on a machine with a GPU, their ranks run on it. The record has
the output of the first cell (device, ranks, tier), the time of each notebook, and all errors. It is
written only if all notebooks run.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import nbformat
import torch

from benchmarks.gpu import gpu_environment
from benchmarks.launch import RESULTS, ROOT, say
from benchmarks.machine import environment
from cpkit.processes import run_command
from tools import run

COMMAND = "python -m benchmarks.notebooks"


def main() -> int:
    """Return 1 if a cell of any notebook failed."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("notebooks", nargs="*", help="how their names begin; default: all")
    parser.add_argument("--nproc", type=int, help="ranks (default: each notebook starts four)")
    parser.add_argument("--no-record", action="store_true", help="print, but write no file")
    options = parser.parse_args()
    wanted = tuple(options.notebooks or [""])
    paths = [p for p in sorted(ROOT.glob("notebooks/*.ipynb")) if p.stem.startswith(wanted)]
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    command = f"{COMMAND} --nproc {options.nproc}" if options.nproc else COMMAND
    where = gpu_environment() if kind == "gpu" else environment(command, "cpu")
    record = {
        "environment": {**where, "command": command},
        "notebooks": [ran(path, options.nproc) for path in paths],
    }
    for each in record["notebooks"]:
        print(f"{each['name']}: {each['code_cells']} code cells, {each['took_s']:.0f} s,", end=" ")
        print(f"{len(each['errors'])} failed {each['errors'] or ''}")
    if not (options.no_record or options.notebooks):
        device = f"{torch.cuda.device_count()}-gpu" if kind == "gpu" else "cpu"
        name = f"{where['date']}-notebooks-{options.nproc or 4}-ranks-{device}.json"
        path = RESULTS / name
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"recorded in {path.relative_to(ROOT)}")
    return int(any(each["errors"] for each in record["notebooks"]))


def ran(path: Path, nproc: int | None) -> dict[str, Any]:
    """Run one notebook to its end, also after a cell has failed."""
    say(f"{path.stem} ...")
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    start_s = time.monotonic()
    with run.workers(nproc) as variables:
        run.execute(notebook, path.parent, variables, allow_errors=True)
    took_s = time.monotonic() - start_s
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    slowest = sorted(code, key=run.seconds, reverse=True)[:3]
    return {
        "name": path.stem,
        "code_cells": len(code),
        "took_s": round(took_s, 1),
        "slowest_s": {cell.id: round(run.seconds(cell), 1) for cell in slowest},
        "said": printed(next(cell for cell in code if cell.id == "connect")),
        "errors": [error for cell in code if (error := error_of(cell))],
    }


def printed(cell: Any) -> str:
    """Return what a cell wrote to its standard output."""
    return "".join(o["text"] for o in cell.outputs if o["output_type"] == "stream")


def error_of(cell: Any) -> str:
    """Return the cell's id and its error, or "" if it did not fail."""
    for output in cell.outputs:
        if output["output_type"] == "error":
            return f"{cell.id}: {output['ename']}: {output['evalue']}"[:300]
    return ""


if __name__ == "__main__":
    run_command(main)
