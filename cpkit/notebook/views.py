"""The explorer's other views: who owns which token, bandwidth and its bounds, the pool, sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from cpkit.control.messages import ClockResult
from cpkit.notebook import style
from cpkit.notebook.intervals import Summary
from cpkit.notebook.style import byte_words
from cpkit.timing import DEVICE_TIME, algbw_gbps

if TYPE_CHECKING:
    import pandas as pd

    from cpkit.layout import ContextParallelMetadata

SWEEPS = ("sizes", "cp sizes")  # from the present setting
VIEWS = ("times", "tokens", "bandwidth", "pool", *SWEEPS)
SWEEP_FACTORS = (0.0625, 0.25, 1, 4)  # of each length
_GREY = "#8f9ba8"


class Model(Protocol):
    """What predicts the time of a gather, such as `cpkit.cost.HostModel`."""

    def predict_us(self, algorithm: str, total_bytes: int, cp_size: int, /) -> float:
        """Return the time in µs. Raises KeyError for an unknown algorithm."""


@lru_cache(maxsize=1)  # drawn again for each interval
def tokens(metadata: ContextParallelMetadata) -> style.PlainFigure:
    """Draw each slot of a small batch, and the fractions of padding of a larger one."""
    from cpkit.notebook.grids import MAX_LABELLED, padding_grid  # imports plotly

    if metadata.max_rank_len[0] <= MAX_LABELLED:
        return style.plain(padding_grid(metadata))
    length = metadata.max_rank_len[0]
    rows = metadata.per_rank_actual_token
    by_rank = [(length - count) / length for count in rows]
    by_sequence = [_padding_alone(n, metadata) for n in metadata.lengths]
    total = sum(by_rank) / metadata.cp_size
    ranks = [f"rank {rank}" for rank in range(metadata.cp_size)]
    named = [f"sequence {i}, {n} tokens" for i, n in enumerate(metadata.lengths)]
    bar = {
        "type": "bar",
        "hovertemplate": "%{customdata}: %{y:.2%} of its slots is padding<extra></extra>",
        "marker": {"color": style.PADDING, "pattern": style.hatch(), "line": {"color": _GREY}},
        "showlegend": False,
    }
    places = list(range(len(named)))
    data = [
        bar | {"x": ranks, "y": by_rank, "customdata": ranks},
        bar | {"x": places, "y": by_sequence, "customdata": named, "xaxis": "x2", "yaxis": "y2"},
    ]
    per_rank, alone = "Per rank, in this batch", "Per sequence, if it were gathered alone"
    y = style.axis("padding", tickformat=".2~%", rangemode="tozero")
    plots = [
        style.Plot((0, 1), (0.65, 1), per_rank, {}, y),
        style.Plot((0, 1), (0, 0.35), alone, style.axis("sequence"), y),
    ]
    layout = style.several_plots(plots)
    layout["margin"] = {"l": 60, "r": 16, "t": 100, "b": 60}
    words = f"{total:.2%} of {length * metadata.cp_size:,} slots is padding"
    return style.finish(
        {"data": data, "layout": layout | {"uirevision": "padding"}},
        title=f"Padded to one length: {words}",
        subtitle=f"{metadata.strategy}, {len(named)} sequences, {metadata.total_tokens:,} tokens, "
        f"max_rank_len {length:,} rows",
        alt=f"{words}. Rows per rank: {', '.join(map(str, rows))}. Alone, the sequences would have "
        f"{min(by_sequence):.2%} to {max(by_sequence):.2%} padding.",
        height=560,
    )


def _padding_alone(tokens: int, metadata: ContextParallelMetadata) -> float:
    from cpkit.layout import prepare_context_parallel_metadata  # imports torch

    alone = prepare_context_parallel_metadata((tokens,), metadata.cp_size, metadata.strategy)
    return 1 - tokens / sum(alone.max_rank_len)


def floor_us(probe: ClockResult, barrier_us: float | None = None) -> float:
    """Return the least time of a gather, from `Lab.clock(["barrier", "copy"])` of its bytes.

    A gather synchronizes once, reads every byte once and writes it once per rank. When all ranks
    copy the bytes, 2·cp·S bytes move; a gather moves at least (cp+1)·S. The quickest samples count.
    `barrier_us` is used instead of the probe's barrier. Device times have no barrier.
    """
    least = (probe.cp_size + 1) / (2 * probe.cp_size)
    on_device = probe.device_us("copy")
    if on_device.size:
        return float(least * on_device.max(axis=1).min())
    meet_us, copy_us = (probe.slowest_us(call).min() for call in ("barrier", "copy"))
    return float((meet_us if barrier_us is None else barrier_us) + least * copy_us)


def bandwidth(
    summaries: Sequence[Summary], floor: float | str | None, model: Model | None
) -> style.PlainFigure:
    """Draw algbw per algorithm, its bound, and what the model predicts. `floor` is µs or a text."""
    newest = summaries[0].newest
    total, cp_size = newest.total_bytes, newest.cp_size
    names = [summary.algorithm for summary in summaries]
    achieved = [algbw_gbps(total, summary.median_us) for summary in summaries]
    bars: dict[str, Any] = {
        "type": "bar",
        "name": "achieved (median)",
        "orientation": "h",
        "y": names,
        "x": achieved,
        "text": [f"{gbps:.2f}" for gbps in achieved],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": _GREY},
    }
    data = [bars]
    words = [f"{name} {gbps:.2f} GB/s" for name, gbps in zip(names, achieved, strict=True)]
    if isinstance(floor, float):
        bound = algbw_gbps(total, floor)
        line = {"color": style.INK, "dash": "dash", "width": 1.5}
        where = {"x": [bound] * len(names), "y": names, "mode": "lines+markers"}
        name = f"at most {bound:.2f} GB/s (floor {floor:,.0f} µs)"
        look = {"line": line, "marker": {"symbol": "line-ns-open"}}
        data.append({"type": "scatter", "name": name, **where, **look})
        words.append(name)
    predicted = _predictions(names, total, cp_size, model)
    if predicted:
        marker = {"symbol": "diamond-open", "size": 12, "color": style.rank_color(1)}
        where = {"x": list(predicted.values()), "y": list(predicted), "mode": "markers"}
        name = "the model's prediction"
        data.append({"type": "scatter", "name": name, **where, "marker": marker})
        words += [f"predicted {name} {gbps:.2f} GB/s" for name, gbps in predicted.items()]
    else:
        words.append("no cost model is fitted for these workers (panel.model)")
    layout = {
        "xaxis": style.axis("algbw (GB/s): gathered bytes per second", rangemode="tozero"),
        "yaxis": style.names_axis(categoryorder="array", categoryarray=names),
        "margin": {"l": 130, "r": 16, "t": 66, "b": 84},
    }
    kind = "memory alone" if newest.clock == DEVICE_TIME else "one barrier and memory alone"
    bound_words = f"floor: {kind if isinstance(floor, float) else floor or 'not yet'}"
    return style.finish(
        {"data": data, "layout": layout},
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


def pool(stats: pd.DataFrame | None) -> style.PlainFigure:
    """Draw what `lab.pool.stats` says: memory per rank, its peak and the spilled segments."""
    layout: dict[str, Any] = {
        "barmode": "overlay",
        "xaxis": style.axis("memory (MB)", rangemode="tozero"),
        "yaxis": style.names_axis(),
    }
    figure: style.PlainFigure = {"data": [], "layout": layout}
    if stats is None:
        words = "not read yet: the pool is read while the panel measures"
        return style.finish(figure, title="Symmetric pool", subtitle=words, alt=words, height=300)
    ranks = [f"rank {rank}" for rank in stats["rank"]]
    held = stats["arena_bytes"] + stats["spill_bytes"]
    outline = {"color": "rgba(0, 0, 0, 0)", "line": {"color": _GREY, "width": 1.5}}
    peak = {"symbol": "line-ns-open", "size": 26, "color": style.INK}
    peak["line"] = {"color": style.INK, "width": 3}
    bar = {"type": "bar", "orientation": "h"}
    for name, values, kind, look in (
        ("arena and spilled segments", held, bar, outline),
        ("used now", stats["used_bytes"], bar, {"color": _GREY}),
        ("peak", stats["peak_bytes"], {"type": "scatter", "mode": "markers"}, peak),
    ):
        megabytes = [round(value, 3) for value in (values / 1e6).tolist()]
        figure["data"].append({**kind, "name": name, "y": ranks, "x": megabytes, "marker": look})
    most = stats[["used_bytes", "peak_bytes", "arena_bytes"]].max()
    spills = int(stats["spills"].max())
    title = (
        f"Symmetric pool: {byte_words(most['used_bytes'])} used, peak "
        f"{byte_words(most['peak_bytes'])}, of an arena of {byte_words(most['arena_bytes'])}"
    )
    spilled = (
        f"{spills} spill{'s' * (spills != 1)} ({stats['spill_ms'].max():,.0f} ms of registering)"
    )
    said = spilled if spills else "no spill: every allocation fitted the arena"
    return style.finish(
        figure, title=title, subtitle=said, alt=f"{title}; {said}.", height=200 + 44 * len(ranks)
    )


def sweep_lengths(lengths: Sequence[int], cp_size: int) -> list[list[int]]:
    """Return the batch at each of `SWEEP_FACTORS`, each sequence with at least 2·cp tokens."""
    return [
        [max(2 * cp_size, round(length * factor)) for length in lengths] for factor in SWEEP_FACTORS
    ]


def sweep(table: pd.DataFrame | str | None, view: str) -> style.PlainFigure:
    """Draw a table of `lab.sweep`: time against bytes or cp_size. A text says why there is none."""
    if view == "sizes":
        title = "The batch at 1/16, 1/4, 1 and 4 times its lengths (at least 2·cp_size each)"
        column, x = "size_bytes", style.axis("gathered bytes", type="log")
    else:
        title, column = "The same batch in each cp_size of these workers", "cp_size"
        x = style.axis("cp_size", type="category")
    figure: style.PlainFigure = {"data": [], "layout": {"xaxis": x}}
    if table is None or isinstance(table, str):
        reason = table or "measured once per setting, in some seconds, while the panel runs"
        figure["layout"] = {axis: {"visible": False} for axis in ("xaxis", "yaxis")}
        return style.finish(figure, title=title, subtitle=reason, alt=reason, height=300)
    figure["layout"]["yaxis"] = style.axis("time (µs)", type="log", dtick="D2")
    if view == "sizes":
        sizes = sorted(set(table[column].tolist()))
        x |= {"tickvals": sizes, "ticktext": [byte_words(size) for size in sizes]}
    said = []
    for algorithm, rows in table.groupby("algorithm", sort=False):
        color, dash, symbol = style.algorithm_line(str(algorithm))
        places = rows[column].tolist()
        times_us = [round(us, 1) for us in rows["time_us"].tolist()]
        line = {"type": "scatter", "mode": "lines+markers", "name": algorithm}
        look = {"line": {"color": color, "dash": dash}, "marker": {"symbol": symbol, "size": 8}}
        figure["data"].append({**line, **look, "x": places, "y": times_us})
        times = [f"{place:,}: {us:,.0f} µs" for place, us in zip(places, times_us, strict=True)]
        said.append(f"{algorithm} {'; '.join(times)}")
    first = table.iloc[0]
    return style.finish(
        figure,
        title=title,
        subtitle=f"{first['clock']}, median of {first['iterations']} gathers each",
        alt=f"{'. '.join(said)}.",
        height=480,
    )
