"""A small panel: choose cp_size and algorithm, and the workers gather anew, stage by stage."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, get_args

import ipywidgets as widgets
import plotly.graph_objects as go

from cpkit.control.messages import Algorithm
from cpkit.notebook import style
from cpkit.notebook.grids import StagedGather, stage_grid
from cpkit.notebook.latest import LatestWins


class GatheringLab(Protocol):
    """What the stepper needs of a `Lab`."""

    @property
    def cp_sizes(self) -> tuple[int, ...]:
        """Divisors of the world size."""

    def gather(
        self, lengths: Sequence[int], cp_size: int | None = None, **options: Any
    ) -> StagedGather:
        """One verified gather with its stages."""


class Wish(NamedTuple):
    """One gather to look at."""

    cp_size: int
    algorithm: str


class Stepper:
    """Display it as the last line of a cell. Each change runs a real gather and redraws it."""

    def __init__(self, lab: GatheringLab, lengths: Sequence[int], cp_size: int) -> None:
        self.cp_size = widgets.SelectionSlider(
            options=lab.cp_sizes, value=cp_size, description="cp_size", continuous_update=False
        )
        self.algorithm = widgets.Dropdown(
            options=get_args(Algorithm), value="padded", description="algorithm"
        )
        self.cp_size.add_class("cp-size")
        self.gathers = 0  # verified gathers drawn so far
        self.widget = go.FigureWidget()
        self._lab, self._lengths = lab, list(lengths)
        self._status = widgets.HTML()
        self._drawn = threading.Condition()
        controls = widgets.HBox([self.cp_size, self.algorithm, self._status])
        self._box = widgets.VBox([controls, self.widget])
        self._worker = LatestWins("cpkit-stepper", self._gather, self._fail)
        for control in (self.cp_size, self.algorithm):
            control.observe(self._ask, "value")
        self._ask()

    def wait(self, gathers: int = 1, timeout_s: float = 30.0) -> None:
        """Wait until so many gathers were drawn. Raises TimeoutError."""
        with self._drawn:
            if not self._drawn.wait_for(lambda: self.gathers >= gathers, timeout_s):
                raise TimeoutError(
                    f"{self.gathers} of {gathers} gathers were drawn in {timeout_s} s; "
                    f"the panel says: {self._status.value or 'nothing'}"
                )

    def close(self) -> None:
        """End the thread and free the widgets."""
        self._worker.close()
        self.widget.close()
        self._box.close()

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        data: dict[str, Any] = self._box._repr_mimebundle_()
        return data | {"text/plain": "Panel: choose cp_size and algorithm, see the stages"}

    def _ask(self, _: object = None) -> None:
        self._worker.ask(Wish(self.cp_size.value, self.algorithm.value))

    def _gather(self, wish: Wish, is_newest: Callable[[], bool]) -> None:
        gathered = self._lab.gather(self._lengths, wish.cp_size, algorithm=wish.algorithm)
        if not is_newest():
            return
        redraw(self.widget, stage_grid(gathered))
        self._status.value = "✓ every byte checked"
        with self._drawn:
            self.gathers += 1
            self._drawn.notify_all()

    def _fail(self, problem: Exception) -> None:
        words = html.escape(f"{type(problem).__name__}: {problem}")
        self._status.value = f'<span style="color: {style.WRONG}">✗ {words}</span>'


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
