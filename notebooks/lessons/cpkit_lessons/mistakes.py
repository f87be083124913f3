"""Timing mistakes: what each of them reports, beside the samples it had and the right answer."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from cpkit.notebook import style

_FAINT_INK = "#8c959f"


class Mistake(NamedTuple):
    """One mistake: the right time, what is reported instead, and the samples behind the right."""

    right_us: float
    reported_us: float
    samples_us: Sequence[float]

    @property
    def factor(self) -> float:
        """Reported time by right time: under 1, the gather looks faster than it is."""
        return self.reported_us / self.right_us


def damage(found: Mapping[str, Mistake]) -> go.Figure:
    """One line a mistake, right = 1: grey dots are the samples, a red ✗ is what was reported."""
    figure = go.Figure()
    names = list(found)
    for name, each in found.items():
        samples = np.asarray(each.samples_us, dtype=float) / each.right_us
        figure.add_scatter(
            x=samples.tolist(),
            y=[name] * len(samples),
            mode="markers",
            marker={"color": _FAINT_INK, "size": 6, "opacity": 0.5},
            showlegend=False,
            hovertemplate="sample: %{x:.2f} × the right time<extra></extra>",
        )
    figure.data[0].update(name="samples, done right", showlegend=True)
    figure.add_scatter(
        name="what the mistake reports",
        x=[found[name].factor for name in names],
        y=names,
        mode="markers+text",
        marker={"color": style.WRONG, "symbol": "x", "size": 11},
        text=[f"{found[name].factor:.2g} ×" for name in names],
        textposition=["top left" if found[n].factor < 1 else "top right" for n in names],
        hovertemplate="%{y}: %{x:.3g} × the right time<extra></extra>",
    )
    figure.add_vline(x=1, line={"color": style.INK, "width": 1.5})
    figure.update_layout(
        xaxis=style.axis("reported time / right time", type="log", dtick=1, range=_room(found)),
        yaxis=style.names_axis(type="category"),
    )
    words = ", ".join(
        f"{name}: {each.factor:.2g} times the right time" for name, each in found.items()
    )
    return style.finish(
        figure,
        title="What each timing mistake reports",
        subtitle="the line is the right time: median over iterations of the slowest rank",
        alt=words + ".",
        height=170 + 46 * len(names),
    )


def _room(found: Mapping[str, Mistake]) -> list[float]:
    """The range of the axis, as powers of ten: the words beside the outer marks fit in."""
    factors = [each.factor for each in found.values()]
    return [math.log10(min(0.5, *factors) / 3), math.log10(max(2.0, *factors) * 3)]


@contextmanager
def noisy_neighbour(threads: int = 2) -> Iterator[None]:
    """Keep cores and memory of this machine busy while inside, as another user would."""
    over = threading.Event()
    workers = [threading.Thread(target=_copy_until, args=(over,)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        over.set()
        for worker in workers:
            worker.join()


def _copy_until(over: threading.Event) -> None:
    source = np.ones(1 << 24, dtype=np.uint8)
    target = np.empty_like(source)
    while not over.is_set():
        np.copyto(target, source)  # without the GIL: the kernel goes on
