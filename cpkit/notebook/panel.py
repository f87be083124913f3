"""The explorer's figures: five plots whose traces are created once and updated, and other views."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from cpkit.algorithms import ALGORITHM_CHOICES
from cpkit.control.messages import Workload
from cpkit.layout import ContextParallelMetadata
from cpkit.notebook import style, views
from cpkit.notebook.intervals import Comparison, Summary
from cpkit.notebook.plot import LivePlot
from cpkit.timing import Ratio

HISTORY = 120  # points per line of the history
_TITLES = (
    "Rows per rank",
    "Time per rank",
    "Stages (mean over ranks)",
    "Ratio, with its noise",
    "Time of a gather: rolling median, and p95 (dotted)",
)
# Not empty lists, because plotly.js removes the axes of a trace without points.
_NOTHING: dict[str, Any] = {"x": [0], "y": [None], "showlegend": False}
_SAME = Ratio(1.0, 1.0, 1.0)  # of the first algorithm to itself
_LINES = tuple[go.Scatter, go.Scatter, go.Scatter]


class Panel:
    """The figure of the chosen view: `times`, five plots of interleaved algorithms, or another one.

    One thread updates it and publishes it; other threads choose the view, and read it with
    `still()`.
    """

    def __init__(self, algorithms: Sequence[str] = ALGORITHM_CHOICES) -> None:
        self.view = "times"
        self.model: views.Model | None = None
        self.floor_us: float | str | None = None  # a text says why there is none
        self.pool: pd.DataFrame | None = None
        self._metadata: ContextParallelMetadata | None = None
        self._summaries: Sequence[Summary] = ()
        self.figure = _empty_figure(algorithms)
        self.plot = LivePlot(self.figure)
        self._lock = threading.Lock()
        named = {trace.name: trace for trace in self.figure.data if trace.name}
        self._rows, self._padding = named["rows"], named["padding"]
        self._stages = {stage: named[stage] for stage in style.STAGE_STYLES}
        self._to_first, self._to_baseline = named["to the first algorithm"], named["B / A"]
        self._lines: dict[str, _LINES] = {
            name: (named[f"{name} per rank"], named[name], named[f"{name} p95"])
            for name in algorithms
        }
        self._history: dict[str, deque[tuple[float, float, float | None]]] = {}

    def show_layout(
        self,
        workloads: Sequence[Workload],
        metadata: ContextParallelMetadata,
        *,
        replaced_soon: bool = False,
    ) -> None:
        """Draw the rows per rank, and start a new history."""
        self._metadata, self.floor_us, self.pool = metadata, None, None
        self._history = {w.algorithm: deque(maxlen=HISTORY) for w in workloads}
        ranks = [f"rank {rank}" for rank in range(metadata.cp_size)]
        rows = metadata.per_rank_actual_token
        padding = [metadata.max_rank_len[0] - count for count in rows]
        colors = [style.rank_color(rank) for rank in range(metadata.cp_size)]
        with self._lock:
            title, subtitle = describe(workloads)
            self.figure.layout.title.text = title
            self.figure.layout.title.subtitle.text = subtitle
            self._rows.update(x=ranks, y=rows, marker={"color": colors})
            self._padding.update(x=ranks, y=padding)
            for name, (per_rank, median, p95) in self._lines.items():
                per_rank.update(**_NOTHING | {"x": ranks[:1]})
                median.update(**_NOTHING | {"showlegend": name in self._history})
                p95.update(**_NOTHING)
            for bar in self._stages.values():
                bar.update(x=[0], y=[workloads[0].algorithm])
            _draw_ratios(self._to_first, [workloads[0].algorithm], [_SAME])
            _draw_ratios(self._to_baseline, [workloads[0].algorithm], [None])
            self._publish((), replaced_soon=replaced_soon)

    def show(
        self,
        summaries: Sequence[Summary],
        comparisons: Sequence[Comparison],
        at_s: float,
    ) -> None:
        """Draw the summaries, `at_s` seconds after the measurement began."""
        names = [summary.algorithm for summary in summaries]
        with self._lock:
            for summary in summaries:
                self._draw_lines(summary, at_s)
            for stage, bar in self._stages.items():
                times_us = [summary.stage_us.get(stage, 0.0) for summary in summaries]
                bar.update(x=_short(times_us), y=names)
            ratios = [_SAME, *(summary.ratio for summary in summaries[1:])]
            _draw_ratios(self._to_first, names, ratios)
            to_baseline = [each.ratio for each in comparisons] or [None] * len(names)
            _draw_ratios(self._to_baseline, names, to_baseline)
            self._to_first.showlegend = self._to_baseline.showlegend = bool(comparisons)
            self._publish(summaries)

    def still(self) -> go.Figure:
        """Return the figure of the chosen view as a plain figure, for pages without JavaScript."""
        with self._lock:
            return go.Figure(self._shown())

    def choose(self, view: str) -> None:
        """Show another view of what was measured."""
        with self._lock:
            self.view = view
            self.plot.publish(self._shown())

    def _draw_lines(self, summary: Summary, at_s: float) -> None:
        history = self._history[summary.algorithm]
        history.append((at_s, summary.median_us, summary.p95_us))
        times_s, medians_us, p95_us = map(list, zip(*history, strict=True))
        per_rank, median, p95 = self._lines[summary.algorithm]
        per_rank.x = [f"rank {rank}" for rank in range(len(summary.per_rank_us))]
        per_rank.y = _short(summary.per_rank_us)
        ago_s = _short([time_s - at_s for time_s in times_s], 2)
        median.update(x=ago_s, y=_short(medians_us))
        p95.update(x=ago_s, y=_short(p95_us))

    def _publish(self, summaries: Sequence[Summary], *, replaced_soon: bool = False) -> None:
        self._summaries = summaries
        times = ", ".join(f"{s.algorithm} {s.median_us:.0f} µs" for s in summaries)
        alt = "The live panel: rows, time per rank, stages, ratios and history. Median times: "
        self.figure.layout.meta = {"alt": f"{alt}{times or 'nothing measured yet'}."}
        self.plot.publish(self._shown(), replaced_soon=replaced_soon)

    def _shown(self) -> go.Figure:
        figure = self.figure
        if self.view == "pool":
            figure = views.pool(self.pool)
        elif self.view == "tokens" and self._metadata:
            figure = views.tokens(self._metadata)
        elif self.view == "bandwidth" and self._summaries:
            figure = views.bandwidth(self._summaries, self.floor_us, self.model)
        figure.layout.uirevision = figure.layout.uirevision or self.view  # keeps the zoom
        return figure


def describe(workloads: Sequence[Workload]) -> tuple[str, str]:
    """Return a title and subtitle of workloads, short enough to fit beside plotly's buttons."""
    first = workloads[0]
    names = ", ".join(workload.algorithm for workload in workloads)
    lengths = ", ".join(str(length) for length in first.lengths[:4])
    more = f", … ({len(first.lengths)} sequences)" if len(first.lengths) > 4 else ""
    memory = "symmetric memory" if first.symmetric else "ordinary memory"
    rows = f"rows of {first.heads}×{first.head_dim} {first.dtype}"
    return (
        f"cp_size {first.cp_size} · {names}",
        f"{first.strategy}, {memory}, lengths {lengths}{more} tokens; {rows}",
    )


