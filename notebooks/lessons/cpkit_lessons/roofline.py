"""Figures of models: the speed of light, predicted and measured times, modelled machines.

Computed values are outlines or thin lines; measured values are filled shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from cpkit.notebook import style
from cpkit.notebook.style import byte_words
from cpkit_lessons.charts import size_axis, time_axis

Curve = Mapping[int, float]  # bytes to µs
_MEASURED, _OUTLINE = "#8f9ba8", "#24292f"
_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "square", "diamond", "x")


def roof(
    light: Curve, table: pd.DataFrame | None = None, fit: tuple[str, float, float] | None = None
) -> go.Figure:
    """Draw the speed of light over size, optionally with measured times and a fit.

    `table`: the result of `lab.sweep`; `fit`: (algorithm, alpha in µs, beta in µs per byte).
    """
    figure = go.Figure()
    sizes = sorted(light)
    _add_light(figure, sizes, [light[size] for size in sizes])
    words = [f"The hardware needs {light[s]:,.0f} µs for {byte_words(s)}" for s in sizes[-1:]]
    if table is not None:
        words += _add_sweep(figure, table, light)
    if fit is not None:
        words.append(_add_fit(figure, sizes, *fit))
    ends = [math.log10(sizes[0] / 1.3), math.log10(sizes[-1] * 1.3)]  # both end ticks are drawn
    figure.update_layout(
        xaxis=size_axis(sizes, range=ends),
        yaxis=time_axis(),
    )
    return style.finish(
        figure,
        title="Speed of light"
        + (" and measured times" if table is not None else "")
        + (", with a modelled line" if fit is not None else ""),
        subtitle="each byte read once and written once per rank, on a CPU after a barrier; "
        "grey: below the bound",
        alt=". ".join(words) + ".",
        height=460,
    )


def steps(predicted: Mapping[str, float], measured: Mapping[str, float]) -> go.Figure:
    """Draw the predicted and measured time of each algorithm, in the order of `measured`."""
    names = list(measured)
    figure = go.Figure()
    outline = {"color": style.PAPER, "line": {"color": _OUTLINE, "width": 1.5}}
    for name, values, marker in (
        ("predicted", predicted, outline),
        ("measured", measured, {"color": _MEASURED}),
    ):
        figure.add_bar(
            name=name,
            orientation="h",
            y=names,
            x=[values[key] for key in names],
            text=[f"{name} {values[key]:,.0f}" for key in names],
            marker=marker,
            hovertemplate=f"%{{y}}, {name}: %{{x:,.0f}} µs<extra></extra>",
        )
    figure.update_layout(
        xaxis=style.axis("time (µs, slowest rank)", rangemode="tozero"),
        yaxis=style.names_axis(),
    )
    words = "; ".join(
        f"{name}: predicted {predicted[name]:,.0f} µs, measured {measured[name]:,.0f} µs"
        for name in names
    )
    return style.finish(
        figure,
        title="Passes removed: predicted and measured",
        subtitle="predicted: two barriers, and each pass over the bytes, measured on its own",
        alt=words + ".",
        height=160 + 64 * len(names),
    )


def gain(sizes_bytes: Sequence[int], ratios: Sequence[float]) -> go.Figure:
    """Draw a speedup by size, which shows where the gain ends."""
    figure = go.Figure()
    figure.add_scatter(
        name="gain",
        mode="lines+markers+text",
        x=list(sizes_bytes),
        y=ratios,
        text=[f"{ratio:.2f} ×" for ratio in ratios],
        textposition="top center",
        line={"color": style.INK},
        marker={"size": 9, "color": style.INK},
        hovertemplate="%{x:,} B: %{y:.2f} ×<extra></extra>",
    )
    figure.add_hline(y=1, line={"color": _MEASURED, "dash": "dot"})
    figure.update_layout(
        showlegend=False,
        xaxis=size_axis(sizes_bytes),
        yaxis=style.axis("time ratio, ring / symmetric", range=[0.9, max(ratios) * 1.12]),
    )
    pairs = zip(sizes_bytes, ratios, strict=True)
    words = ", ".join(f"{ratio:.2f} × at {byte_words(size)}" for size, ratio in pairs)
    return style.finish(
        figure, title="Speedup from symmetric memory", alt=f"Gain: {words}.", height=360
    )


def scale_out(table: pd.DataFrame) -> go.Figure:
    """Draw modelled times over cp_size, one line per machine and size.

    `table` has the columns machine, size_bytes, cp_size, time_us.
    """
    figure = go.Figure()
    machines, widest = list(table["machine"].unique()), table["cp_size"].max()
    lines = table.groupby(["machine", "size_bytes"], sort=False)
    for (machine, _), rows in lines:
        index, size = machines.index(machine), float(rows["size_bytes"].iloc[0])
        figure.add_scatter(
            name=machine,
            legendgroup=machine,
            showlegend=size == float(table["size_bytes"].min()),
            mode="lines+markers+text" if len(rows) > 1 else "markers",
            x=rows["cp_size"].tolist(),
            y=rows["time_us"].tolist(),
            text=[f" {byte_words(size)}" if n == widest else "" for n in rows["cp_size"]],
            textposition="middle right",
            line={"color": style.INK, "dash": _DASHES[index % 4], "width": 1.5},
            marker={"symbol": f"{_SYMBOLS[index % 4]}-open", "size": 9},
            hovertemplate=f"{machine}: cp_size %{{x}}, %{{y:,.0f}} µs<extra></extra>",
        )
    sizes = sorted(int(size) for size in table["cp_size"].unique())
    ticks = {"tickvals": sizes, "ticktext": [str(size) for size in sizes]}
    figure.update_layout(
        xaxis=style.axis("cp_size (ranks)", type="log", range=[0.25, 2.0], **ticks),
        yaxis=style.axis("modelled time (µs)", type="log", dtick=1),
    )
    words = ", ".join(
        f"{machine}: {byte_words(float(rows['size_bytes'].iloc[-1]))} in "
        f"{rows['time_us'].iloc[-1]:,.0f} µs at cp_size {rows['cp_size'].iloc[-1]}"
        for (machine, _), rows in lines
    )
    return style.finish(
        figure,
        title="Modelled: beyond one machine",
        subtitle="computed from published and assumed constants; nothing here was measured",
        alt=f"Modelled, not measured. {words}.",
        height=420,
    )


def _add_light(figure: go.Figure, sizes: Sequence[int], times_us: Sequence[float]) -> None:
    floor = min(times_us) / 3
    figure.add_scatter(
        x=list(sizes), y=[floor] * len(sizes), mode="lines", line={"width": 0}, showlegend=False
    )
    figure.data[-1].hoverinfo = "skip"
    figure.add_scatter(
        name="speed of light",
        x=list(sizes),
        y=list(times_us),
        mode="lines",
        fill="tonexty",
        fillcolor="#eaeef2",
        line={"color": style.INK, "width": 2},
        hovertemplate="speed of light<br>%{x:,} B: %{y:,.1f} µs<extra></extra>",
    )


def _add_sweep(figure: go.Figure, table: pd.DataFrame, light: Curve) -> list[str]:
    words = []
    for algorithm in [name for name in style.ALGORITHM_LINES if name in set(table["algorithm"])]:
        rows = table[table["algorithm"] == algorithm].sort_values("size_bytes")
        color, dash, marker = style.algorithm_line(algorithm)
        figure.add_scatter(
            name=algorithm,
            mode="lines+markers",
            x=rows["size_bytes"].tolist(),
            y=rows["time_us"].tolist(),
            line={"color": color, "dash": dash},
            marker={"color": color, "symbol": marker, "size": 8},
            hovertemplate=f"{algorithm}<br>%{{x:,}} B: %{{y:,.0f}} µs<extra></extra>",
        )
        size, time_us = rows["size_bytes"].iloc[-1], rows["time_us"].iloc[-1]
        words.append(f"{algorithm} takes {time_us / light[int(size)]:.1f} times that")
    return words


def _add_fit(
    figure: go.Figure, sizes: Sequence[int], algorithm: str, alpha_us: float, us_per_byte: float
) -> str:
    line = {"color": style.algorithm_line(algorithm)[0], "width": 1, "dash": "dot"}
    figure.add_scatter(
        name=f"{algorithm}: alpha + beta · bytes",
        mode="lines",
        x=list(sizes),
        y=[alpha_us + us_per_byte * size for size in sizes],
        line=line,
        hovertemplate="fit: %{y:,.0f} µs<extra></extra>",
    )
    return f"The fit of {algorithm}: {alpha_us:,.0f} µs + bytes / {1e-3 / us_per_byte:.2f} GB/s"
