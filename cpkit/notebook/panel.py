"""The explorer's figure: a plain dictionary of the chosen view, built anew for each redraw."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpkit.algorithms import ALGORITHM_CHOICES
from cpkit.control.messages import Workload
from cpkit.notebook import style, views
from cpkit.notebook.intervals import Comparison, Summary
from cpkit.notebook.plot import LivePlot
from cpkit.timing import Ratio

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from cpkit.batch import Batch

HISTORY = 120  # points per line of the history
_GREY = "#8c959f"
_SAME = Ratio(1.0, 1.0, 1.0)  # of the first algorithm to itself
_UNMEASURED = ((0.0, None, None),)  # plotly.js removes the axes of a trace without points
Points = Sequence[tuple[float, float | None, float | None]]  # time, rolling median, p95


class Panel:
    """The plot of the chosen view: `times`, or one of `views`.

    One thread updates it and publishes it; other threads choose the view, and read it with
    `still()`.
    """

    def __init__(self, algorithms: Sequence[str] = ALGORITHM_CHOICES) -> None:
        self.view = "times"
        self.model: views.Model | None = None
        self.floor_us: float | str | None = None  # a text says why there is none
        self.pool: pd.DataFrame | None = None
        self.sweeps: dict[str, pd.DataFrame | str] = {}  # by view; a text says why there is none
        self.summaries: Sequence[Summary] = ()
        self._algorithms = algorithms
        self._workloads: Sequence[Workload] = ()
        self._batch: Batch | None = None
        self._comparisons: Sequence[Comparison] = ()
        self._history: dict[str, deque[tuple[float, float | None, float | None]]] = {}
        self._lock = threading.Lock()
        self._published = self._shown()
        self.plot = LivePlot(self._published)

    def show_layout(
        self,
        workloads: Sequence[Workload],
        *,
        replaced_soon: bool = False,
    ) -> None:
        """Draw the rows per rank, and start a new history. Raises ValueError if there are none."""
        batch = workloads[0].batch()
        with self._lock:
            self._workloads, self._batch = workloads, batch
            self.floor_us, self.pool, self.summaries, self._comparisons = None, None, (), ()
            self.sweeps.clear()
            self._history = {work.algorithm: deque(maxlen=HISTORY) for work in workloads}
            self._publish(replaced_soon=replaced_soon)

    def show(
        self, summaries: Sequence[Summary], comparisons: Sequence[Comparison], at_s: float
    ) -> None:
        """Draw the summaries, measured at `at_s` of `time.monotonic`."""
        with self._lock:
            self.summaries, self._comparisons = summaries, comparisons
            for summary in summaries:
                point = (at_s, summary.median_us, summary.p95_us)
                self._history[summary.algorithm].append(point)
            self._publish()

    def still(self) -> go.Figure:
        """Return the figure of the chosen view as a plotly figure, which is checked by plotly."""
        import plotly.graph_objects as go

        with self._lock:
            return go.Figure(self._shown())

    def choose(self, view: str) -> None:
        """Show another view of what was measured."""
        with self._lock:
            self.view = view
            self._publish()

    def _publish(self, *, replaced_soon: bool = False) -> None:
        figure = self._shown()
        if figure != self._published:  # the tokens and the pool stay the same for many samples
            self._published = figure
            self.plot.publish(figure, replaced_soon=replaced_soon)

    def _shown(self) -> style.PlainFigure:
        """Return the figure of the chosen view, and build no other one."""
        if self.view == "pool":
            figure = views.pool(self.pool)
        elif self.view in views.SWEEPS:
            figure = views.sweep(self.sweeps.get(self.view), self.view)
        elif self.view == "tokens" and self._workloads:
            figure = views.tokens(self._workloads[0].layout())
        elif self.view == "bandwidth" and self.summaries:
            figure = views.bandwidth(self.summaries, self.floor_us, self.model)
        else:
            figure = self._times()
        figure["layout"].setdefault("uirevision", self.view)  # keeps the zoom
        return figure

    def _times(self) -> style.PlainFigure:
        """Draw rows, time per rank, stages, ratios and the history; all algorithms have traces."""
        summaries, measured = self.summaries, {each.algorithm: each for each in self.summaries}
        ranks = [f"rank {rank}" for rank in range(self._batch.cp_size if self._batch else 1)]
        rows = self._batch.per_rank_actual_token if self._batch else (0,)
        names = [work.algorithm for work in self._workloads[: len(summaries) or 1]] or [""]
        traces = [*_rows(ranks, rows)]
        for name in self._algorithms:
            times_us = measured[name].per_rank_us if name in measured else ()
            history = self._history.get(name)
            traces += _lines(name, ranks, times_us, history or _UNMEASURED, history is not None)
        for stage in style.STAGE_STYLES:
            stage_us = [each.stage_us.get(stage, 0.0) for each in summaries] or [0.0]
            bar = style.stage_bar(stage, x=_short(stage_us), y=names, text=stage, textangle=0)
            traces.append(bar | {"legendgroup": "stages", "xaxis": "x3", "yaxis": "y3"})
        to_first = [_SAME, *(each.ratio for each in summaries[1:])]
        to_baseline = [each.ratio for each in self._comparisons]
        is_compared = bool(to_baseline)
        first = _ratios("to the first algorithm", "circle", names, to_first, is_compared)
        pinned = to_baseline or [None] * len(names)
        compared = _ratios("B / A", "diamond-open", names, pinned, is_compared)
        title, subtitle = describe(self._workloads) if self._workloads else ("Not measured yet", "")
        times = ", ".join(f"{each.algorithm} {each.median_us:.0f} µs" for each in summaries)
        return style.finish(
            {"data": [*traces, first, compared], "layout": dict(_LAYOUT)},
            title=title,
            subtitle=subtitle,
            alt="The live panel: rows, time per rank, stages, ratios and history. Median times: "
            f"{times or 'nothing measured yet'}.",
            height=850,
        )


def describe(workloads: Sequence[Workload]) -> tuple[str, str]:
    """Return a title and subtitle of workloads, short enough to fit beside plotly's buttons."""
    first = workloads[0]
    names = ", ".join(workload.algorithm for workload in workloads)
    lengths = ", ".join(str(length) for length in first.lengths[:4])
    more = f", … ({len(first.lengths)} sequences)" if len(first.lengths) > 4 else ""
    memory = "symmetric memory" if first.symmetric else "ordinary memory"
    captured = ", captured" if first.captured else ""
    tensors = "1 tensor" if first.tensors == 1 else f"{first.tensors} tensors"
    rows = f"{tensors} of {first.heads}×{first.head_dim} {first.dtype}"
    return (
        f"cp_size {first.cp_size} · {names}",
        f"{first.strategy}, {memory}{captured}, lengths {lengths}{more} tokens; {rows}",
    )


