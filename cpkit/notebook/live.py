"""The frame of a small live panel: controls, one status line, and a figure that is drawn anew."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import ipywidgets as widgets
import plotly.graph_objects as go

from cpkit.notebook import style
from cpkit.notebook.latest import LatestWins

Wish = TypeVar("Wish")


class LivePanel(Generic[Wish]):
    """Display it as the last line of a cell. The newest wish of the controls is shown, live.

    A panel says what its controls ask for (`_wish`), and does it (`_follow`).
    """

    words: ClassVar[str]  # instead of the panel, where no widgets are shown

    def __init__(self, controls: Sequence[Any], figure: go.Figure | None = None) -> None:
        self.widget = go.FigureWidget(figure)
        self.done = 0  # wishes that were followed to the end
        self._status = widgets.HTML()
        self._changed = threading.Condition()
        self._box = widgets.VBox([widgets.HBox([*controls, self._status]), self.widget])
        self._worker = LatestWins(f"cpkit-{type(self).__name__}", self._work, self._fail)
        for control in controls:
            control.observe(self._ask, "value")
        self._ask()

    def wait(self, done: int = 1, timeout_s: float = 60.0) -> None:
        """Wait until so many wishes were followed to the end. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.done >= done, timeout_s):
                raise TimeoutError(
                    f"{self.done} of {done} were done in {timeout_s} s; the panel says: "
                    f"{self._status.value or 'nothing'}"
                )

    def close(self) -> None:
        """End the thread and free the widgets."""
        self._worker.close()
        self.widget.close()
        self._box.close()

    def _wish(self) -> Wish:
        """What the controls say."""
        raise NotImplementedError

    def _follow(self, wish: Wish, is_newest: Callable[[], bool]) -> str:
        """Do it and draw it; words for the status line, or none when a newer wish came."""
        raise NotImplementedError

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


def wrong_html(problem: Exception) -> str:
    """An error as a status line."""
    words = html.escape(f"{type(problem).__name__}: {problem}")
    return f'<span style="color: {style.WRONG}; white-space: pre-wrap">✗ {words}</span>'


def redraw(widget: go.FigureWidget, figure: go.Figure) -> None:
    """Make a live widget show another figure, in one batch."""
    with widget.batch_update():
        widget.layout.update(figure.layout)
        for old, new in zip(widget.data, figure.data, strict=False):
            old.update(new.to_plotly_json() | {"visible": True, "uid": old.uid}, overwrite=True)
        for old in widget.data[len(figure.data) :]:
            old.visible = False
    if len(figure.data) > len(widget.data):
        widget.add_traces(figure.data[len(widget.data) :])
