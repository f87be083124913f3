"""A small panel: choose the arena, and a row of requests is served by the real pool, live."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ipywidgets as widgets
import plotly.graph_objects as go

from cpkit.notebook import style
from cpkit.notebook.latest import LatestWins
from cpkit.notebook.requests import Pools, Served, pool_requests, serve
from cpkit.notebook.stepper import redraw

ARENAS_MB = (2, 8, 16, 32, 64)


class PooledLab(Protocol):
    """What the panel needs of a `Lab`."""

    @property
    def pool(self) -> Pools:
        """The symmetric pools of the workers."""


class PoolLive:
    """Display it as the last line of a cell. Each arena is filled by the same requests."""

    def __init__(
        self, lab: PooledLab, requests_mb: Sequence[float], cp_size: int, arena_mb: int = 16
    ) -> None:
        self.arena_mb = widgets.SelectionSlider(
            options=ARENAS_MB, value=arena_mb, description="arena (MB)", continuous_update=False
        )
        self.arena_mb.add_class("arena-mb")
        self.served: list[Served] = []  # of the newest arena
        self.done = 0  # arenas that were served to the end
        self.widget = go.FigureWidget(pool_requests([], len(requests_mb)))
        self._lab, self._requests_mb, self._cp_size = lab, list(requests_mb), cp_size
        self._status = widgets.HTML()
        self._changed = threading.Condition()
        self._box = widgets.VBox([widgets.HBox([self.arena_mb, self._status]), self.widget])
        self._worker = LatestWins("cpkit-pool", self._serve, self._fail)
        self.arena_mb.observe(self._ask, "value")
        self._ask()

    def wait(self, done: int = 1, timeout_s: float = 60.0) -> None:
        """Wait until so many arenas were served to the end. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.done >= done, timeout_s):
                raise TimeoutError(
                    f"{self.done} of {done} arenas were served in {timeout_s} s; the panel says: "
                    f"{self._status.value or 'nothing'}"
                )

    def close(self) -> None:
        """End the thread and free the widgets."""
        self._worker.close()
        self.widget.close()
        self._box.close()

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        data: dict[str, Any] = self._box._repr_mimebundle_()
        return data | {"text/plain": "Panel: choose the arena, see which requests spill"}

    def _ask(self, _: object = None) -> None:
        self._worker.ask(int(self.arena_mb.value))

    def _serve(self, arena_mb: int, is_newest: Callable[[], bool]) -> None:
        self.served = []
        requests = serve(self._lab.pool, arena_mb, self._requests_mb, self._cp_size)
        for request in requests:
            self.served.append(request)
            redraw(self.widget, pool_requests(self.served, len(self._requests_mb)))
            if not is_newest():
                return
        spills = sum(bool(request.spill_ms) for request in self.served)
        self._status.value = f"✓ {len(self.served)} requests, {spills} spills"
        with self._changed:
            self.done += 1
            self._changed.notify_all()

    def _fail(self, problem: Exception) -> None:
        words = html.escape(f"{type(problem).__name__}: {problem}")
        self._status.value = f'<span style="color: {style.WRONG}">✗ {words}</span>'
