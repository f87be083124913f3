"""Measure how live the explorer is, in a real JupyterLab in a real Chromium.

    python -m benchmarks.live_explorer [--lengths 256,64] [--changes 20]

Four workers and four algorithms. Prints the drawn figures per second, the widget messages and bytes
per figure, the time from the cell to the first measured figure, and the time from a key press on
the cp_size slider to the first figure with a measured point of the new setting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from benchmarks.live_plots import server
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
    options = parser.parse_args()
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
        cells = {"setup": COUNT, "panel": panel, "read": READ, "last": ""}
        notebook.open("explorer", [Cell(id_, "code", text) for id_, text in cells.items()])
        notebook.run("setup")
        print(f"first measured figure: {first_figure_ms(notebook):,.0f} ms after the cell")
        for line in (*rates(notebook), *changes(notebook, options.changes)):
            print(line)
        chromium.close()
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


def rates(notebook: NotebookPage) -> list[str]:
    """Return the figures per second, and their messages and bytes."""
    before = notebook.page.evaluate("drawn.length")
    notebook.run("read")
    after: Any = notebook.page.evaluate("drawn.length")
    text = notebook.cell("read").locator(".jp-OutputArea-output").inner_text()
    sizes, published = json.loads(text)
    return [
        (
            f"figures: {published / SECONDS:.1f} published, {(after - before) / SECONDS:.1f} drawn "
            f"per second"
        ),
        (
            f"per published figure: {len(sizes) / published:.1f} messages, "
            f"{sum(sizes) / published / 1000:.1f} kB"
        ),
    ]


def changes(notebook: NotebookPage, count: int) -> list[str]:
    """Move the cp_size slider by key, and return the time to the first measured figure."""
    page, times_ms = notebook.page, []
    for number in range(count):
        cp_size, key = (2, "ArrowLeft") if number % 2 == 0 else (4, "ArrowRight")
        notebook.cell("panel").locator(".cp-size .noUi-handle").focus()
        page.evaluate("() => { globalThis.settings = {}; }")
        page.keyboard.press(key)
        page.wait_for_function(f"settings['cp_size {cp_size}'] > pressed")
        times_ms.append(page.evaluate(f"settings['cp_size {cp_size}'] - pressed"))
    median_ms, p95_ms = statistics.median(times_ms), percentile(times_ms, 95)
    shown = f"median {median_ms:.0f} ms, p95 {p95_ms:.0f} ms, of {count} changes"
    return [f"key on the slider to the first measured figure: {shown}"]


if __name__ == "__main__":
    run_command(main)
