"""The arenas of all ranks side by side: whose rows lie where, and which are wrong."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from cpkit.divergence import Divergence
from cpkit.notebook.grids import Line, draw_lines


def memory_map(found: Divergence) -> go.Figure:
    """One line a rank, one cell a row of its arena; red: lost or overwritten by the push."""
    lines = []
    for rank, rows in enumerate(found.memory):
        wrong = np.zeros(len(rows), dtype=np.bool_)
        wrong[found.overwritten[rank]] = True
        wrong[found.recv[rank] + found.lost[rank]] = True
        lines.append(Line(f"rank {rank}, recv at {found.recv[rank]}", rows, wrong))
    bad = sum(map(len, found.lost)) + sum(map(len, found.overwritten))
    figure = draw_lines(
        lines,
        title="Equal offsets" if not found.diverged else "Rows that land in the wrong place",
        subtitle="colour: who wrote the row; a cell shows block:row, block 0 is the gather; "
        "hatched: never written",
        alt=f"{found.explain()}. {bad} rows are wrong.",
        axis_title="row of the rank's arena",
    )
    figure.for_each_trace(lambda trace: trace.update(name="never written"), {"name": "padding"})
    return figure
