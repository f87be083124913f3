"""A pool under requests of growing size: what each one costs, and which of them spill."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from cpkit.lab.pool import LabPool
from cpkit.notebook import style

MB = 1_000_000


@dataclass(frozen=True)
class Served:
    """One request: what it asked for, how long the answer took, and the pool afterwards."""

    asked_mb: float
    answer_ms: float  # until the notebook had the answer, its spill included
    spill_ms: float  # registering a new segment, on the slowest rank; 0 when it fitted
    arena_mb: float
    spilled_mb: float  # all segments that spilled so far


def serve(
    pool: LabPool, arena_mb: float, requests_mb: Sequence[float], cp_size: int
) -> Iterator[Served]:
    """A fresh arena, then one request after the other; each lets go before the next begins."""
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
    """Above: what the pool has and what each request took; below: what the answer cost.

    `expected` keeps room for as many requests while they are still being served.
    """
    names = [f"{n}: {request.asked_mb:g} MB" for n, request in enumerate(served, start=1)]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    _add_memory(figure, served, names)
    _add_cost(figure, served, names)
    figure.update_xaxes(
        style.axis("", type="category", range=[-0.6, max(expected, len(served)) - 0.4])
    )
    figure.update_xaxes(title_text="request", row=2, col=1)
    figure.update_yaxes(style.axis("memory of a rank (MB)", rangemode="tozero"), row=1, col=1)
    figure.update_yaxes(style.axis("until the answer (ms)", rangemode="tozero"), row=2, col=1)
    figure.update_layout(
        barmode="stack",
        bargap=0.35,
        legend=style.legend_below(330, gap=58),
        margin={"l": 66, "r": 16, "t": 66, "b": 96},
    )
    spills = [request for request in served if request.spill_ms]
    return style.finish(
        figure,
        title=f"{len(spills)} of {len(served)} requests spill",
        subtitle="each lets go of its block before the next begins; spilled segments stay",
        alt=_in_words(served),
        height=490,
    )


def _add_memory(figure: go.Figure, served: Sequence[Served], names: list[str]) -> None:
    where = {"row": 1, "col": 1}
    kinds = (("arena", "arena_mb", "#d8dee4"), ("spilled segments", "spilled_mb", "#6e7781"))
    for name, column, color in kinds:
        values = [getattr(request, column) for request in served]
        figure.add_trace(go.Bar(name=name, x=names, y=values, marker={"color": color}), **where)
    asked = [request.asked_mb for request in served]
    marker: dict[str, Any] = {"symbol": "diamond", "size": 9, "color": style.rank_color(0)}
    figure.add_trace(
        go.Scatter(name="asked for", x=names, y=asked, mode="markers", marker=marker), **where
    )


def _add_cost(figure: go.Figure, served: Sequence[Served], names: list[str]) -> None:
    rest = [request.answer_ms - request.spill_ms for request in served]
    spill = [request.spill_ms for request in served]
    where = {"row": 2, "col": 1}
    quiet = {"color": "#c9d1d9"}
    figure.add_trace(go.Bar(name="the request itself", x=names, y=rest, marker=quiet), **where)
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
        **where,
    )


def _in_words(served: Sequence[Served]) -> str:
    words = [
        f"{request.asked_mb:g} MB took {request.answer_ms:.0f} ms"
        + (f", {request.spill_ms:.0f} ms of it a spill" if request.spill_ms else "")
        for request in served
    ]
    return f"Requests in order: {'; '.join(words) or 'none yet'}."
