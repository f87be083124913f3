"""Figures of counted costs: keys that a rank attends to, bytes that a gather writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from cpkit.layout import ContextParallelMetadata
from cpkit.notebook import style

STAGES = ("pad", "wire", "strip", "reorder")


def work_bars(work: Mapping[str, Sequence[int]]) -> go.Figure:
    """Draw the keys that each rank attends to, one group of bars per strategy; dotted: the mean."""
    figure = go.Figure()
    strategies = list(work)
    for rank in range(len(work[strategies[0]])):
        values = [work[name][rank] for name in strategies]
        figure.add_trace(_bar(f"rank {rank}", strategies, values, style.rank_color(rank)))
    mean = sum(work[strategies[0]]) / len(work[strategies[0]])
    figure.add_hline(y=mean, line={"dash": "dot", "color": style.INK}, annotation_text="mean")
    _lay_out(figure, "keys attended to", "strategy", barmode="group")
    words = "; ".join(f"{name}: {', '.join(map(str, work[name]))}" for name in strategies)
    return style.finish(
        figure,
        title="Keys that each rank attends to",
        subtitle="causal attention: token t attends to t + 1 keys; the slowest rank sets the time",
        alt=f"Keys by rank, from rank 0 up. {words}. The mean is {mean:.0f}.",
        height=360,
    )


def bill(layout: ContextParallelMetadata, row_bytes: int) -> dict[str, int]:
    """Return the bytes that a rank writes per stage of the padded gather, if it has to pad.

    `row_bytes`: one token in all gathered tensors. `direct` writes the bytes of `strip` only.
    """
    longest, total = layout.max_rank_len[0], layout.total_tokens
    pads = any(rows < longest for rows in layout.per_rank_actual_token)
    slots = layout.cp_size * longest
    counts = (longest if pads else 0, slots, total, total)
    return {stage: count * row_bytes for stage, count in zip(STAGES, counts, strict=True)}


def byte_bars(layout: ContextParallelMetadata, models: Mapping[str, int]) -> go.Figure:
    """Draw the bytes that one layer's gather writes per rank: padded by stage, direct in one bar.

    `models`: name to bytes of one token's K and V in one layer.
    """
    bills = {name: bill(layout, row_bytes) for name, row_bytes in models.items()}
    figure = go.Figure()
    rows = [f"{name}, {kind}" for name in models for kind in ("padded", "direct")]
    for stage in STAGES:
        padded = {f"{name}, padded": sizes[stage] for name, sizes in bills.items()}
        direct = {f"{name}, direct": sizes["strip"] for name, sizes in bills.items()}
        shown = padded | (direct if stage == "wire" else {})
        megabytes = [shown.get(row, 0) / 1e6 for row in rows]
        figure.add_trace(
            style.stage_bar(
                stage,
                y=rows,
                x=megabytes,
                text=[f"{stage} {value:,.1f}" if value else "" for value in megabytes],
                hovertemplate=f"{stage}: %{{x:,.1f}} MB<extra></extra>",
            )
        )
    _lay_out(figure, "", "bytes written on each rank (MB, one layer)", barmode="stack")
    figure.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=rows)
    words = "; ".join(
        f"{name}: padded {sum(sizes.values()) / 1e6:.1f} MB, direct {sizes['strip'] / 1e6:.1f} MB"
        for name, sizes in bills.items()
    )
    return style.finish(
        figure,
        title="Bytes written by the gather of one layer",
        subtitle=f"{layout.strategy}, cp_size {layout.cp_size}, {layout.total_tokens} tokens; "
        "on a rank that pads; bytes are counted, not timed",
        alt=words + ".",
        height=170 + 34 * len(rows),
    )


def _bar(name: str, x: Sequence[str], y: Sequence[float], color: str) -> go.Bar:
    text = [f"{value:,}" for value in y]
    return go.Bar(
        name=name,
        x=list(x),
        y=list(y),
        text=text,
        textposition="inside",
        insidetextanchor="start",
        textfont={"color": style.text_color(color)},
        marker={"color": color},
        hovertemplate=f"{name}, %{{x}}: %{{y:,}} keys<extra></extra>",
    )


def _lay_out(figure: go.Figure, y: str, x: str, *, barmode: str) -> None:
    figure.update_layout(
        barmode=barmode,
        xaxis=style.axis(x),
        yaxis=style.axis(y, ticks=""),
    )
