"""The parts of live panels: typed lengths, a figure that is redrawn, the newest setting."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
from typing import Any

import ipywidgets
import plotly.graph_objects as go
import pytest

from cpkit.control.messages import Workload
from cpkit.notebook import show, style
from cpkit.notebook.controls import parse_lengths
from cpkit.notebook.intervals import Intervals
from cpkit.notebook.live import LatestWins
from cpkit.notebook.panel import Panel
from cpkit.notebook.plot import LivePlot
from cpkit_lessons import figures
from cpkit_lessons.step_panel import waiting_figure
from tests.helpers.drawn import LAYOUT, Padded, sample
from tests.helpers.processes import until

BLANK = waiting_figure()


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("4096", (4096,)), (" 4097, 812 ", (4097, 812)), ("3*5,2 x 7", (5, 5, 5, 7, 7))],
)
def test_lengths_are_read(text: str, lengths: tuple[int, ...]) -> None:
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize("text", ["", "12,", "a", "-3", "1.5", "1025*1", "0x10*3", "9" * 12])
def test_other_lengths_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"lengths .*(for example 4097|at most 1024)"):
        parse_lengths(text)


def test_the_panel_shows_layout_and_samples() -> None:
    panel = Panel()
    names = ("padded", "direct")
    workloads = [Workload(cp_size=4, lengths=(13, 9), algorithm=name) for name in names]
    panel.show_layout(workloads)
    rows = drawn(panel)["rows"].y
    assert tuple(rows) == workloads[0].layout().per_rank_actual_token
    intervals = Intervals(workloads, 5.0)
    for number in range(20):
        first_us, at_s = 10 if number < 10 else 20, number / 2
        assert not intervals.add(sample(first_us=first_us), at_s)
        assert intervals.add(sample(algorithm="direct", first_us=first_us / 2 - 1.5), at_s)
        panel.show(intervals.summaries(), [], number)
    traces = drawn(panel)
    assert list(traces["padded per rank"].y) == [20, 21, 22, 23] != list(rows)
    assert list(traces["padded"].y) == [13] * 15 + [23] * 5, "rolling, of the slowest rank"
    assert list(traces["padded"].x) == [float(number - 19) for number in range(20)]
    assert list(traces["padded p95"].y) == [13] * 10 + [23] * 10
    assert list(traces["wire"].y) == list(names)
    assert list(traces["wire"].x) == [21.5, 10]
    assert list(traces["to the first algorithm"].x) == [1, 0.5]
    assert list(traces["plan"].y) == [None], "not selected"
    panel.show_layout([Workload(cp_size=2, lengths=(13, 9))])
    traces = drawn(panel)
    assert list(traces["padded"].y) == [None], "a new history"
    assert list(traces["to the first algorithm"].x) == [1]
    assert "cp_size 2" in panel.still().layout.title.text
    assert "uid" not in json.dumps(show.bundle(panel.still())), "a uid would differ between runs"
    panel.plot.close()


def test_a_view_that_stays_the_same_is_not_published_again() -> None:
    panel, work = Panel(), Workload(cp_size=4, lengths=(13, 9), algorithm="padded")
    panel.show_layout([work])
    intervals = Intervals([work], 5.0)
    changes = {}
    for view in ("times", "tokens", "pool", "bandwidth"):
        panel.choose(view)
        before = panel.plot.revision
        for first_us in (10, 20):
            intervals.add(sample(first_us=first_us), first_us)
            panel.show(intervals.summaries(), [], first_us)
        changes[view] = panel.plot.revision - before
    assert changes == {"times": 2, "tokens": 0, "pool": 0, "bandwidth": 2}
    panel.plot.close()


def test_a_panel_is_drawn_without_torch_pandas_and_plotly_in_the_kernel() -> None:
    code = """import sys
from cpkit.control.messages import Workload
from cpkit.notebook.explorer import Panel
Panel().show_layout([Workload(cp_size=2, lengths=(64,))])
print({"torch", "pandas", "plotly"} & {*sys.modules})"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n", "importing one of them takes a second or more"


def drawn(panel: Panel) -> dict[str, Any]:
    """Return the traces of what is shown, by name. Plotly has checked them."""
    return {trace.name: trace for trace in panel.still().data}


def test_a_published_figure_is_the_state_of_the_plot() -> None:
    plot = LivePlot(figures.stage_grid(Padded()))
    assert shown(plot)["revision"] == 1, "a view that opens now shows the first figure"
    figure = figures.ownership_strip(LAYOUT)
    plot.publish(figure)
    state = shown(plot)
    assert state["revision"] == plot.revision == 2
    assert go.Figure(state["data"], state["layout"]).data == figure.data
    assert state["alt"] == style.text_alternative(figure)
    assert state["layout"]["uirevision"], "without it, each update would reset the zoom"
    plot.close()


def test_figures_that_arrive_too_fast_are_skipped() -> None:
    plot = LivePlot(BLANK)
    plot.publish(BLANK)
    assert not plot.is_due()
    until(plot.is_due, timeout_s=1)
    plot.close()


def test_one_library_serves_all_plots_even_after_all_widgets_were_closed() -> None:
    first, second = LivePlot(BLANK), LivePlot(BLANK)
    assert first.plotly_library is second.plotly_library
    script = gzip.decompress(first.plotly_library.gzip)
    assert script.startswith(b"/**\n* plotly.js"), "of the installed package, not of a CDN"
    assert len(first.plotly_library.gzip) < 2_000_000
    ipywidgets.Widget.close_all()
    assert LivePlot(BLANK).plotly_library.comm is not None
    ipywidgets.Widget.close_all()


def shown(plot: LivePlot) -> dict[str, Any]:
    """Return what a view of the plot reads now."""
    state = plot.get_state()
    assert state["plot_state"] == f"IPY_MODEL_{plot.plot_state.model_id}"
    return json.loads(plot.plot_state.get_state()["figure"])


def test_the_newest_setting_wins() -> None:
    begun, failures, go_on = [], [], threading.Event()

    def work(setting: int, is_newest: object) -> None:
        begun.append(setting)
        if setting == 0:
            go_on.wait(5)
        if setting == 9:
            raise RuntimeError("nine")

    worker = LatestWins("test", work, failures.append)
    worker.submit(0)
    until(lambda: begun == [0])
    for setting in range(1, 10):
        worker.submit(setting)
    go_on.set()
    until(lambda: len(failures) == 1)
    assert begun == [0, 9], "settings 1 to 8 were overtaken"
    worker.submit(10)
    until(lambda: begun[-1] == 10)
    assert worker.close(), "a failure does not end the thread; close does"