def _draw_ratios(points: go.Scatter, names: Sequence[str], ratios: Sequence[Ratio | None]) -> None:
    values = [ratio.value if ratio else None for ratio in ratios]
    # No error bar is 0, because plotly would draw NaN there.
    after = [ratio.high - ratio.value if ratio else 0.0 for ratio in ratios]
    before = [ratio.value - ratio.low if ratio else 0.0 for ratio in ratios]
    noise = {"array": _short(after, 3), "arrayminus": _short(before, 3)}
    points.update(x=_short(values, 3), y=list(names), error_x=noise)


def _short(values: Sequence[float | None], digits: int = 1) -> list[float | None]:
    """Return values without the digits that no plot shows; they are most of a figure's bytes."""
    return [None if value is None else round(value, digits) for value in values]


def _empty_figure(algorithms: Sequence[str]) -> go.Figure:
    figure = make_subplots(
        rows=3,
        cols=2,
        specs=[[{}, {}], [{}, {}], [{"colspan": 2}, None]],
        subplot_titles=_TITLES,
        vertical_spacing=0.13,
        horizontal_spacing=0.2,
    )
    figure.update_annotations(font={"size": 13})
    _add_traces(figure, algorithms)
    names = (("", "rows"), ("", "time (µs)"), ("time (µs)", ""), ("ratio", ""))
    for place, (x_title, y_title) in enumerate((*names, ("time before now (s)", "time (µs)"))):
        where = {"row": place // 2 + 1, "col": place % 2 + 1}
        figure.update_xaxes(style.axis(x_title), **where)
        figure.update_yaxes(style.axis(y_title, rangemode="tozero"), **where)
    for col in (1, 2):
        figure.update_xaxes(rangemode="tozero", row=2, col=col)
        figure.update_yaxes(style.names_axis(rangemode="normal"), row=2, col=col)
    line = {"color": "#8c959f", "width": 1, "dash": "dot"}
    figure.add_vline(x=1, line=line, row=2, col=2)
    # Margins that follow the labels would lay out all plots several times per figure.
    figure.update_xaxes(automargin=False)
    figure.update_yaxes(automargin=False)
    figure.update_layout(
        barmode="stack",
        margin_l=120,  # room for the names of the algorithms
        margin_t=84,  # and for the titles of the plots
        margin_b=160,  # and for the legend
        uirevision="live",  # zooming by hand survives the next sample
    )
    alt = "Live: rows per rank, time per rank, stages, ratios, history."
    return style.finish(figure, title="Not measured yet", alt=alt, height=850)


def _add_traces(figure: go.Figure, algorithms: Sequence[str]) -> None:
    padding: dict[str, Any] = {"color": style.PADDING, "pattern": style.hatch()}
    padding["line"] = {"color": "#8c959f", "width": 1}
    tip = "%{x}: %{y:.4g}<extra>%{fullData.name}</extra>"
    empty: dict[str, Any] = {"x": ["rank 0"], "y": [0], "hovertemplate": tip}
    figure.add_bar(row=1, col=1, name="rows", showlegend=False, **empty)
    figure.add_bar(row=1, col=1, name="padding", marker=padding, **empty)
    for name in algorithms:
        color, dash, symbol = style.algorithm_line(name)
        line = {"color": color, "dash": dash, "width": 1.5}
        marker = {"color": color, "symbol": symbol}
        per_rank = {"line": line, "marker": marker | {"size": 8}, "name": f"{name} per rank"}
        figure.add_scatter(row=1, col=2, mode="lines+markers", **per_rank, **_NOTHING)
        # Without markers, which would take most of the time to draw.
        rolling = {"line": line | {"width": 2}, "name": name}
        figure.add_scatter(row=3, col=1, mode="lines", **rolling, **_NOTHING)
        late = {"line": line | {"dash": "dot", "width": 1}, "name": f"{name} p95"}
        figure.add_scatter(row=3, col=1, mode="lines", **late, **_NOTHING)
    for stage in style.STAGE_STYLES:
        bar = style.stage_bar(stage, y=["direct"], x=[0], text=stage, textangle=0)
        figure.add_trace(bar.update(legendgroup="stages"), row=2, col=1)
    for title, symbol in (("to the first algorithm", "circle"), ("B / A", "diamond-open")):
        noise: dict[str, Any] = {"type": "data", "symmetric": False, "color": style.INK}
        points = {"marker": {"symbol": symbol, "size": 9, "color": "#8c959f"}, "error_x": noise}
        figure.add_scatter(row=2, col=2, mode="markers", name=title, **points, **_NOTHING)
