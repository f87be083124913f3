"""The explorer's other views: who owns which token, bandwidth against its bounds, the pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from cpkit.control.messages import ClockResult
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.notebook import style
from cpkit.notebook.charts import byte_words
from cpkit.notebook.grids import MAX_LABELLED, padding_grid
from cpkit.notebook.intervals import Summary
from cpkit.timing import DEVICE_TIME, algbw_gbps

VIEWS = ("times", "tokens", "bandwidth", "pool")
_GREY = "#8f9ba8"


class Model(Protocol):
    """What predicts the time of a gather, such as `cpkit.cost.HostModel`."""

    def predict_us(self, algorithm: str, total_bytes: int, cp_size: int, /) -> float:
        """Return the time in µs. Raises KeyError for an unknown algorithm."""


def tokens(metadata: ContextParallelMetadata) -> go.Figure:
    """Draw each slot of a small batch, and the fractions of padding of a larger one."""
    if metadata.max_rank_len[0] <= MAX_LABELLED:
        return padding_grid(metadata)
    length = metadata.max_rank_len[0]
    rows = metadata.per_rank_actual_token
    by_rank = [(length - count) / length for count in rows]
    by_sequence = [_padding_alone(n, metadata) for n in metadata.lengths]
    total = sum(by_rank) / metadata.cp_size
    figure = make_subplots(
        rows=2,
        cols=1,
        vertical_spacing=0.3,
        subplot_titles=("Per rank, in this batch", "Per sequence, if it were gathered alone"),
    )
    ranks = [f"rank {rank}" for rank in range(metadata.cp_size)]
    marker = {"color": style.PADDING, "pattern": style.hatch(), "line": {"color": _GREY}}
    tip = "%{customdata}: %{y:.2%} of its slots is padding<extra></extra>"
    figure.add_bar(x=ranks, y=by_rank, customdata=ranks, row=1, col=1, marker=marker)
    named = [f"sequence {i}, {n} tokens" for i, n in enumerate(metadata.lengths)]
    places = list(range(len(named)))
    figure.add_bar(x=places, y=by_sequence, customdata=named, row=2, col=1, marker=marker)
    figure.update_traces(hovertemplate=tip, showlegend=False)
    figure.update_yaxes(style.axis("padding", tickformat=".2~%", rangemode="tozero"))
    figure.update_xaxes(title_text="sequence", row=2, col=1)
    figure.update_annotations(font={"size": 13})
    figure.update_layout(margin_t=100, margin_b=60, uirevision="padding")
    words = f"{total:.2%} of {length * metadata.cp_size:,} slots is padding"
    return style.finish(
        figure,
        title=f"Padded to one length: {words}",
        subtitle=f"{metadata.strategy}, {len(named)} sequences, {metadata.total_tokens:,} tokens, "
        f"max_rank_len {length:,} rows",
        alt=f"{words}. Rows per rank: {', '.join(map(str, rows))}. Alone, the sequences would have "
        f"{min(by_sequence):.2%} to {max(by_sequence):.2%} padding.",
        height=560,
    )


def _padding_alone(tokens: int, metadata: ContextParallelMetadata) -> float:
    alone = prepare_context_parallel_metadata((tokens,), metadata.cp_size, metadata.strategy)
    return 1 - tokens / sum(alone.max_rank_len)


def floor_us(probe: ClockResult) -> float:
    """Return the least time of a gather, from `Lab.clock(["barrier", "copy"])` of its bytes.

    It meets once, reads every byte once and writes it once per rank. When all ranks copy the bytes,
    2·cp·S bytes move; a gather moves at least (cp+1)·S. The quickest samples count. Device time has
    no barrier.
    """
    least = (probe.cp_size + 1) / (2 * probe.cp_size)
    on_device = probe.device_us("copy")
    if on_device.size:
        return float(least * on_device.max(axis=1).min())
    meet_us, copy_us = (probe.slowest_us(call).min() for call in ("barrier", "copy"))
    return float(meet_us + least * copy_us)


def bandwidth(
    summaries: Sequence[Summary], floor: float | str | None, model: Model | None
) -> go.Figure:
    """Draw algbw per algorithm, its bound, and what the model predicts. `floor` is µs or a text."""
    newest = summaries[0].newest
    total, cp_size = newest.total_bytes, newest.cp_size
    names = [summary.algorithm for summary in summaries]
    achieved = [algbw_gbps(total, summary.median_us) for summary in summaries]
    text = [f"{gbps:.2f}" for gbps in achieved]
    figure = go.Figure()
    figure.add_bar(
        name="achieved (median)",
        orientation="h",
        y=names,
        x=achieved,
        text=text,
        textposition="outside",
        cliponaxis=False,
        marker={"color": _GREY},
    )
    words = [f"{name} {gbps:.2f} GB/s" for name, gbps in zip(names, achieved, strict=True)]
    if isinstance(floor, float):
        bound = algbw_gbps(total, floor)
        line = {"color": style.INK, "dash": "dash", "width": 1.5}
        where = {"x": [bound] * len(names), "y": names, "mode": "lines+markers"}
        name = f"floor: {bound:.2f} GB/s, {floor:,.0f} µs"
        figure.add_scatter(name=name, line=line, marker={"symbol": "line-ns-open"}, **where)
        words.append(name)
    predicted = _predictions(names, total, cp_size, model)
    if predicted:
        figure.add_scatter(
            name="the model's prediction",
            x=list(predicted.values()),
            y=list(predicted),
            mode="markers",
            marker={"symbol": "diamond-open", "size": 12, "color": style.rank_color(1)},
        )
        words += [f"predicted {name} {gbps:.2f} GB/s" for name, gbps in predicted.items()]
    else:
        words.append("no cost model is fitted for these workers (panel.model)")
    figure.update_layout(
        xaxis=style.axis("algbw (GB/s): gathered bytes per second", rangemode="tozero"),
        yaxis=style.names_axis(categoryorder="array", categoryarray=names),
        margin_l=130,
    )
    kind = "memory alone" if newest.clock == DEVICE_TIME else "one barrier and memory alone"
    bound_words = f"floor: {kind}" if isinstance(floor, float) else f"floor: {floor or 'not yet'}"
    return style.finish(
        figure,
        title=f"Bandwidth: {byte_words(total)} ({total:,} bytes) gathered, {newest.clock}",
        subtitle=f"{bound_words}; {words[-1] if not predicted else 'with the panel’s cost model'}",
        alt="; ".join(words) + ".",
        height=220 + 60 * len(names),
    )


def _predictions(
    names: Sequence[str], total_bytes: int, cp_size: int, model: Model | None
) -> Mapping[str, float]:
    found: dict[str, float] = {}
    for name in names:
        if model is None:
            break
        try:
            found[name] = algbw_gbps(total_bytes, model.predict_us(name, total_bytes, cp_size))
        except KeyError:  # this algorithm was not fitted
            continue
    return found


def pool(stats: pd.DataFrame | None) -> go.Figure:
    """Draw what `lab.pool.stats` says: memory per rank, its peak and the spilled segments."""
    figure = go.Figure()
    figure.update_layout(
        barmode="overlay",
        xaxis=style.axis("memory (MB)", rangemode="tozero"),
        yaxis=style.names_axis(),
    )
    if stats is None:
        words = "not read yet: the pool is read while the panel measures"
        return style.finish(figure, title="Symmetric pool", subtitle=words, alt=words, height=300)
    ranks = [f"rank {rank}" for rank in stats["rank"]]
    held = stats["arena_bytes"] + stats["spill_bytes"]
    outline: dict[str, object] = {
        "color": "rgba(0, 0, 0, 0)",
        "line": {"color": _GREY, "width": 1.5},
    }
    for name, values, look in (
        ("arena and spilled segments", held, outline),
        ("used now", stats["used_bytes"], {"color": _GREY}),
    ):
        figure.add_bar(name=name, orientation="h", y=ranks, x=_mb(values), marker=look)
    marker: dict[str, Any] = {"symbol": "line-ns-open", "size": 26, "color": style.INK}
    marker["line"] = {"color": style.INK, "width": 3}
    peak = _mb(stats["peak_bytes"])
    figure.add_scatter(name="peak", y=ranks, x=peak, mode="markers", marker=marker)
    most = stats[["used_bytes", "peak_bytes", "arena_bytes"]].max()
    spills = int(stats["spills"].max())
    title = (
        f"Symmetric pool: {byte_words(most['used_bytes'])} used, peak "
        f"{byte_words(most['peak_bytes'])}, of an arena of {byte_words(most['arena_bytes'])}"
    )
    spilled = f"{spills} spills ({stats['spill_ms'].max():,.0f} ms of registering)"
    said = spilled if spills else "no spill: every allocation fitted the arena"
    return style.finish(
        figure, title=title, subtitle=said, alt=f"{title}; {said}.", height=200 + 44 * len(ranks)
    )


def _mb(values: pd.Series) -> list[float]:
    return [round(float(value), 3) for value in np.asarray(values) / 1e6]
