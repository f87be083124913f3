"""A small panel: choose the arena, and a row of requests is served by the real pool, live."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ipywidgets as widgets

from cpkit.lab import Lab
from cpkit.notebook.live import LivePanel
from cpkit.notebook.requests import Served, pool_requests, serve

ARENAS_MB = (2, 8, 16, 32, 64)


class PoolLive(LivePanel[int]):
    """Each arena is filled by the same requests."""

    words = "Panel: choose the arena, see which requests spill"

    def __init__(
        self, lab: Lab, requests_mb: Sequence[float], cp_size: int, arena_mb: int = 16
    ) -> None:
        self.arena_mb = widgets.SelectionSlider(
            options=ARENAS_MB, value=arena_mb, description="arena (MB)", continuous_update=False
        )
        self.arena_mb.add_class("arena-mb")
        self.served: list[Served] = []  # of the newest arena
        self._lab, self._requests_mb, self._cp_size = lab, list(requests_mb), cp_size
        super().__init__([self.arena_mb], pool_requests([], len(requests_mb)))

    def _wish(self) -> int:
        return int(self.arena_mb.value)

    def _follow(self, wish: int, is_newest: Callable[[], bool]) -> str:
        self.served = []
        for request in serve(self._lab.pool, wish, self._requests_mb, self._cp_size):
            self.served.append(request)
            if not is_newest():
                return ""
            if self.plot.is_due() or len(self.served) == len(self._requests_mb):
                self._draw(pool_requests(self.served, len(self._requests_mb)))
        spills = sum(bool(request.spill_ms) for request in self.served)
        return f"{len(self.served)} requests, {spills} spills"