_TIP = "%{x}: %{y:.4g}<extra>%{fullData.name}</extra>"


def _rows(ranks: Sequence[str], rows: Sequence[int]) -> list[dict[str, Any]]:
    padding = [max(rows) - count for count in rows]
    hatched = {"color": style.PADDING, "pattern": style.hatch(), "line": {"color": _GREY}}
    colors = {"color": [style.rank_color(rank) for rank in range(len(ranks))]}
    bar = {"type": "bar", "x": ranks, "hovertemplate": _TIP}
    return [
        {**bar, "name": "rows", "showlegend": False, "y": rows, "marker": colors},
        {**bar, "name": "padding", "y": padding, "marker": hatched},
    ]


def _lines(
    name: str, ranks: Sequence[str], times_us: Sequence[float], history: Points, is_shown: bool
) -> list[dict[str, Any]]:
    """Return the time per rank, the rolling median and the p95 of an algorithm."""
    color, dash, symbol = style.algorithm_line(name)
    times_s, medians_us, p95_us = zip(*history, strict=True)
    line = {"type": "scatter", "line": {"color": color, "dash": dash, "width": 1.5}}
    # Without markers, which would take most of the time to draw.
    ago_s = _short([time_s - times_s[-1] for time_s in times_s], 2)
    rolling = line | {"mode": "lines", "x": ago_s, "xaxis": "x5", "yaxis": "y5"}
    thick, thin = (
        {"color": color, "dash": dash, "width": 2},
        {"color": color, "dash": "dot", "width": 1},
    )
    return [
        line
        | {
            "name": f"{name} per rank",
            "mode": "lines+markers",
            "marker": {"color": color, "symbol": symbol, "size": 8},
            "x": ranks if times_us else ranks[:1],
            "y": _short(times_us) or [None],
            "xaxis": "x2",
            "yaxis": "y2",
            "showlegend": False,
        },
        rolling | {"name": name, "y": _short(medians_us), "line": thick, "showlegend": is_shown},
        rolling | {"name": f"{name} p95", "y": _short(p95_us), "line": thin, "showlegend": False},
    ]


