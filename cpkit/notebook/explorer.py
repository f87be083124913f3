"""The explorer: change a control, and the workers measure the new setting while you watch.

    controls ──▶ newest setting ──▶ thread: lab.measure(setting) ──▶ plot, 5-10 Hz

A control's callback only submits a setting and returns, so a slow measurement never blocks the
kernel, and ten quick changes restart the measurement once. The measurement pauses if no control was
changed for `pause_after_s`.
"""

# Annotations are evaluated here, so that `help()` and Shift-Tab show the allowed values.

import html
import time
from collections.abc import Sequence
from contextlib import closing
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import ipywidgets as widgets
import msgspec

from cpkit.algorithms import AlgorithmChoice
from cpkit.control.errors import BadRequest
from cpkit.control.messages import Sample, Strategy, Workload
from cpkit.lab import Lab
from cpkit.layout import ContextParallelMetadata
from cpkit.notebook.charts import byte_words
from cpkit.notebook.controls import Controls
from cpkit.notebook.live import SHOWN, IsNewest, LivePanel, controls_box, live_box
from cpkit.notebook.panel import FEWEST_FOR_P95, Panel
from cpkit.timing import DEVICE_TIME

if TYPE_CHECKING:
    from typing import Self

    import torch

_CELL = 'style="padding: 0 8px; text-align: right"'


class Measurement(NamedTuple):
    """One setting of the controls, and the samples measured with it."""

    workload: Workload
    is_running: bool
    samples: list[Sample]


class Explorer(LivePanel[Measurement]):
    """Measure the selected workload live. Call `start()`; display it as the last line of a cell.

    The parameters from `cp_size` on are the initial values of the controls. `lengths` are tokens
    per sequence; a sample arrives every `interval_s`.
    """

    description = "Live panel: controls, and a plot of what the workers measure now"

    def __init__(
        self,
        lab: Lab,
        lengths: Sequence[int] = (4096,),
        *,
        interval_s: float = 0.12,
        pause_after_s: float = 120.0,
        cp_size: int | None = None,
        strategy: Strategy = "zigzag",
        algorithm: AlgorithmChoice = "direct",
        symmetric: bool = True,
        heads: int = 8,
        head_dim: int = 128,
        dtype: "str | torch.dtype" = "bfloat16",
        tensors: int = 2,
    ) -> None:
        for name, value in (("interval_s", interval_s), ("pause_after_s", pause_after_s)):
            if not (isinstance(value, Real) and value >= 0):
                raise BadRequest(f"{name} is {value!r}; it must be seconds, 0 or more")
        first = lab.workload(
            lengths, cp_size, strategy, algorithm, symmetric, heads, head_dim, dtype, tensors
        )
        self.controls = Controls(lab.cp_sizes, first)
        self.panel = Panel()
        self._lab, self._interval_s, self._pause_after_s = lab, interval_s, pause_after_s
        self._summary, self._table = (widgets.HTML(_dom_classes=(SHOWN,)) for _ in range(2))
        self._is_running = False
        self._samples: list[Sample] = []  # of the newest setting
        self._error: Exception | None = None
        super().__init__(self.controls.observed(), self.panel.plot)

    def start(self) -> "Self":
        """Measure the selected workload until `stop`; return the panel."""
        self._is_running = True
        self._submit()
        return self

    def stop(self) -> None:
        """Stop measuring. The workers keep running, and new settings still draw their layout."""
        self._is_running = False
        self._submit()

    def wait(self, samples: int = 1, timeout_s: float = 30.0) -> Sample:
        """Wait until the newest setting has this many samples; return the latest.

        Raises the measurement's exception, RuntimeError if the panel is stopped, or TimeoutError.
        """
        with self._changed:
            if not self._is_running and len(self._samples) < samples:
                raise RuntimeError("the panel is stopped: press Start, then run this cell again")
            done = self._changed.wait_for(
                lambda: self._error or len(self._samples) >= samples, timeout_s
            )
            if self._error:
                raise self._error
            if not done:
                raise TimeoutError(
                    f"{len(self._samples)} of {samples} samples arrived in {timeout_s} s"
                )
            return self._samples[-1]

    @property
    def status_html(self) -> str:
        """The status line: measuring, paused, stopped, or an error."""
        return str(self._status.value)

    @property
    def summary_html(self) -> str:
        """The latest sample in one line; empty before the first sample."""
        return str(self._summary.value)

    def _build(self, controls: Sequence[Any]) -> widgets.Widget:
        start = widgets.Button(description="Start", icon="play", tooltip="measure")
        stop = widgets.Button(description="Stop", icon="stop", tooltip="the workers keep running")
        start.add_class("start").on_click(lambda _: self.start())
        stop.add_class("stop").on_click(lambda _: self.stop())
        buttons = widgets.HBox([controls_box([start, stop]), self._status])
        picture = widgets.HBox([self.plot, self._table], layout={"flex_flow": "row wrap"})
        return live_box(self.controls.box(), buttons, self._summary, picture)

    def _setting(self) -> Measurement:
        workload = self.controls.workload()
        with self._changed:
            self._samples, self._error = [], None
            return Measurement(workload, self._is_running, self._samples)

    def _work(self, setting: Measurement, is_newest: IsNewest) -> None:
        """Draw the layout. If running, measure until a newer setting is submitted."""
        workload = setting.workload
        metadata = workload.layout()
        self.panel.show_layout(workload, metadata)
        self._table.value = self._summary.value = ""
        self._status.value = "● measuring" if setting.is_running else "○ stopped"
        if not setting.is_running:
            return
        stop_at_s = time.monotonic() + self._pause_after_s
        sample = None
        options = msgspec.structs.asdict(workload)
        with closing(self._lab.measure(**options, interval_s=self._interval_s)) as samples:
            for sample in samples:
                if not is_newest():
                    return
                self._keep(setting, sample)
                if self.plot.is_due():
                    self._draw(sample, metadata)
                if time.monotonic() > stop_at_s:
                    break
        if sample:
            self._draw(sample, metadata)
        self._status.value = "○ paused: no control was changed for a while; press Start to continue"

    def _keep(self, setting: Measurement, sample: Sample) -> None:
        self.panel.add(sample)
        with self._changed:
            setting.samples.append(sample)
            self._changed.notify_all()

    def _draw(self, sample: Sample, metadata: ContextParallelMetadata) -> None:
        self.panel.show_sample(sample)
        self._summary.value = _summary(sample)
        self._table.value = _table(sample, metadata)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
        super()._fail(error)


