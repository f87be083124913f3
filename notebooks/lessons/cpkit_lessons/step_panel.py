"""Live panels whose work on a setting ends: one request, or a few, and the figure of the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpkit.notebook import style
from cpkit.notebook.live import IsNewest, LivePanel, Setting
from cpkit.notebook.plot import LivePlot

if TYPE_CHECKING:
    import plotly.graph_objects as go


class StepPanel(LivePanel[Setting]):
    """A live panel whose work on a setting ends. `figure` is the figure that the page shows."""

    def __init__(self, controls: Sequence[Any], figure: go.Figure | None = None) -> None:
        self.figure: Any = figure or waiting_figure()
        self.done = 0  # number of settings whose work is complete
        super().__init__(controls, LivePlot(self.figure))

    def wait(self, done: int = 1, timeout_s: float = 60.0) -> None:
        """Wait until the work on this many settings is complete. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.done >= done, timeout_s):
                raise TimeoutError(
                    f"{self.done} of {done} settings were done in {timeout_s} s; the panel shows: "
                    f"{self._status.value or 'nothing'}"
                )

    def _show(self, setting: Setting, is_newest: IsNewest) -> str:
        """Work on it and draw it. Return the status line, or "" if a newer one was submitted."""
        raise NotImplementedError

    def _draw(self, figure: go.Figure) -> None:
        self.figure = figure
        self.plot.publish(figure)

    def _work(self, setting: Setting, is_newest: IsNewest) -> None:
        text = self._show(setting, is_newest)
        if not text:
            return
        self._status.value = f"✓ {text}"
        with self._changed:
            self.done += 1
            self._changed.notify_all()


def waiting_figure() -> style.PlainFigure:
    """Return the figure of a panel that has no result yet."""
    text = "Waiting for the workers"
    layout = {"xaxis": {"visible": False}, "yaxis": {"visible": False}}
    return style.finish({"data": [], "layout": layout}, title=text, alt=f"{text}.", height=490)
