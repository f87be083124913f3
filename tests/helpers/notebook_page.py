"""A notebook in a real JupyterLab page: write its cells, run them, and read its plots.

A plot is judged by its points: what plotly.js has drawn must equal a figure that the kernel
published. The kernel writes each published figure to a file (`RECORD`), which does not go through
the page.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from tests.helpers.lab_server import JupyterLab
from tools import run
from tools.source import Cell

Found = TypeVar("Found")
CHROMIUM_FLAGS = [
    "--no-sandbox",  # root in a container cannot create one; the page is our own
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
# anywidget reports this for a model whose module was evaluated late. A live plot does not need the
# model's messages.
HARMLESS = ("[anywidget] Failed to initialize model",)

# Run in the kernel. `record(panel, "pool")` writes each figure to sent/pool.RUN.REVISION.json.
RECORD = """
import json
from collections import Counter
from pathlib import Path

runs = globals().get("runs", Counter())
Path("sent").mkdir(exist_ok=True)

def record(panel, name):
    runs[name] += 1
    run = runs[name]
    def write(figure):
        revision = json.loads(figure)["revision"]
        Path(f"sent/{name}.{run}.{revision}.json").write_text(figure)
    state = getattr(panel, "panel", panel).plot.plot_state
    state.observe(lambda change: write(change.new), "figure")
    write(state.figure)
