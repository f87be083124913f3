"""Show each live widget many times beside busy loops, and count the plots that are blank or wrong.

    python -m benchmarks.live_plots [--busy-loops 12] [--displays 20] [--no-record]

A real JupyterLab in a real Chromium. Each round opens a new page with a new kernel, runs the cell
of each live widget (a fresh display), and runs each cell again (a re-run). Each busy loop has a
session of its own, because the scheduler groups the processes of one session. A plot is right if
the points that plotly.js has drawn equal the figure that the kernel published. Times count from
before the cell is selected and run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

import cpkit
from benchmarks.launch import RESULTS, ROOT, say
from benchmarks.machine import environment
from cpkit.notebook.show import find_browser
from cpkit.processes import run_command
from tests.helpers.lab_server import JupyterLab
from tests.helpers.live_widgets import LIVE_CELLS, WIDGETS, busy_loops
from tests.helpers.notebook_page import CHROMIUM_FLAGS, NotebookPage

COMMAND = "python -m benchmarks.live_plots"
LIMIT_S = 60.0
VERSIONS = ("anywidget", "ipywidgets", "jupyterlab", "plotly")


def main() -> int:
    """Return 1 if a plot was blank or wrong."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.partition("\n")[0])
    parser.add_argument("--busy-loops", type=int, default=12)
    parser.add_argument("--displays", type=int, default=20, help="fresh displays of each widget")
    parser.add_argument("--no-record", action="store_true", help="print, but write no file")
    options = parser.parse_args()
    command = f"{COMMAND} --busy-loops {options.busy_loops} --displays {options.displays}"
    where = environment(command)
    del where["open_mpi"]  # not part of this measurement
    where["versions"] = {name: importlib.metadata.version(name) for name in VERSIONS}
    displays = [d for page in pages(options.displays) for d in shown(page, options.busy_loops)]
    table = summary(displays)
    for row in table:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if not options.no_record:
        path = RESULTS / f"{where['date']}-live-plots.json"
        record = {"environment": where, "summary": table, "displays": displays}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"recorded in {path.relative_to(ROOT)}")
    return int(any(row["blank"] or row["wrong"] for row in table))


def pages(count: int) -> Iterator[NotebookPage]:
    """Yield new pages, each with a new kernel that has run the setup cell."""
    with (
        tempfile.TemporaryDirectory(prefix="live-plots-") as home,
        server(Path(home)) as lab,
        sync_playwright() as engine,
    ):
        chromium = engine.chromium.launch(executable_path=find_browser(), args=CHROMIUM_FLAGS)
        for number in range(1, count + 1):
            page = chromium.new_page(viewport={"width": 1400, "height": 1000})
            page.set_default_timeout(LIMIT_S * 1000)
            notebook = NotebookPage(page, lab)
            notebook.open(f"live-{number}", LIVE_CELLS)
            notebook.run("setup")
            notebook.run("scratch", "idle_s = 15")
            say(f"page {number} of {count}")
            yield notebook
            lab.end_kernels()
            page.close()
        chromium.close()


@contextmanager
def server(home: Path) -> Iterator[JupyterLab]:
    """Run a JupyterLab and four workers that all its kernels share."""
    runtime = home / "runtime"
    runtime.mkdir(mode=0o700)
    os.environ["JUPYTER_RUNTIME_DIR"] = str(runtime)
    with cpkit.connect("live-plots", nproc=4) as workers:
        lab = JupyterLab(home, runtime, "live-plots")
        try:
            lab.wait()
            yield lab
        finally:
            lab.stop()
            workers.stop()


def shown(notebook: NotebookPage, loops: int) -> Iterator[dict[str, Any]]:
    """Show each widget twice beside busy loops: fresh, then re-run."""
    with busy_loops(loops):
        for kind in ("fresh", "re-run"):
            for widget in WIDGETS:
                start_s = time.monotonic()
                notebook.run(widget, timeout_s=LIMIT_S)
                result = "right"
                try:
                    notebook.wait_for_plot(widget, LIMIT_S)
                except AssertionError as problem:
                    plots = notebook.plots(widget)
                    result = "wrong" if any(plot["marks"] for plot in plots) else "blank"
                    say(f"{widget}, {kind}: {result}. {str(problem)[:300]}")
                took_s = round(time.monotonic() - start_s, 2)
                yield {"widget": widget, "kind": kind, "result": result, "took_s": took_s}


def summary(displays: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per widget and kind of display."""
    rows = []
    for widget in WIDGETS:
        for kind in ("fresh", "re-run"):
            group = [d for d in displays if (d["widget"], d["kind"]) == (widget, kind)]
            results = [display["result"] for display in group]
            times_s = [d["took_s"] for d in group if d["result"] == "right"]
            rows.append(
                {
                    "widget": widget,
                    "kind": kind,
                    "displays": len(group),
                    "blank": results.count("blank"),
                    "wrong": results.count("wrong"),
                    "median_s": round(statistics.median(times_s), 2) if times_s else None,
                    "max_s": max(times_s, default=None),
                }
            )
    return rows


if __name__ == "__main__":
    run_command(main)
