"""The live panel: change a control, and real workers are measured anew while you watch.

    controls ──▶ wish (the newest one counts) ──▶ thread: lab.measure(wish) ──▶ panel, 5-10 Hz

A control's callback only leaves a wish and returns: a slow measurement never blocks the kernel, and
ten quick changes cost one restart. One thread owns the picture; it looks for a newer wish between
two samples. Measuring pauses by itself when nobody has touched a control for a while.
"""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, NamedTuple, Self

import ipywidgets as widgets
import msgspec

from cpkit.control.messages import Sample, Workload
from cpkit.lab import Lab
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.notebook import cells
from cpkit.notebook.charts import byte_words
from cpkit.notebook.controls import Controls
from cpkit.notebook.latest import LatestWins
from cpkit.notebook.live import (
    close_widgets,
    controls_box,
    live_box,
    status_line,
    wrong_html,
)
from cpkit.notebook.panel import Panel

_NUMBER = 'style="padding: 0 8px; text-align: right"'


class Wish(NamedTuple):
    """What the controls ask for, and the samples that came of it."""

    workload: Workload
    measure: bool
    samples: list[Sample]


class Explorer:
    """One live panel: display it as the last line of a cell, then `start()`.

    `options` are the first values of the controls: `cp_size`, `algorithm`, `strategy`, `symmetric`,
    `heads`, `head_dim`, `dtype`.
    """

    def __init__(
        self,
        lab: Lab,
        lengths: Sequence[int] = (4096,),
        *,
        interval_s: float = 0.12,
        pause_after_s: float = 120.0,
        **options: Any,
    ) -> None:
        first: dict[str, Any] = {"cp_size": max(lab.cp_sizes), "lengths": tuple(lengths)} | options
        cells.replace_previous(self)
        self.controls = Controls(lab.cp_sizes, Workload(**first))
        self.panel = Panel()
        self._lab, self._interval_s, self._pause_after_s = lab, interval_s, pause_after_s
        self._summary, self._table, self._status = widgets.HTML(), widgets.HTML(), status_line()
        self._box = self._build()
        self._arrived = threading.Condition()
        self._running = False
        self._samples: list[Sample] = []  # of the newest wish
        self._error: Exception | None = None
        self._worker = LatestWins("cpkit-explorer", self._follow, self._fail)
        self.controls.on_change(self._ask)
        self._ask()

    def start(self) -> Self:
        """Measure what the controls say, until `stop`; returns the panel."""
        self._running = True
        self._ask()
        return self

    def stop(self) -> None:
        """End the measurement. The workers stay; the controls go on drawing layouts."""
        self._running = False
        self._ask()

    def close(self) -> None:
        """End the measurement and its thread, and free the widgets."""
        self._worker.close()
        close_widgets(self._box)
        cells.forget(self)

    def wait(self, samples: int = 1, timeout_s: float = 30.0) -> Sample:
        """Wait until the newest wish has so many samples; returns the latest.

        Raises what the measurement raised, RuntimeError while it is stopped, and TimeoutError.
        """
        with self._arrived:
            if not self._running and len(self._samples) < samples:
                raise RuntimeError("the panel is stopped: press Start, then run this cell again")
            done = self._arrived.wait_for(
                lambda: self._error or len(self._samples) >= samples, timeout_s
            )
            if self._error:
                raise self._error
            if not done:
                raise TimeoutError(
                    f"{len(self._samples)} of {samples} samples came in {timeout_s} s"
                )
            return self._samples[-1]

    @property
    def status_html(self) -> str:
        """What the status line says: measuring, paused, stopped, or what is wrong."""
        return str(self._status.value)

    @property
    def summary_html(self) -> str:
        """The latest sample in one line; empty before the first."""
        return str(self._summary.value)

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        data: dict[str, Any] = self._box._repr_mimebundle_()
        return data | {"text/plain": "Live panel: controls, and a plot of what the workers do now"}

    # ------------------------------------------------- the kernel's thread: callbacks only

    def _build(self) -> widgets.Widget:
        start = widgets.Button(description="Start", icon="play", tooltip="measure and redraw")
        stop = widgets.Button(description="Stop", icon="stop", tooltip="the workers stay")
        start.add_class("start").on_click(lambda _: self.start())
        stop.add_class("stop").on_click(lambda _: self.stop())
        buttons = widgets.HBox([controls_box([start, stop]), self._status])
        picture = widgets.HBox([self.panel.plot, self._table], layout={"flex_flow": "row wrap"})
        return live_box(self.controls.box(), buttons, self._summary, picture)

    def _ask(self) -> None:
        """Leave a wish; never waits."""
        try:
            workload = self.controls.workload()
        except ValueError as problem:
            self._status.value = wrong_html(problem)
            return
        with self._arrived:
            self._samples, self._error = [], None
            wish = Wish(workload, self._running, self._samples)
        self._worker.ask(wish)

    # --------------------------------------------------------- the panel's own thread

    def _follow(self, wish: Wish, is_newest: Callable[[], bool]) -> None:
        """Draw the layout of a wish and, if it says so, measure until there is a newer one."""
        work = wish.workload
        metadata = prepare_context_parallel_metadata(work.lengths, work.cp_size, work.strategy)
        self.panel.show_layout(work, metadata)
        self._table.value = self._summary.value = ""
        self._status.value = "● measuring" if wish.measure else "○ stopped"
        if not wish.measure:
            return
        stop_at = time.monotonic() + self._pause_after_s
        sample = None
        options = msgspec.structs.asdict(work) | {"interval_s": self._interval_s}
        with closing(self._lab.measure(**options)) as samples:
            for sample in samples:
                if not is_newest():
                    return
                self._keep(wish, sample)
                if self.panel.plot.is_due():
                    self._draw(sample, metadata)
                if time.monotonic() > stop_at:
                    break
        if sample:
            self._draw(sample, metadata)
        self._status.value = "○ paused: no control was touched for a while; Start goes on"

    def _keep(self, wish: Wish, sample: Sample) -> None:
        self.panel.note(sample)
        with self._arrived:
            wish.samples.append(sample)
            self._arrived.notify_all()

    def _draw(self, sample: Sample, metadata: ContextParallelMetadata) -> None:
        self.panel.show_sample(sample)
        self._summary.value = _summary(sample)
        self._table.value = _table(sample, metadata)

    def _fail(self, problem: Exception) -> None:
        with self._arrived:
            self._error = problem
            self._arrived.notify_all()
        self._status.value = wrong_html(problem)