"""

READ_PLOTS = """cell => [...cell.querySelectorAll('.js-plotly-plot')].map(plot => ({
    revision: Number(plot.dataset.revision),
    title: plot.layout?.title?.text,
    label: plot.getAttribute('aria-label'),
    width: plot.clientWidth,
    paper: plot._fullLayout.paper_bgcolor,
    subtitle: plot._fullLayout.title.subtitle?.text ?? '',
    range: plot._fullLayout.xaxis?.range,
    names: (plot._fullData ?? []).map(trace => trace.name),
    traces: (plot._fullData ?? []).map(trace => Object.fromEntries(
        ['x', 'y', 'z'].filter(key => trace[key]).map(key => [key, Array.from(trace[key])]))),
    marks: [...plot.querySelectorAll('.points path, .js-line, .heatmaplayer image')]
        .filter(mark => mark.tagName !== 'path' || (mark.getAttribute('d') ?? 'M0,0Z') !== 'M0,0Z')
        .length,
}))"""
# A plot that is scrolled away keeps its last drawing, and outputs above it may still grow.
SHOW_PLOT = """cell =>
    cell.querySelector('.js-plotly-plot')?.scrollIntoView({ block: 'nearest' })"""
PROMPT = "cell => cell.querySelector('.jp-InputPrompt').innerText"


class NotebookPage:
    """One page that shows one notebook at a time.

    JupyterLab stores the open notebooks of a workspace, and a reload opens them all: two pages of
    one server need two workspaces.
    """

    def __init__(self, page: Any, lab: JupyterLab, workspace: str = "") -> None:
        self.page, self.lab = page, lab
        self._path = f"lab/workspaces/{workspace}/tree" if workspace else "lab/tree"
        self.errors: list[str] = []
        self.console: list[str] = []
        self.runs: dict[str, int] = {}  # how often each cell was run
        self._cells: list[str] = []
        page.on("pageerror", lambda error: self._report(f"uncaught: {error}"))
        page.on("console", self._listen)

    def open(self, name: str, cells: Sequence[Cell]) -> None:
        """Write a notebook of these cells and open it."""
        notebook = run.notebook_of(list(cells))
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook["metadata"]["kernelspec"] = kernel
        (self.lab.notebooks / f"{name}.ipynb").write_text(json.dumps(notebook))
        for figure in self.lab.notebooks.glob("sent/*.json"):
            figure.unlink()
        self._cells, self.runs = [cell.id for cell in cells], {}
        self.page.goto(self.lab.url(f"{self._path}/{name}.ipynb") + "&reset")
        self.wait_for_kernel()

    def reload(self) -> None:
        """Save the notebook and reload the page. The kernel keeps running."""
        self.page.keyboard.press("Control+s")
        saved = self.page.locator(".jp-mod-dirty")
        self.until(lambda: saved.count() == 0, 60, "the notebook is saved")
        self.page.reload()
        self.wait_for_kernel()

    def wait_for_kernel(self) -> None:
        """Wait until the page is connected to an idle kernel."""
        status = self.page.locator("#jp-main-statusbar")
        self.until(
            lambda: status.count() and "| Idle" in status.inner_text(), 90, "the kernel is idle"
        )
        self.until(lambda: self.cell(self._cells[-1]).count(), 60, "the notebook is shown")

    def cell(self, id_: str) -> Any:
        """Return the locator of a cell."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(self._cells.index(id_))

    def run(self, id_: str, source: str | None = None, timeout_s: float = 60.0) -> None:
        """Run a cell, with another source if one is given, and wait until it has ended."""
        cell = self.cell(id_)
        before = cell.evaluate(PROMPT)
        cell.locator(".cm-content").click()
        if source is not None:
            self.page.keyboard.press("Control+a")
            self.page.keyboard.insert_text(source)
        self.page.keyboard.press("Control+Enter")
        self._wait_for_end(id_, before, timeout_s)
        self.runs[id_] = self.runs.get(id_, 0) + 1

    def run_all(self, *ids: str, timeout_s: float = 60.0) -> None:
        """Run all cells at once, and wait until these have ended."""
        prompts = {id_: self.cell(id_).evaluate(PROMPT) for id_ in ids}
        self.command("notebook:run-all-cells")
        for id_, before in prompts.items():
            self._wait_for_end(id_, before, timeout_s)
            self.runs[id_] = self.runs.get(id_, 0) + 1

    def show_page(self, visible: bool) -> None:
        """Tell the page that it is shown or hidden. Headless Chromium shows all its pages."""
        state = "visible" if visible else "hidden"
        self.page.evaluate(
            """state => {
                const get = () => state;
                Object.defineProperty(document, "visibilityState", { get, configurable: true });
                document.dispatchEvent(new Event("visibilitychange"));
            }""",
            state,
        )

    def command(self, name: str, **options: object) -> None:
        """Start a command of JupyterLab; at its end, `commandEnded` of the page becomes true."""
        start = """([name, options]) => {
            globalThis.commandEnded = false;
            jupyterapp.commands.execute(name, options).then(() => { commandEnded = true });
        }"""
        self.page.evaluate(start, [name, options])

    def accessible(self, element: Any, roles: set[str]) -> list[tuple[str, str]]:
        """Return role and name of an element's parts, from the accessibility tree."""
        element.evaluate("element => { globalThis.inspected = element; }")
        browser = self.page.context.new_cdp_session(self.page)
        found = browser.send("Runtime.evaluate", {"expression": "inspected"})
        object_id = found["result"]["objectId"]
        nodes = browser.send("Accessibility.queryAXTree", {"objectId": object_id})["nodes"]
        browser.detach()

        def text(node: dict[str, Any], key: str) -> str:
            return str(node.get(key, {}).get("value", ""))

        return [
            (text(node, "role"), text(node, "name").strip())
            for node in nodes
            if text(node, "role").lower() in roles
        ]

    def plots(self, id_: str) -> list[dict[str, Any]]:
        """Return what plotly.js has drawn in the output of a cell."""
        plots: list[dict[str, Any]] = self.cell(id_).evaluate(READ_PLOTS)
        return plots

    def wait_for_plot(
        self,
        id_: str,
        timeout_s: float = 60.0,
        *,
        created_by: str = "",
        such: Callable[[dict[str, Any]], bool] = lambda plot: True,
    ) -> dict[str, Any]:
        """Wait until a cell shows one plot, with the points that the kernel sent.

        `created_by` is the cell of the widget, if it is another one. `such` is a condition.
        """
        name = created_by or id_

        def right() -> dict[str, Any] | None:
            self.cell(id_).evaluate(SHOW_PLOT)
            plots = self.plots(id_)
            if len(plots) != 1 or self.difference(name, plots[0]) or not such(plots[0]):
                return None
            return plots[0]

        def found() -> str:
            return "; ".join(self.difference(name, plot) for plot in self.plots(id_)) or "no plot"

        self.cell(id_).scroll_into_view_if_needed(timeout=timeout_s * 1000)  # else it waits
        return self.until(right, timeout_s, f"{id_} shows the points that were sent", found)

    def difference(self, name: str, plot: dict[str, Any]) -> str:
        """Say how a plot differs from the figure of the same revision; "" if it does not."""
        file = self.lab.notebooks / "sent" / f"{name}.{self.runs[name]}.{plot['revision']}.json"
        try:
            sent = json.loads(file.read_text())
        except (OSError, json.JSONDecodeError):
            return f"no figure {file.name} was sent"
        expected = [_points(trace) for trace in sent["data"]]
        if plot["traces"] != expected:
            return f"revision {plot['revision']}: drawn {plot['traces']}, sent {expected}"
        if not plot["marks"]:
            return f"revision {plot['revision']}: {len(expected)} traces, nothing drawn"
        return ""

    def until(
        self,
        condition: Callable[[], Found],
        timeout_s: float,
        why: str,
        found: Callable[[], object] = lambda: "",
    ) -> Found:
        """Return the first true value of `condition`; fail with `why` after the timeout."""
        deadline = time.monotonic() + timeout_s
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout_s:g} s: {why}. {found()}")
            self.page.wait_for_timeout(30)  # also delivers the page's events
        return value

    def _wait_for_end(self, id_: str, before: str, timeout_s: float) -> None:
        cell = self.cell(id_)
        self.until(
            lambda: (prompt := cell.evaluate(PROMPT)) != before and "*" not in prompt,
            timeout_s,
            f"cell {id_} ends",
        )
        error = cell.locator("[data-mime-type='application/vnd.jupyter.error']")
        assert not error.count(), error.first.inner_text()

    @contextlib.contextmanager
    def without_errors(self) -> Iterator[None]:
        """Fail if the page reports an error meanwhile."""
        self.errors.clear()
        yield
        assert not self.errors, "\n".join(self.errors)

    def describe(self) -> str:
        """Return the page, its console and the server's log, to find out why a test failed."""
        try:
            text = self.page.locator("body").inner_text(timeout=10_000)
        except Exception as problem:  # noqa: BLE001  the failure itself must still be reported
            text = f"the page did not answer: {problem}"
        console = "\n".join(self.console[-30:])
        return f"{text}\n--- console\n{console}\n--- JupyterLab\n{self.lab.text()[-3000:]}"

    def _listen(self, message: Any) -> None:
        self.console.append(f"{message.type}: {message.text}")
        if message.type == "error":
            self._report(f"{message.text} {message.location}")

    def _report(self, error: str) -> None:
        if not any(harmless in error for harmless in HARMLESS):
            self.errors.append(error)


def drawn(plot: dict[str, Any], name: str) -> dict[str, list[Any]]:
    """Return the coordinates of the trace of this name, as plotly.js has drawn it."""
    points: dict[str, list[Any]] = plot["traces"][plot["names"].index(name)]
    return points


def _points(trace: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the coordinates of a published trace. Plotly packs numpy arrays in base64."""
    return {key: _unpacked(trace[key]) for key in ("x", "y", "z") if trace.get(key)}


def _unpacked(values: Any) -> list[Any]:
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist()
    return list(values)
