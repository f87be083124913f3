"""Draw measured times: stages and timelines, and the axes of sizes and times.

Each figure draws all values of a result of `Lab`, without smoothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from cpkit.control.messages import Sample
from cpkit.notebook import style
from cpkit.notebook.style import byte_words

if TYPE_CHECKING:
    import pandas as pd


def stage_split(samples: Sequence[Sample]) -> go.Figure:
    """Draw the stages of each sample, averaged over the ranks, as one stacked bar per sample."""
    figure = go.Figure()
    splits = [(s.workload.algorithm, _mean_stages(s)) for s in samples]
    for stage in _ordered({stage for _, split in splits for stage in split}):
        figure.add_trace(_stage_bar(stage, splits))
    figure.update_layout(
        barmode="stack",
        xaxis=style.axis("time (µs, mean over ranks)"),
        yaxis=style.names_axis(),
    )
    words = "; ".join(
        f"{name}: " + ", ".join(f"{stage} {us:.0f} µs" for stage, us in split.items())
        for name, split in splits
    )
    return style.finish(
        figure,
        title="Where the time goes",
        subtitle=f"cp_size {samples[0].workload.cp_size}; stages of one gather",
        alt=words + ".",
        height=170 + 50 * len(splits),
    )


def timeline(table: pd.DataFrame, label: str) -> go.Figure:
    """Draw all stages of all ranks on one time axis; `table` is `lab.trace(...).table`."""
    figure = go.Figure()
    for stage in _ordered(set(table["stage"])):
        figure.add_trace(_timeline_bars(stage, table[table["stage"] == stage]))
    ranks = sorted(int(rank) for rank in table["rank"].unique())
    figure.update_layout(
        barmode="overlay",
        xaxis=style.axis("time since the first rank entered (µs)", rangemode="tozero"),
        yaxis=style.names_axis(showgrid=False),
    )
    chips = [f'<span style="color: {style.rank_color(r)}">■</span> rank {r}' for r in ranks]
    figure.update_yaxes(tickvals=ranks, ticktext=chips)
    ends = table.groupby("rank")["stop_us"].max()
    words = f"Stages {', '.join(_ordered(set(table['stage'])))}. "
    words += ", ".join(f"rank {rank} ends at {ends[rank]:.0f} µs" for rank in ranks)
    return style.finish(
        figure,
        title=f"{label}: one gather, rank by rank",
        subtitle="all ranks read the same clock",
        alt=words + ".",
        height=170 + 40 * len(ranks),
    )


def size_axis(sizes_bytes: Sequence[int], **options: object) -> dict[str, Any]:
    """Return a logarithmic axis of sizes, with a tick per size."""
    words = [byte_words(size) for size in sizes_bytes]
    ticks = {"tickvals": list(sizes_bytes), "ticktext": words}
    return style.axis("size: all gathered bytes", type="log", **ticks, **options)


def time_axis() -> dict[str, Any]:
    """Return a logarithmic axis of the slowest rank's time."""
    return style.axis("time (µs, slowest rank)", type="log", dtick=1)


def _mean_stages(sample: Sample) -> dict[str, float]:
    means = {stage: float(np.mean(times)) for stage, times in sample.stage_us.items()}
    return {stage: means[stage] for stage in _ordered(set(means))}


def _ordered(stages: set[str]) -> list[str]:
    known = [stage for stage in style.STAGE_STYLES if stage in stages]
    return known + sorted(stages - set(known))


def _stage_bar(stage: str, splits: Sequence[tuple[str, dict[str, float]]]) -> dict[str, Any]:
    values = [split.get(stage, 0.0) for _, split in splits]
    meaning = style.STAGE_MEANINGS.get(stage, "")
    return style.stage_bar(
        stage,
        y=[name for name, _ in splits],
        x=values,
        text=[f"{stage} {value:,.0f}" if value else "" for value in values],
        textangle=0,
        hovertemplate=f"{stage}: %{{x:.1f}} µs<br>{meaning}<extra></extra>",
    )


def _timeline_bars(stage: str, rows: pd.DataFrame) -> dict[str, Any]:
    return style.stage_bar(
        stage,
        y=rows["rank"].tolist(),
        x=(rows["stop_us"] - rows["start_us"]).tolist(),
        base=rows["start_us"].tolist(),
        text=[stage] * len(rows),
        textangle=0,
        hovertemplate=f"rank %{{y}}, {stage}: %{{x:.1f}} µs from %{{base:.1f}} µs<extra></extra>",
    )
