"""A panel that allocates from the real pool: choose the arena's size, see which requests spill.

The figure shows the memory and the duration of each request.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets as widgets
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from cpkit.lab import Lab
from cpkit.lab.pool import LabPool
from cpkit.notebook import style
from cpkit.notebook.live import IsNewest
from cpkit_lessons.step_panel import StepPanel

ARENAS = (1 / 8, 1 / 2, 1, 2, 4)  # choices, in units of the first arena
MB = 1_000_000


@dataclass(frozen=True)
class Served:
    """One request: its size, its duration, and the pool afterwards."""

    asked_mb: float
    answer_ms: float  # response time in the notebook, including a spill
    spill_ms: float  # time to register a new segment, on the slowest rank; 0 without a spill
    arena_mb: float
    spilled_mb: float  # total size of the spilled segments


class PoolLive(StepPanel[float]):
    """Serve the same requests from an arena of the chosen size."""

    description = "Panel: choose the arena's size, see which requests spill"

    def __init__(
        self, lab: Lab, requests_mb: Sequence[float], cp_size: int, arena_mb: float = 16
    ) -> None:
        self.arena_mb = widgets.SelectionSlider(
            options=[(f"{arena_mb * factor:g}", arena_mb * factor) for factor in ARENAS],
            value=arena_mb,
            description="arena (MB)",
            continuous_update=False,
        )
        self.arena_mb.add_class("arena-mb")
        self.served: list[Served] = []  # from the newest arena
        self._lab, self._requests_mb, self._cp_size = lab, list(requests_mb), cp_size
        super().__init__([self.arena_mb], pool_requests([], len(requests_mb)))

    def _setting(self) -> float:
        return float(self.arena_mb.value)

    def _show(self, setting: float, is_newest: IsNewest) -> str:
        self.served = []
        for request in serve(self._lab.pool, setting, self._requests_mb, self._cp_size):
            self.served.append(request)
            if not is_newest():
                return ""
            if self.plot.is_due() or len(self.served) == len(self._requests_mb):
                self._draw(pool_requests(self.served, len(self._requests_mb)))
        spills = sum(bool(request.spill_ms) for request in self.served)
        return f"{len(self.served)} requests, {spills} of them spilled"


def serve(
    pool: LabPool, arena_mb: float, requests_mb: Sequence[float], cp_size: int
) -> Iterator[Served]:
    """Make a new arena. Per request, allocate and release one block, and yield the cost."""
    before = pool.configure(round(arena_mb * MB), cp_size)
    for asked_mb in requests_mb:
        start_s = time.perf_counter()
        after = pool.allocate(round(asked_mb * MB), cp_size)
        answer_ms = (time.perf_counter() - start_s) * 1e3
        spill_ms = float((after["spill_ms"] - before["spill_ms"]).max())
        arena, spilled = float(after["arena_bytes"].max()), float(after["spill_bytes"].max())
        yield Served(asked_mb, answer_ms, spill_ms, arena / MB, spilled / MB)
        before = pool.release(cp_size)


def pool_requests(served: Sequence[Served], expected: int = 0) -> go.Figure:
    """Draw the pool's memory and the requested size above, the duration of each request below.

    `expected` is the number of requests; those not yet served are left empty.
    """
    names = [f"{n}: {request.asked_mb:g} MB" for n, request in enumerate(served, start=1)]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    _add_memory(figure, served, names)
    _add_duration(figure, served, names)
    figure.update_xaxes(
        style.axis("", type="category", range=[-0.6, max(expected, len(served)) - 0.4])
    )
    figure.update_xaxes(title_text="request", row=2, col=1)
    figure.update_yaxes(style.axis("memory per rank (MB)", rangemode="tozero"), row=1, col=1)
    figure.update_yaxes(style.axis("response time (ms)", rangemode="tozero"), row=2, col=1)
    figure.update_layout(barmode="stack")
    spills = [request for request in served if request.spill_ms]
    return style.finish(
        figure,
        title=f"{len(spills)} of {len(served)} requests spill",
        subtitle="each block is released before the next request; spilled segments stay",
        alt=_in_words(served),
        height=490,
    )


def _add_memory(figure: go.Figure, served: Sequence[Served], names: list[str]) -> None:
    upper = {"row": 1, "col": 1}
    kinds = (("arena", "arena_mb", "#d8dee4"), ("spilled segments", "spilled_mb", "#6e7781"))
    for name, column, color in kinds:
        values = [getattr(request, column) for request in served]
        figure.add_trace(go.Bar(name=name, x=names, y=values, marker={"color": color}), **upper)
    asked = [request.asked_mb for request in served]
    marker: dict[str, Any] = {"symbol": "diamond", "size": 9, "color": style.rank_color(0)}
    figure.add_trace(
        go.Scatter(name="requested", x=names, y=asked, mode="markers", marker=marker), **upper
    )


def _add_duration(figure: go.Figure, served: Sequence[Served], names: list[str]) -> None:
    rest = [request.answer_ms - request.spill_ms for request in served]
    spill = [request.spill_ms for request in served]
    lower = {"row": 2, "col": 1}
    light = {"color": "#c9d1d9"}
    figure.add_trace(go.Bar(name="request without spill", x=names, y=rest, marker=light), **lower)
    figure.add_trace(
        go.Bar(
            name="spill: registering a segment",
            x=names,
            y=spill,
            text=[f"spill {ms:.0f}" if ms else "" for ms in spill],
            textposition="outside",
            cliponaxis=False,
            marker={"color": "#4f5b66", "pattern": style.hatch("x")},
        ),
        **lower,
    )


def _in_words(served: Sequence[Served]) -> str:
    words = [
        f"{request.asked_mb:g} MB took {request.answer_ms:.0f} ms"
        + (f", {request.spill_ms:.0f} ms of it a spill" if request.spill_ms else "")
        for request in served
    ]
    return f"Requests in order: {'; '.join(words) or 'none yet'}."
