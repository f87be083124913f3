"""The frame of a small live panel: controls, one status line, and a live plot."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import ipywidgets as widgets
import plotly.graph_objects as go

from cpkit.notebook import cells, style
from cpkit.notebook.latest import LatestWins
from cpkit.notebook.plot import LivePlot

Wish = TypeVar("Wish")


class LivePanel(Generic[Wish]):
    """Display it as the last line of a cell. It follows the latest setting of its controls.

    A subclass reads its controls (`_wish`), and does what they say (`_follow`). `figure` is the
    figure that the page shows.
    """

    words: ClassVar[str]  # instead of the panel, where no widgets are shown

    def __init__(self, controls: Sequence[Any], figure: go.Figure | None = None) -> None:
        cells.replace_previous(self)
        self.figure = figure or waiting_figure()
        self.plot = LivePlot(self.figure)
        self.done = 0  # settings that were followed to the end
        self._status = status_line()
        self._changed = threading.Condition()
        self._box = live_box(widgets.HBox([controls_box(controls), self._status]), self.plot)
        self._worker = LatestWins(f"cpkit-{type(self).__name__}", self._work, self._fail)
        for control in controls:
            control.observe(self._ask, "value")
        self._ask()

    def wait(self, done: int = 1, timeout_s: float = 60.0) -> None:
        """Wait until so many settings were followed to the end. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.done >= done, timeout_s):
                raise TimeoutError(
                    f"{self.done} of {done} were done in {timeout_s} s; the panel says: "
                    f"{self._status.value or 'nothing'}"
                )

    def close(self) -> None:
        """End the thread and free the widgets."""
        self._worker.close()
        close_widgets(self._box)
        cells.forget(self)

    def _wish(self) -> Wish:
        """Return what the controls say."""
        raise NotImplementedError

    def _follow(self, wish: Wish, is_newest: Callable[[], bool]) -> str:
        """Do it and draw it. Returns the status line, or "" if a newer setting arrived."""
        raise NotImplementedError

    def _draw(self, figure: go.Figure) -> None:
        self.figure = figure
        self.plot.publish(figure)

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        data: dict[str, Any] = self._box._repr_mimebundle_()
        return data | {"text/plain": self.words}

    def _ask(self, _: object = None) -> None:
        self._worker.ask(self._wish())

    def _work(self, wish: Wish, is_newest: Callable[[], bool]) -> None:
        words = self._follow(wish, is_newest)
        if not words:
            return
        self._status.value = f"✓ {words}"
        with self._changed:
            self.done += 1
            self._changed.notify_all()

    def _fail(self, problem: Exception) -> None:
        self._status.value = wrong_html(problem)


def waiting_figure() -> go.Figure:
    """Return the figure of a panel that has no result yet."""
    words = "Waiting for the workers"
    figure = go.Figure(layout={"xaxis": {"visible": False}, "yaxis": {"visible": False}})
    return style.finish(figure, title=words, alt=f"{words}.", height=490)


# When the kernel is lost, plot.js finds these classes, disables controls, and replaces the status
# line.


def live_box(*children: widgets.Widget) -> widgets.VBox:
    """Stack the parts of a live panel."""
    return widgets.VBox(children, _dom_classes=("cpkit-live",))


def controls_box(controls: Sequence[widgets.Widget], **layout: str) -> widgets.HBox:
    """Put controls side by side."""
    return widgets.HBox(controls, layout=layout, _dom_classes=("cpkit-controls",))


def status_line() -> widgets.HTML:
    """Return the line that says what the panel does now."""
    return widgets.HTML(_dom_classes=("cpkit-status",))


def close_widgets(widget: widgets.Widget) -> None:
    """Close a widget, its children, and their layouts and styles."""
    for child in getattr(widget, "children", ()):
        close_widgets(child)
    for part in (getattr(widget, "layout", None), getattr(widget, "style", None)):
        if part is not None:
            part.close()
    widget.close()


def wrong_html(problem: Exception) -> str:
    """Return an error as HTML for the status line."""
    words = html.escape(f"{type(problem).__name__}: {problem}")
    return f'<span style="color: {style.WRONG}; white-space: pre-wrap">✗ {words}</span>'
