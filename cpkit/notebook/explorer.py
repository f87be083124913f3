"""The explorer: change a control, and the workers measure the new setting while you watch.

    controls ──▶ newest setting ──▶ thread: lab.measure_workloads(…) ──▶ plot, up to 8 Hz

A control's callback only submits a setting and returns, so a slow measurement never blocks the
kernel, and ten quick changes restart the measurement once. The selected algorithms are measured
interleaved. A panel that is not touched measures once per second, and one that no page shows not
at all (`presence`).
"""

# Annotations are evaluated here, so that `help()` and Shift-Tab show the allowed values.

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ipywidgets as widgets

from cpkit.algorithms import AnyAlgorithm
from cpkit.control.errors import (
    BadRequest,
    ControlError,
    NoAnswer,
    RankHangs,
    WorkersDied,
)
from cpkit.control.messages import Sample, Strategy
from cpkit.lab import Lab
from cpkit.lab.arguments import several
from cpkit.notebook.badges import contention_badge
from cpkit.notebook.banner import WorkersBanner
from cpkit.notebook.controls import Controls
from cpkit.notebook.intervals import Intervals, Measured, Summary, compare
from cpkit.notebook.live import SHOWN, SPOKEN, IsNewest, LivePanel, controls_box, live_box
from cpkit.notebook.panel import Panel, describe
from cpkit.notebook.presence import Presence
from cpkit.notebook.probes import Probes
from cpkit.notebook.show import png, svg
from cpkit.notebook.tables import (
    algorithms_table,
    comparison_table,
    log_table,
    ranks_table,
    spoken,
)
from cpkit.notebook.takeaway import TakeButtons, as_csv, as_json, code
from cpkit.notebook.views import VIEWS, Model

if TYPE_CHECKING:
    from typing import Self

    import torch

_STATUS_EVERY_S = 5.0  # how often the load of the machine is read
_SPOKEN_EVERY_S = 5.0  # how often the text for screen readers changes
_POLL_S = 0.1  # how soon a hidden panel follows a new setting
_LOGGED = 20  # settings that the log keeps
_HANG_POLL_S = 1.0  # how often workers that hang are asked whether they respond again
_MEASURING, _STOPPED = "● measuring", "○ stopped"
_IDLE = "◐ measuring once per second: not touched for a while; touch the panel for the full rate"
_HIDDEN = "○ not measuring: no page shows this panel"
_NO_WORKERS = "✗ not measuring: see the message about the workers"


class Setting(NamedTuple):
    """One setting of the controls, and what was measured with it."""

    intervals: Intervals
    is_running: bool
    is_step: bool  # it runs for one interval


