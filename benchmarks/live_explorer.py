"""Measure how live the explorer is, in a real JupyterLab in a real Chromium.

    python -m benchmarks.live_explorer [--lengths 256,64] [--changes 20] [--minutes 10] [--record]

Four workers and four algorithms. Prints the drawn figures per second, the widget messages and bytes
per figure, the time from the cell to the first measured figure, and the time from a key press on
the cp_size slider to the first figure with a measured point of the new setting. With `--minutes`,
the panel then streams, and the memory of kernel, workers and page is read after each minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import sync_playwright

from benchmarks.launch import RESULTS, ROOT, say
from benchmarks.live_plots import server
from benchmarks.machine import environment
from cpkit.notebook.show import find_browser
from cpkit.processes import run_command
from cpkit.timing import percentile
from tests.helpers.notebook_page import CHROMIUM_FLAGS, NotebookPage
from tools.source import Cell

COMMAND = "python -m benchmarks.live_explorer"
SECONDS = 10
ALGORITHMS = ["padded", "padded_symm", "direct", "plan"]
COUNT = """
import json, time
import cpkit
from ipywidgets.widgets.widget import Widget
lab, sent, send = cpkit.connect(launch=False), [], Widget._send
def counted(self, message, buffers=None):
    sent.append(len(json.dumps(message, default=str)))
    return send(self, message, buffers)
Widget._send = counted
"""
READ = f"""
first, revision = len(sent), panel.plot.revision
time.sleep({SECONDS})
print(json.dumps([sent[first:], panel.plot.revision - revision]))
"""
PIDS = "import os; print([os.getpid(), *[worker.pid for worker in lab.status().workers]])"
# Records when a figure is drawn, and since when the newest setting has a measured point.
WATCH = """name => {
    const plot = document.querySelector(".js-plotly-plot");
    globalThis.drawn = [];
    globalThis.settings = {};
    document.addEventListener("keydown", () => { globalThis.pressed = performance.now(); }, true);
    const look = () => {
        drawn.push(performance.now());
        const trace = plot._fullData.find((trace) => trace.name === name);
        if (trace.y.some((value) => value > 0)) {
            settings[plot.layout.title.text.split(" · ")[0]] ??= performance.now();
        }
    };
    new MutationObserver(look).observe(plot, { attributeFilter: ["data-revision"] });
    look();
}"""


def main() -> int:
    """Print all figures."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", default="256,64", help="tokens per sequence")
    parser.add_argument("--changes", type=int, default=20, help="changes of cp_size")
    parser.add_argument("--minutes", type=int, default=0, help="how long it streams at the end")
    parser.add_argument("--record", action="store_true", help="write a file in benchmarks/results")
    options = parser.parse_args()
    command = f"{COMMAND} --lengths {options.lengths} --changes {options.changes}"
    where = environment(f"{command} --minutes {options.minutes}")
    lengths = [int(length) for length in options.lengths.split(",")]
    with (
        tempfile.TemporaryDirectory(prefix="live-explorer-") as home,
        server(Path(home)) as lab,
        sync_playwright() as engine,
    ):
        chromium = engine.chromium.launch(executable_path=find_browser(), args=CHROMIUM_FLAGS)
        page = chromium.new_page(viewport={"width": 1400, "height": 1400})
        page.set_default_timeout(60_000)
        notebook = NotebookPage(page, lab)
        panel = f"panel = lab.explore({lengths}, algorithms={ALGORITHMS})\npanel"
        cells = {"setup": COUNT, "panel": panel, "read": READ, "pids": PIDS, "last": ""}
        notebook.open("explorer", [Cell(id_, "code", text) for id_, text in cells.items()])
        notebook.run("setup")
        found = {"first_figure_ms": round(first_figure_ms(notebook))}
        say(f"first measured figure: {found['first_figure_ms']:,} ms after the cell")
        found |= rates(notebook) | changes(notebook, options.changes)
        found |= streaming(notebook, options.minutes)
        chromium.close()
    print(json.dumps(found, indent=1))
    if options.record:
        path = RESULTS / f"{where['date']}-live-explorer.json"
        path.write_text(json.dumps({"environment": where, **found}, indent=1) + "\n")
        say(f"recorded in {path.relative_to(ROOT)}")
    return 0


