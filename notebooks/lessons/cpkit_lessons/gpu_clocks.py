"""Figures of a run that was recorded on several GPUs: its two clocks, and the work beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from cpkit.notebook import style
from cpkit.notebook.style import byte_words
from cpkit_lessons.recordings import Recording

_CLOCKS = {"call time": "call_us", "device time": "time_us"}
_LABELS = {
    "NCCL": "NCCL only",
    "NCCL both": "NCCL only, both buffers registered",
    "seed both": "seed, both buffers registered",
}


def two_clocks(recording: Recording, size_bytes: int, variants: Sequence[str]) -> go.Figure:
    """Draw call time and device time of these variants, each clock in its own order.

    Call time is what a Python loop sees that waits for each call. Device time is that of a CUDA
    graph with several calls, divided by their number.
    """
    table = _labelled(recording.table[recording.table["size_bytes"] == size_bytes], variants)
    clocks = {clock: table[column] for clock, column in _CLOCKS.items()}
    figure = _bars(clocks)
    orders = {clock: "; ".join(us.sort_values().index) for clock, us in clocks.items()}
    style.finish(
        figure,
        title=f"Call time and device time of a gather of {byte_words(size_bytes)}",
        alt=". ".join(f"By {clock}, fastest first: {order}" for clock, order in orders.items()),
        height=200 + 48 * len(variants),
    )
    return _recorded(figure, recording)


def beside_product(recording: Recording, variants: Sequence[str]) -> go.Figure:
    """Draw what a gather and a matrix product on another stream cost each other."""
    table = _labelled(recording.beside, variants)
    clocks = {
        "gather alone": table["time_us"],
        "gather beside a product": table["beside_us"],
        "delay of the product": table["delay_us"],
    }
    figure = _bars(clocks)
    size = int(table["size_bytes"].iloc[0])
    words = "; ".join(
        f"{name} takes {row.beside_us:,.0f} instead of {row.time_us:,.0f} µs, and delays the "
        f"product by {row.delay_us:,.0f} µs"
        for name, row in zip(table.index, table.itertuples(), strict=True)
    )
    style.finish(
        figure,
        title=f"A gather of {byte_words(size)} beside a matrix product",
        alt=words + ".",
        height=200 + 64 * len(variants),
    )
    return _recorded(figure, recording)


def _labelled(table: pd.DataFrame, variants: Sequence[str]) -> pd.DataFrame:
    """Return the rows of these variants, named as in the figures."""
    return table.set_index("variant").loc[list(variants)].rename(index=_LABELS)


def _bars(groups: Mapping[str, pd.Series[float]]) -> go.Figure:
    """Draw a horizontal bar per name and group; the groups differ in hatching and colour."""
    figure = go.Figure()
    for number, (group, us) in enumerate(groups.items()):
        figure.add_bar(
            name=group,
            orientation="h",
            textposition="outside",
            y=us.index.tolist(),
            x=us.tolist(),
            text=[f"{value:,.0f}" for value in us],
            marker={
                "color": style.RANK_COLORS[number],
                "pattern": {"shape": ("", "/", "x")[number]},
            },
            hovertemplate=f"%{{y}}, {group}: %{{x:,.1f}} µs<extra></extra>",
        )
    figure.update_layout(
        xaxis=style.axis("time (µs, slowest rank)", rangemode="tozero"), yaxis=style.names_axis()
    )
    return figure


def _recorded(figure: go.Figure, recording: Recording) -> go.Figure:
    date = str(recording.environment["date"])
    return style.recorded(figure, machine=recording.machine, date=date, source=recording.name)
