"""The explorer's figure: four plots whose traces are created once and then updated."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from cpkit.control.messages import Sample, Workload
from cpkit.layout import ContextParallelMetadata
from cpkit.notebook import style
from cpkit.notebook.plot import LivePlot

HISTORY = 120  # samples in the history plot
FEWEST_FOR_P95 = 5  # gathers in a sample; of fewer, the p95 would be the slowest one
# Not empty lists, because plotly.js removes the axes of a trace without points.
_NO_HISTORY: dict[str, list[float | None]] = {"x": [0], "y": [None]}
_TITLES = ("Rows per rank", "Time per rank", "Stages (mean over ranks)", "History")


class Panel:
    """Four plots of one workload: rows, time per rank, stages, history.

    One thread updates `figure` and publishes it; other threads read it with `still()`.
    """

    def __init__(self) -> None:
        self.figure = _empty_figure()
        self.plot = LivePlot(self.figure)
        self._lock = threading.Lock()
        self._rows, self._padding, self._times, self._history, *stages = self.figure.data
        self._stages = dict(zip(style.STAGE_STYLES, stages, strict=True))
        self._times_us: deque[float] = deque(maxlen=HISTORY)
        self._n_added = 0

    def show_layout(self, workload: Workload, metadata: ContextParallelMetadata) -> None:
        """Draw the rows per rank, and start a new history."""
        self._times_us.clear()
        self._n_added = 0
        ranks = [f"rank {rank}" for rank in range(metadata.cp_size)]
        rows = metadata.per_rank_actual_token
        padding = [metadata.max_rank_len[0] - count for count in rows]
        colors = [style.rank_color(rank) for rank in range(metadata.cp_size)]
        with self._lock:
            title, subtitle = describe(workload)
            self.figure.layout.title.text = title
            self.figure.layout.title.subtitle.text = subtitle
            self._rows.update(x=ranks, y=rows, marker={"color": colors})
            self._padding.update(x=ranks, y=padding)
            nothing = [0] * len(ranks)  # plotly draws NaN where an error bar is missing
            self._times.update(
                x=ranks, y=nothing, error_y={"array": nothing}, marker={"color": colors}
            )
            self._history.update(**_NO_HISTORY)
            for bar in self._stages.values():
                bar.x = [0]
            self._publish()

    def show_sample(self, sample: Sample) -> None:
        """Draw one sample, and the history of the added samples."""
        late = [
            p95 - us for us, p95 in zip(sample.per_rank_us, sample.per_rank_p95_us, strict=True)
        ]
        first = self._n_added - len(self._times_us)
        with self._lock:
            self._times.y = list(sample.per_rank_us)
            has_p95 = sample.iterations >= FEWEST_FOR_P95
            self._times.error_y.array = [max(0.0, us) if has_p95 else 0.0 for us in late]
            self._history.update(x=list(range(first, self._n_added)), y=list(self._times_us))
            for stage, bar in self._stages.items():
                times_us = sample.stage_us.get(stage, ())
                bar.x = [sum(times_us) / len(times_us)] if times_us else [0]
            self._publish()

    def add(self, sample: Sample) -> None:
        """Add a sample to the history."""
        self._times_us.append(sample.time_us)
        self._n_added += 1

    def still(self) -> go.Figure:
        """Return the current figure as a plain figure, for pages without JavaScript."""
        with self._lock:
            return go.Figure(self.figure)

    def _publish(self) -> None:
        slowest = f"{self._times_us[-1]:.0f} µs" if self._times_us else "nothing measured yet"
        alt = f"The live panel: rows, times, stages and history. Slowest rank: {slowest}."
        self.figure.layout.meta = {"alt": alt}
        self.plot.publish(self.figure)


def describe(workload: Workload) -> tuple[str, str]:
    """Return a title and subtitle for a workload, short enough to fit beside plotly's buttons."""
    lengths = ", ".join(str(length) for length in workload.lengths[:4])
    more = f", … ({len(workload.lengths)} sequences)" if len(workload.lengths) > 4 else ""
    memory = "symmetric memory" if workload.symmetric else "ordinary memory"
    rows = f"rows of {workload.heads}×{workload.head_dim} {workload.dtype}"
    return (
        f"cp_size {workload.cp_size} · {workload.algorithm} · {memory}",
        f"{workload.strategy}, lengths {lengths}{more} tokens; {rows}",
    )


def _empty_figure() -> go.Figure:
    figure = make_subplots(
        rows=2, cols=2, subplot_titles=_TITLES, vertical_spacing=0.24, horizontal_spacing=0.14
    )
    figure.update_annotations(font={"size": 13})
    _add_traces(figure)
    names = (("", "rows"), ("", "time (µs)"), ("time (µs)", ""), ("sample", "slowest rank (µs)"))
    for place, (x_title, y_title) in enumerate(names):
        where = {"row": place // 2 + 1, "col": place % 2 + 1}
        figure.update_xaxes(style.axis(x_title), **where)
        figure.update_yaxes(style.axis(y_title, rangemode="tozero"), **where)
    figure.update_layout(
        barmode="stack",
        margin_t=84,  # room for the titles of the plots
        uirevision="live",  # zooming by hand survives the next sample
    )
    alt = "Live: rows per rank, time per rank, stages, history of the slowest rank."
    return style.finish(figure, title="Not measured yet", alt=alt, height=560)


def _add_traces(figure: go.Figure) -> None:
    padding: dict[str, Any] = {"color": style.PADDING, "pattern": style.hatch()}
    padding["line"] = {"color": "#8c959f", "width": 1}
    tip = "%{x}: %{y:.4g}<extra>%{fullData.name}</extra>"
    empty: dict[str, Any] = {"x": ["rank 0"], "y": [0], "hovertemplate": tip}
    figure.add_bar(row=1, col=1, name="rows", showlegend=False, **empty)
    figure.add_bar(row=1, col=1, name="padding", marker=padding, **empty)
    late = {"type": "data", "array": [0], "symmetric": False, "color": style.INK, "thickness": 1}
    figure.add_bar(row=1, col=2, name="median, to p95", showlegend=False, error_y=late, **empty)
    line = {"color": style.INK, "width": 1.5}
    figure.add_scatter(row=2, col=2, mode="lines+markers", line=line, marker={"size": 4})
    figure.data[-1].update(name="slowest rank", showlegend=False, **_NO_HISTORY)
    for stage in style.STAGE_STYLES:
        figure.add_bar(row=2, col=1, name=stage, orientation="h", y=["gather"], x=[0])
        figure.data[-1].marker = style.stage_marker(stage)
