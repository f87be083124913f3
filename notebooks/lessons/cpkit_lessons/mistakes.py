"""Draw timing mistakes: the time that each one reports, the samples, and the right time."""

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
    """One mistake: the right time, the reported time, and the samples of the right time."""

    right_us: float
    reported_us: float
    samples_us: Sequence[float]

    @property
    def factor(self) -> float:
        """Reported time / right time; below 1 the gather seems faster than it is."""
        return self.reported_us / self.right_us


def damage(found: Mapping[str, Mistake]) -> go.Figure:
    """Draw one line per mistake, relative to the right time: grey samples, the report a red ✗."""
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
    figure.data[0].update(name="samples, measured correctly", showlegend=True)
    figure.add_scatter(
        name="reported with the mistake",
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
        xaxis=style.axis("reported time / right time", type="log", dtick=1, range=_range(found)),
        yaxis=style.names_axis(type="category"),
    )
    words = ", ".join(
        f"{name}: {each.factor:.2g} times the right time" for name, each in found.items()
    )
    return style.finish(
        figure,
        title="Reported time with each timing mistake",
        subtitle="the line is the time without the mistake, on the slowest rank",
        alt=words + ".",
        height=170 + 46 * len(names),
    )


def _range(found: Mapping[str, Mistake]) -> list[float]:
    """Return the range in powers of ten, with room for the labels of the outer marks."""
    factors = [each.factor for each in found.values()]
    return [math.log10(min(0.5, *factors) / 3), math.log10(max(2.0, *factors) * 3)]


@contextmanager
def noisy_neighbour(threads: int = 2) -> Iterator[None]:
    """Keep cores and memory busy inside the context, as another user of the machine would."""
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
        np.copyto(target, source)  # releases the GIL, so the notebook continues