def _summary(sample: Sample) -> str:
    slowest = sample.per_rank_us.index(max(sample.per_rank_us))
    return (
        f"<b>{sample.time_us:,.0f} µs</b>, slowest is rank {slowest} · "
        f"{byte_words(sample.total_bytes)} gathered · algbw {sample.algbw_gbps:.2f} GB/s · "
        f"busbw {sample.busbw_gbps:.2f} GB/s · path <b>{sample.path}</b>: "
        f"{html.escape(sample.path_reason)}"
    )


def _table(sample: Sample, metadata: ContextParallelMetadata) -> str:
    """The plot as a table, for readers who can't see it."""
    head = ("rank", "rows", "padding rows", "median µs", "min µs", "p95 µs")
    longest = metadata.max_rank_len[0]
    heads = "".join(f'<th scope="col" {_NUMBER}>{name}</th>' for name in head)
    lines = [f"<tr>{heads}</tr>"]
    for rank, rows in enumerate(metadata.per_rank_actual_token):
        times = (sample.per_rank_us, sample.per_rank_min_us, sample.per_rank_p95_us)
        cells = [str(rank), str(rows), str(longest - rows), *(f"{t[rank]:,.0f}" for t in times)]
        lines.append("<tr>" + "".join(f"<td {_NUMBER}>{cell}</td>" for cell in cells) + "</tr>")
    caption = f"<caption>{sample.iterations} gathers in this sample</caption>"
    return f'<table class="cpkit-ranks">{caption}{"".join(lines)}</table>'