def _ratios(
    title: str,
    symbol: str,
    names: Sequence[str],
    ratios: Sequence[Ratio | None],
    is_shown: bool,
) -> dict[str, Any]:
    values = [ratio.value if ratio else None for ratio in ratios]
    # No error bar is 0, because plotly would draw NaN there.
    after = [ratio.high - ratio.value if ratio else 0.0 for ratio in ratios]
    before = [ratio.value - ratio.low if ratio else 0.0 for ratio in ratios]
    noise = {"type": "data", "symmetric": False, "color": style.INK}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": title,
        "x": _short(values, 3),
        "y": names,
        "error_x": noise | {"array": _short(after, 3), "arrayminus": _short(before, 3)},
        "marker": {"symbol": symbol, "size": 9, "color": _GREY},
        "xaxis": "x4",
        "yaxis": "y4",
        "showlegend": is_shown,
    }


def _short(values: Sequence[float | None], digits: int = 1) -> list[float | None]:
    """Return values without the digits that no plot shows; they are most of a figure's bytes."""
    return [None if value is None else round(value, digits) for value in values]


def _plots() -> list[style.Plot]:
    left, right, both = (0.0, 0.4), (0.6, 1.0), (0.0, 1.0)
    upper, middle, lower = (0.753, 1.0), (0.377, 0.623), (0.0, 0.247)

    # Margins that follow the labels would lay out all plots several times per figure, and labels
    # that are hidden at the edge would each be measured. Zoomed times can be longer than the edge.
    def axis(title: str = "", **options: object) -> dict[str, Any]:
        return style.axis(title, automargin=False, **{"ticklabeloverflow": "allow", **options})

    def from_0(title: str) -> dict[str, Any]:
        return axis(title, rangemode="tozero")

    names = style.names_axis(automargin=False, ticklabeloverflow="allow")
    ago = axis("time before now (s)", ticklabeloverflow="hide past div")
    history = "Time of a gather: rolling median (thick), p95 (thin)"
    return [
        style.Plot(left, upper, "Rows per rank", axis(), from_0("rows")),
        style.Plot(right, upper, "Time per rank", axis(), from_0("time (µs)")),
        style.Plot(left, middle, "Stages (mean over ranks)", from_0("time (µs)"), names),
        style.Plot(right, middle, "Ratio, with its noise", from_0("ratio"), names),
        style.Plot(both, lower, history, ago, from_0("time (µs)")),
    ]


_LAYOUT: dict[str, Any] = {
    **style.several_plots(_plots()),
    "barmode": "stack",
    # Room for the names of the algorithms, the headings of the plots, and the legend.
    "margin": {"l": 136, "r": 16, "t": 84, "b": 160},
    "shapes": [
        {
            "type": "line",
            "x0": 1,
            "x1": 1,
            "xref": "x4",
            "y0": 0,
            "y1": 1,
            "yref": "y4 domain",
            "line": {"color": _GREY, "width": 1, "dash": "dot"},
        }
    ],
}