class Explorer(LivePanel[Setting]):
    """Measure the selected algorithms live. Call `start()`; display it as the last line of a cell.

    The parameters from `cp_size` on are the initial values of the controls. `lengths` are tokens
    per sequence. Each algorithm gets a sample every `interval_s`; medians, p95 and ratios are those
    of the last `window_s`. If the panel is not touched for `idle_after_s`, it gets one per second,
    and none while all pages that show the panel are hidden. Ratios are to the first of the
    algorithms, in their usual order.
    """

    description = "Live panel: controls, and a plot of what the workers measure now"

    def __init__(
        self,
        lab: Lab,
        lengths: Sequence[int] = (4096,),
        *,
        interval_s: float = 0.12,
        window_s: float = 5.0,
        idle_after_s: float = 120.0,
        cp_size: int | None = None,
        strategy: Strategy = "zigzag",
        algorithms: Sequence[AnyAlgorithm] = ("direct",),
        symmetric: bool = True,
        heads: int = 8,
        head_dim: int = 128,
        dtype: "str | torch.dtype" = "bfloat16",
        tensors: int = 2,
        captured: bool = False,
    ) -> None:
        seconds = {"interval_s": interval_s, "window_s": window_s, "idle_after_s": idle_after_s}
        for name, value in seconds.items():
            if not (isinstance(value, Real) and value > 0):
                raise BadRequest(f"{name} is {value!r:.100}; it must be seconds, more than 0")
        if cp_size not in (None, *lab.cp_sizes):
            allowed = ", ".join(map(str, lab.cp_sizes))
            raise BadRequest(f"cp_size is {cp_size!r:.100}; these workers can form {allowed}")
        names, status = several(algorithms, "algorithms"), lab.status()
        choices, on_gpu = status.algorithms, status.device != "cpu"
        if not names or not all(name in choices for name in names):
            allowed, got = ", ".join(choices), f"{algorithms!r:.100}"
            raise BadRequest(f"algorithms is {got}; it must be one or more of {allowed}")
        rows = (heads, head_dim, dtype, tensors, captured)
        first = lab.workload(lengths, cp_size, strategy, names[0], symmetric, *rows)
        self.controls = Controls(lab.cp_sizes, first, names, choices, on_gpu=on_gpu)
        self.panel = Panel(choices)
        self._probes = Probes(lab, self.panel)
        self._presence = Presence(interval_s, idle_after_s)
        self.panel.plot.on_report(self._presence.report)
        self._lab, self._window_s = lab, window_s
        self._summary, self._against, self._table = (
            widgets.HTML(_dom_classes=(SHOWN,), layout={"max_width": "100%"}) for _ in range(3)
        )
        self._takes = TakeButtons(self.panel.plot, lambda: self.code, lambda: self.samples)
        self._contention = widgets.HTML(_dom_classes=("cpkit-contention",))
        self.view = widgets.ToggleButtons(
            options=VIEWS, description="view", style={"button_width": "auto"}
        )
        self.view.observe(lambda change: self.panel.choose(change["new"]), "value")
        self._spoken, self._spoke_s = widgets.HTML(_dom_classes=(SPOKEN,)), -math.inf
        self._banner = WorkersBanner(self.restart_workers)
        self._log_shown = widgets.HTML()
        self._is_running = self._is_step = False
        self._newest: Intervals | None = None
        self._baseline: Measured | None = None
        self._log: deque[Measured] = deque(maxlen=_LOGGED)
        self._error: Exception | None = None
        super().__init__(self.controls.observed(), self.panel.plot)

    def start(self) -> "Self":
        """Measure the selected algorithms until `stop`; return the panel."""
        self._run(True)
        return self

    def stop(self) -> None:
        """Stop measuring, and keep what was measured. New settings still draw their layout."""
        self._run(False)

    def step(self) -> None:
        """Stop, and measure one more interval: one sample of each algorithm."""
        self._run(True, is_step=True)

    def reset(self) -> None:
        """Forget what was measured with this setting, and go on as before: running or stopped."""
        self._newest = None
        self._submit()

    def _run(self, is_running: bool, *, is_step: bool = False) -> None:
        self._is_running, self._is_step = is_running, is_step
        self._submit()
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Stop measuring, end the thread, and close the widgets."""
        with self._changed:
            self._is_running = False
            self._changed.notify_all()
        super().close()

    def restart_workers(self) -> None:
        """Connect again, start workers if none run, and go on measuring. Returns immediately."""
        self._worker.cancel()
        self._banner.show_starting(self._lab.world_size)
        threading.Thread(target=self._reconnect, name="cpkit-restart", daemon=True).start()

    def pin(self) -> None:
        """Keep the present state as the baseline A: from now on the panel shows B against A.

        Raises RuntimeError before the first sample.
        """
        summaries = self._newest.summaries() if self._newest else []
        if not summaries:
            raise RuntimeError("nothing is measured yet: press Start, wait, then pin")
        self._baseline = _measured(summaries)
        self._pin_button.description, self._pin_button.icon = "Unpin A", "times"

    def unpin(self) -> None:
        """Forget the baseline."""
        self._baseline = None
        self._against.value = ""
        self._pin_button.description, self._pin_button.icon = "Pin as A", "thumb-tack"

    def wait(self, samples: int = 1, timeout_s: float = 30.0) -> Sample:
        """Wait until each algorithm has this many samples; return the latest of the first one.

        Raises the measurement's exception, RuntimeError if the panel is stopped or closed, or
        TimeoutError.
        """
        if samples < 1:
            raise BadRequest(f"samples is {samples!r:.100}; it must be 1 or more")
        with self._presence.awaited(), self._changed:
            self._changed.wait_for(
                lambda: self._error or not self._is_running or self._count() >= samples, timeout_s
            )
            if self._error:
                raise self._error
            if self._count() < samples and not self._is_running:
                raise RuntimeError("the panel is stopped: press Start, then run this cell again")
            if self._count() < samples:
                raise TimeoutError(
                    f"{self._count()} of {samples} samples arrived in {timeout_s} s; the panel "
                    f"shows: {self.status_html}"
                )
            assert self._newest
            return self._newest.latest()[0]

    @property
    def model(self) -> Model | None:
        """The cost model of these workers, if one was fitted: the bandwidth view draws it."""
        return self.panel.model

    @model.setter
    def model(self, model: Model | None) -> None:
        self.panel.model = model

    @property
    def samples(self) -> list[Sample]:
        """The samples of the newest setting: the last 600 per algorithm, oldest first."""
        return self._newest.samples() if self._newest else []

    @property
    def log(self) -> tuple[Measured, ...]:
        """The settings that were measured before the present one: the last 20, oldest first."""
        return tuple(self._log)

    @property
    def code(self) -> str:
        """Python that measures the present setting. Raises ValueError if it cannot be read."""
        return code(self._lab.name, self.controls.workloads())

    def save_csv(self, path: str | PathLike[str]) -> None:
        """Write one line per sample, with the columns of a sweep."""
        Path(path).write_text(as_csv(self.samples))

    def save_json(self, path: str | PathLike[str]) -> None:
        """Write all samples with all their fields; `cpkit.load_samples` reads them."""
        Path(path).write_text(as_json(self.samples))

    def save_png(self, path: str | PathLike[str]) -> None:
        """Write the figure of the chosen view. Raises NoPicture without Chromium or Chrome."""
        Path(path).write_bytes(png(self.panel.still()))

    def save_svg(self, path: str | PathLike[str]) -> None:
        """Write the figure of the chosen view. Raises NoPicture without Chromium or Chrome."""
        Path(path).write_bytes(svg(self.panel.still()))

    def save_trace(self, path: str | PathLike[str]) -> None:
        """Run one gather of the first algorithm, and write its timeline for ui.perfetto.dev."""
        work = self.controls.workloads()[0]
        self._lab.trace(**work.arguments()).save_chrome_trace(path)

    @property
    def status_html(self) -> str:
        """The status line: measuring, idle, hidden, stopped, or an error."""
        return str(self._status.value)

    @property
    def summary_html(self) -> str:
        """The table of the algorithms, with their paths; empty before the first sample."""
        return str(self._summary.value)

    @property
    def comparison_html(self) -> str:
        """B against the pinned A; empty while nothing is pinned."""
        return str(self._against.value)

    @property
    def contention_html(self) -> str:
        """How crowded the machine is; empty before the first measurement."""
        return str(self._contention.value)

    def _build(self, controls: Sequence[Any]) -> widgets.Widget:
        start = widgets.Button(description="Start", icon="play", tooltip="measure")
        stop = widgets.Button(description="Stop", icon="stop", tooltip="the workers keep running")
        step = widgets.Button(description="Step", icon="step-forward", tooltip="measure once")
        reset = widgets.Button(description="Reset", icon="undo", tooltip="forget the samples")
        start.add_class("start").on_click(lambda _: self.start())
        stop.add_class("stop").on_click(lambda _: self.stop())
        step.add_class("step").on_click(lambda _: self.step())
        reset.add_class("reset").on_click(lambda _: self.reset())
        run = (start, stop, step, reset)
        self._pin_button = widgets.Button(tooltip="compare what follows with the present state")
        self._pin_button.add_class("pin").on_click(lambda _: self._toggle_pin())
        self.unpin()
        buttons = widgets.HBox(
            [controls_box([*run, self._pin_button, *self._takes.buttons]), self._status],
            layout={"flex_flow": "row wrap"},
        )
        picture = widgets.HBox([self.plot, self._table], layout={"flex_flow": "row wrap"})
        view = controls_box([self.view])
        numbers = (self._takes.said, self._contention, self._summary, self._against)
        parts = (self._banner, self._spoken, *numbers, view, picture)
        return live_box(self.controls.box(), buttons, *parts, self._log_shown)

    def _setting(self) -> Setting:
        workloads = self.controls.workloads()
        self._presence.touch()
        with self._changed:
            self._error = None
            is_same = self._newest and self._newest.workloads == workloads
            if not is_same:
                self._write_log()
            if not is_same or (self._is_running and not self._is_step):
                self._newest = Intervals(workloads, self._window_s)
            assert self._newest
            return Setting(self._newest, self._is_running, self._is_step)

    def _write_log(self) -> None:
        summaries = self._newest.summaries() if self._newest else []
        if summaries:
            self._log.append(_measured(summaries))
            self._log_shown.value = log_table(self._log)

    def _work(self, setting: Setting, is_newest: IsNewest) -> None:
        """Draw the layout. If running, measure until a newer setting is submitted."""
        intervals = setting.intervals
        if not intervals.count:
            self.panel.show_layout(intervals.workloads, replaced_soon=setting.is_running)
            self._table.value = self._summary.value = ""
        if not setting.is_running:
            self._status.value = _STOPPED
            return
        while is_newest():
            if self._presence.is_hidden:
                self._status.value = _HIDDEN
                self._presence.wait(_POLL_S)
            else:
                try:
                    self._measure(setting, is_newest)
                except RankHangs as error:
                    self._fail(error)
                    self._wait_for_response(is_newest)

    def _wait_for_response(self, is_newest: IsNewest) -> None:
        """Wait while a rank hangs, and start again when all respond."""
        while is_newest():
            with contextlib.suppress(RankHangs):
                if self._lab.status().state != "hung":
                    self._submit()
            self._presence.wait(_HANG_POLL_S)

    def _reconnect(self) -> None:
        try:
            self._lab.reconnect()
        except (ControlError, ValueError) as error:
            self._banner.show(error)
        else:
            self.start()

    def _measure(self, setting: Setting, is_newest: IsNewest) -> None:
        """Measure until a newer setting is submitted, the interval changes, or a step has ended."""
        intervals = setting.intervals
        interval_s, read_at_s = self._presence.interval_s(), 0.0
        self._status.value = _IDLE if self._presence.is_idle else _MEASURING
        stream = self._lab.measure_workloads(
            intervals.workloads, interval_s=interval_s, wanted=is_newest
        )
        with contextlib.closing(stream) as samples:
            for sample in samples:
                if not is_newest():
                    return
                if not self._keep(intervals, sample):
                    continue
                self._banner.hide()
                self._probes.measure(intervals.workloads)
                now_s = time.monotonic()
                if self.plot.is_due() or intervals.count == 1 or setting.is_step:
                    self._draw(intervals, now_s)
                if setting.is_step:
                    if is_newest():
                        self._run(False)
                    return
                if now_s >= read_at_s:
                    read_at_s = now_s + _STATUS_EVERY_S
                    self._show_contention(intervals.workloads[0].cp_size)
                if self._presence.is_hidden or self._presence.interval_s() != interval_s:
                    return

    def _keep(self, intervals: Intervals, sample: Sample) -> bool:
        """Keep the sample. Return True if it completes an interval."""
        with self._changed:
            is_complete = intervals.add(sample)
            if is_complete:
                self._changed.notify_all()
        return is_complete

    def _count(self) -> int:
        return self._newest.count if self._newest else 0

    def _draw(self, intervals: Intervals, at_s: float) -> None:
        summaries = intervals.summaries()
        baseline = self._baseline  # another thread may unpin it
        comparisons = compare(baseline, summaries) if baseline else []
        self.panel.show(summaries, comparisons, at_s)
        shown = comparison_table(comparisons, baseline.described) if baseline else ""
        self._against.value = shown
        self._summary.value = algorithms_table(summaries)
        self._table.value = ranks_table(summaries, intervals.workloads[0].batch())
        if time.monotonic() - self._spoke_s >= _SPOKEN_EVERY_S:
            self._spoke_s = time.monotonic()
            self._spoken.value = spoken(summaries)

    def _toggle_pin(self) -> None:
        if self._baseline:
            self.unpin()
            return
        try:
            self.pin()
        except RuntimeError as error:
            self._status.value = f"○ {error}"

    def _show_contention(self, cp_size: int) -> None:
        badge = contention_badge(self._lab.status(), cp_size)
        if badge != self._contention.value:
            self._contention.value = badge

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
        super()._fail(error)
        if isinstance(error, (WorkersDied, NoAnswer)):
            self._banner.show(error)
            self._status.value = _NO_WORKERS


def _measured(summaries: Sequence[Summary]) -> Measured:
    described = "; ".join(describe([summary.newest.workload for summary in summaries]))
    return Measured(described, tuple(summaries))