def _summary(sample: Sample) -> str:
    slowest = sample.per_rank_us.index(sample.time_us)
    clock: str = sample.clock
    if clock == DEVICE_TIME:
        clock += f" (call time {sample.call_us:,.0f} µs{', mostly host' * sample.host_bound})"
    return (
        f"<b>{sample.time_us:,.0f} µs</b> {clock}, slowest is rank {slowest} · "
        f"{byte_words(sample.total_bytes)} gathered · algbw {sample.algbw_gbps:.2f} GB/s · "
        f"busbw {sample.busbw_gbps:.2f} GB/s · path <b>{sample.path}</b>: "
        f"{html.escape(sample.path_reason)}"
    )


def _table(sample: Sample, metadata: ContextParallelMetadata) -> str:
    """Return the plot as a table, its text alternative."""
    columns = ("rank", "rows", "padding rows", "median µs", "min µs", "p95 µs")
    head = "".join(f'<th scope="col" {_CELL}>{name}</th>' for name in columns)
    lines = [f"<tr>{head}</tr>"]
    for rank, rows in enumerate(metadata.per_rank_actual_token):
        padding = metadata.max_rank_len[0] - rows
        times = [f"{t[rank]:,.0f}" for t in (sample.per_rank_us, sample.per_rank_min_us)]
        has_p95 = sample.iterations >= FEWEST_FOR_P95
        times.append(f"{sample.per_rank_p95_us[rank]:,.0f}" if has_p95 else "–")
        values = [str(rank), str(rows), str(padding), *times]
        lines.append("<tr>" + "".join(f"<td {_CELL}>{value}</td>" for value in values) + "</tr>")
    caption = f"<caption>{sample.iterations} gathers in this sample</caption>"
    return f'<table class="cpkit-ranks">{caption}{"".join(lines)}</table>'