def first_figure_ms(notebook: NotebookPage) -> float:
    """Run the panel's cell, and return when its first measured figure was drawn."""
    page = notebook.page
    began = page.evaluate("performance.now()")
    notebook.run("panel")
    page.wait_for_selector(".js-plotly-plot[data-revision]", state="attached")
    page.evaluate(WATCH, ALGORITHMS[0])
    page.wait_for_function("Object.keys(settings).length")
    return float(page.evaluate("Object.values(settings)[0]")) - float(began)


def rates(notebook: NotebookPage) -> dict[str, float]:
    """Return the figures per second, and their messages and bytes."""
    before = notebook.page.evaluate("drawn.length")
    notebook.run("read")
    after: Any = notebook.page.evaluate("drawn.length")
    text = notebook.cell("read").locator(".jp-OutputArea-output").inner_text()
    sizes, published = json.loads(text)
    return {
        "published_per_s": published / SECONDS,
        "drawn_per_s": (after - before) / SECONDS,
        "messages_per_figure": round(len(sizes) / published, 1),
        "kb_per_figure": round(sum(sizes) / published / 1000, 1),
    }


def changes(notebook: NotebookPage, count: int) -> dict[str, float]:
    """Move the cp_size slider by key, and return the time to the first measured figure."""
    page, times_ms = notebook.page, []
    for number in range(count):
        cp_size, key = (2, "ArrowLeft") if number % 2 == 0 else (4, "ArrowRight")
        notebook.cell("panel").locator(".cp-size .noUi-handle").focus()
        page.evaluate("() => { globalThis.settings = {}; }")
        page.keyboard.press(key)
        page.wait_for_function(f"settings['cp_size {cp_size}'] > pressed")
        times_ms.append(page.evaluate(f"settings['cp_size {cp_size}'] - pressed"))
    return {
        "change_median_ms": round(statistics.median(times_ms)),
        "change_p95_ms": round(percentile(times_ms, 95)),
    }


def streaming(notebook: NotebookPage, minutes: int) -> dict[str, Any]:
    """Return the memory after each minute, and its growth after the first one."""
    if not minutes:
        return {}
    notebook.run("pids")
    text = notebook.cell("pids").locator(".jp-OutputArea-output").inner_text()
    kernel, *workers = [psutil.Process(pid) for pid in json.loads(text)]
    inspector = notebook.page.context.new_cdp_session(notebook.page)
    inspector.send("Performance.enable")
    rows = []
    for _ in range(minutes):
        notebook.cell("panel").locator(".cp-size .noUi-handle").focus()
        notebook.page.keyboard.press("Shift")  # a touch, without which it slows down
        notebook.page.wait_for_timeout(60_000)
        inspector.send("HeapProfiler.collectGarbage")
        metrics = inspector.send("Performance.getMetrics")["metrics"]
        heap = next(each["value"] for each in metrics if each["name"] == "JSHeapUsedSize")
        sizes = {"kernel": uss(kernel), "workers": sum(map(uss, workers)), "page": heap}
        rows.append({name: round(size / 1e6, 1) for name, size in sizes.items()})
        say(f"minute {len(rows)}, MB: {rows[-1]}")
    growth = {name: round(rows[-1][name] / rows[0][name] - 1, 4) for name in rows[0]}
    return {"minutes_mb": rows, "growth": growth}


def uss(process: psutil.Process) -> int:
    """Return the bytes of memory that only this process uses."""
    return int(process.memory_full_info().uss)


if __name__ == "__main__":
    run_command(main)
