"""Figures of memory: the writer of each slot, the rows in each arena, the fraction of padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from cpkit.layout import can_cp_split, prepare_context_parallel_metadata
from cpkit.notebook import style
from cpkit.notebook.grids import Line, Words, draw_lines
from cpkit_lessons.divergence import Divergence


def who_wrote_where(matrix: npt.NDArray[np.int64], rounds: int) -> go.Figure:
    """Draw the stamps `[reader, slot]` in the memory of each rank; those of other rounds are red.

    A stamp is `writer << 32 | round`.
    """
    size = len(matrix)
    writers, found = matrix >> 32, matrix & 0xFFFF_FFFF
    wrong = found != rounds
    colors = [*(style.rank_color(writer) for writer in range(size)), style.WRONG]
    kinds = np.where(wrong, size, writers)
    steps = [(edge / len(colors), c) for i, c in enumerate(colors) for edge in (i, i + 1)]
    text = [[f"{'✗ ' if value != rounds else ''}{value}" for value in row] for row in found]
    figure = go.Figure(
        go.Heatmap(
            x=[f"rank {writer}" for writer in range(size)],
            y=[f"rank {reader}" for reader in range(size)],
            z=kinds.tolist(),
            zmin=-0.5,
            zmax=size + 0.5,
            colorscale=steps,
            showscale=False,
            text=text,
            texttemplate="%{text}",
            xgap=3,
            ygap=3,
            hovertemplate="memory of %{y}, written by %{x}: round %{text}<extra></extra>",
        )
    )
    figure.update_layout(
        margin_b=56,  # no legend
        xaxis=style.axis("slot, written by", ticks="", showgrid=False),
        yaxis=style.names_axis("memory of"),
    )
    cells = f"{int(wrong.sum())} of {size * size}" if wrong.any() else f"all {size * size}"
    words = f"{cells} cells hold {'a round other than' if wrong.any() else 'round'} {rounds}"
    return style.finish(
        figure,
        title="Writer and round of each slot",
        subtitle=f"a cell shows its round; {words}",
        alt=f"A {size} by {size} matrix of reader and writer: {words}.",
        height=140 + 44 * size,
        width=140 + 110 * size if size > 3 else 520,
    )


def memory_map(found: Divergence) -> go.Figure:
    """Draw the arenas: one line per rank, one cell per row; red: lost or overwritten."""
    lines = []
    for rank, rows in enumerate(found.memory):
        wrong = np.zeros(len(rows), dtype=np.bool_)
        wrong[found.overwritten[rank]] = True
        wrong[found.recv[rank] + found.lost[rank]] = True
        words = Words("block", "row", "never written")
        lines.append(Line(f"rank {rank}, recv at {found.recv[rank]}", rows, wrong, words))
    bad = sum(map(len, found.lost)) + sum(map(len, found.overwritten))
    figure = draw_lines(
        lines,
        title="Different offsets misplace rows" if found.diverged else "Equal offsets",
        subtitle="colour: the rank that wrote the row; red: missing or overwritten; a cell shows "
        "block:row (0: the push)",
        alt=f"{found.explain()}. {bad} rows are wrong.",
        axis_title="row of the rank's arena",
    )
    figure.for_each_trace(lambda trace: trace.update(name="never written"), {"name": "padding"})
    return figure


def waste_map(
    length_sets: Sequence[Sequence[int]], cp_sizes: Sequence[int], strategy: str = "zigzag"
) -> go.Figure:
    """Draw the fraction of padding by batch and cp_size; empty if the batch cannot be split."""
    fractions = [[_waste(lengths, cp, strategy) for cp in cp_sizes] for lengths in length_sets]
    names = [_short(lengths) for lengths in length_sets]
    figure = go.Figure(
        go.Heatmap(
            x=[f"cp {cp}" for cp in cp_sizes],
            y=names,
            z=fractions,
            text=[["no split" if v is None else f"{v:.1%}" for v in row] for row in fractions],
            texttemplate="%{text}",
            colorscale=[(0, "#ffffff"), (1, "#57606a")],
            colorbar={"title": {"text": "padding"}, "tickformat": ".0%"},
            xgap=3,
            ygap=3,
            hoverinfo="text",
        )
    )
    figure.update_layout(
        margin_b=44,  # no legend
        xaxis=style.axis("", type="category", ticks="", showgrid=False),
        yaxis=style.names_axis(type="category", showgrid=False),
    )
    known = [value for row in fractions for value in row if value is not None]
    return style.finish(
        figure,
        title="Fraction of the gathered slots that is padding",
        subtitle=f"{strategy}; each line is a batch: 8 × 17 is eight sequences of 17 tokens",
        alt=f"Padding between {min(known):.1%} and {max(known):.1%} over {len(names)} batches.",
        height=130 + 34 * len(names),
    )


def _waste(lengths: Sequence[int], cp_size: int, strategy: str) -> float | None:
    if cp_size > 1 and not can_cp_split(lengths, cp_size, strategy):
        return None
    metadata = prepare_context_parallel_metadata(lengths, cp_size, strategy)
    slots = sum(metadata.max_rank_len)
    return (slots - metadata.total_tokens) / slots


def _short(lengths: Sequence[int]) -> str:
    if len(lengths) > 1 and len(set(lengths)) == 1:
        return f"{len(lengths)} × {lengths[0]}"
    return ", ".join(str(n) for n in lengths[:6]) + (", …" if len(lengths) > 6 else "")
