"""Read runs of `make bench` that were recorded on other machines, to compare them with yours.

They are the files in benchmarks/results; each contains its machine, date and commit. Figures of
them say "Recorded" in their title.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from cpkit.notebook import style
from cpkit.notebook.style import byte_words
from cpkit_lessons.charts import size_axis, time_axis

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
_COLUMNS = ("variant", "cp_size", "size_bytes", "time_us")


@dataclass(frozen=True)
class Recording:
    """One recorded run: its file, its environment, and its rows.

    `shared` says whether its ranks shared a GPU. `beside` are its gathers beside a matrix product.
    """

    name: str
    environment: Mapping[str, Any]
    table: pd.DataFrame
    shared: bool = False
    beside: pd.DataFrame = field(default_factory=pd.DataFrame)

    @property
    def is_gpu(self) -> bool:
        """Whether it ran on GPUs."""
        return bool(self.environment.get("device", "cpu") != "cpu")

    @property
    def gpus(self) -> int:
        """The number of GPUs."""
        return len(self.environment.get("gpus", ()))

    @property
    def machine(self) -> str:
        """The name of the GPU, or of the processor with its cores."""
        if self.is_gpu:
            return str(self.environment["device"]) + ", shared by all ranks" * self.shared
        cores = self.environment.get("cores", "an unknown number of")
        return f"{self.environment.get('processor', 'an unknown processor')}, {cores} cores"


def read(folder: Path = RESULTS) -> list[Recording]:
    """Return all recordings of gathers, the newest last; skip files without any."""
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        rows = content.get("gather", []) if isinstance(content, dict) else []
        complete = [row for row in rows if all(column in row for column in _COLUMNS)]
        if complete and isinstance(content.get("environment"), dict):
            table, shared = pd.DataFrame(complete), bool(content.get("sharing"))
            beside = pd.DataFrame(content.get("beside", []))
            found.append(Recording(path.name, content["environment"], table, shared, beside))
    return found


def describe(found: list[Recording]) -> str:
    """Return one line per recording, and a line if a GPU run is missing."""
    lines = [
        f"{each.name}: {each.machine}, {each.environment.get('date', 'no date')}, commit "
        f"{each.environment.get('commit', 'unknown')}, cp_size "
        f"{', '.join(map(str, sorted(each.table['cp_size'].unique())))}"
        for each in found
    ]
    if not any(each.is_gpu for each in found):
        lines.append(
            "missing: a run on GPUs; to record one in benchmarks/results, run `make bench-gpu` on "
            "a machine with GPUs"
        )
    return "\n".join(lines)


def newest(found: list[Recording], cp_size: int) -> list[Recording]:
    """Return the newest recording with this cp_size on CPUs, and one on GPUs.

    As many GPUs as ranks come first, then the most GPUs, then the newest.
    """
    fitting = [each for each in found if cp_size in set(each.table["cp_size"])]
    fitting.sort(key=lambda each: (each.gpus == cp_size, each.gpus))
    kinds = {each.is_gpu: each for each in fitting}  # the last one of each kind remains
    return [kinds[kind] for kind in sorted(kinds)]


def beside(table: pd.DataFrame, recording: Recording, cp_size: int) -> go.Figure:
    """Draw your sweep and a recorded run over size; filled marks are yours, open ones recorded.

    Raises ValueError if the recording has no rows of this cp_size.
    """
    rows = recording.table[recording.table["cp_size"] == cp_size]
    if rows.empty:
        raise ValueError(
            f"{recording.name} has no cp_size {cp_size}; it has "
            f"{sorted(set(recording.table['cp_size'].tolist()))}"
        )
    mine = table[table["cp_size"] == cp_size].rename(columns={"algorithm": "variant"})
    figure = go.Figure()
    for algorithm in style.ALGORITHM_LINES:
        _add_line(figure, algorithm, mine, "yours", open_marks=False)
        _add_line(figure, algorithm, rows, "recorded", open_marks=True)
    _add_floor(figure, rows, "copies to all peers" if recording.gpus > 1 else "floor")
    sizes = _apart(sorted({*mine["size_bytes"], *rows["size_bytes"]}))
    figure.update_layout(
        xaxis=size_axis(sizes, tickangle=30),
        yaxis=time_axis(),
    )
    largest = rows[rows["size_bytes"] == rows["size_bytes"].max()]
    words = ", ".join(f"{row.variant} {row.time_us:,.0f} µs" for row in largest.itertuples())
    style.finish(
        figure,
        title=f"times with cp_size {cp_size}, beside yours",
        alt=f"Recorded at {byte_words(float(rows['size_bytes'].max()))}: {words}.",
        height=500,
    )
    date = str(recording.environment.get("date", "")) or "no date"
    return style.recorded(
        figure,
        machine=recording.machine,
        date=date,
        source=recording.name,
        note="drawn with open marks; filled marks are yours",
    )


def _apart(sizes: list[int]) -> list[int]:
    """Return those ascending sizes whose labels do not overlap on a log axis."""
    kept: list[int] = []
    for size in sizes:
        if not kept or size > 1.6 * kept[-1]:
            kept.append(size)
    return kept


def _add_floor(figure: go.Figure, rows: pd.DataFrame, name: str) -> None:
    """Add what the times are compared with, if it was recorded.

    With a GPU per rank it is no bound: on four GPUs, one kernel is faster than copies to all peers.
    """
    if "floor_us" not in rows or rows["floor_us"].isna().all():
        return
    floors = rows.groupby("size_bytes")["floor_us"].first()
    figure.add_scatter(
        name=f"{name}, recorded",
        mode="lines",
        x=floors.index.tolist(),
        y=floors.tolist(),
        line={"color": style.INK, "width": 1},
        hovertemplate=f"{name}, recorded<br>%{{x:,}} B: %{{y:,.0f}} µs<extra></extra>",
    )


def _add_line(
    figure: go.Figure, algorithm: str, rows: pd.DataFrame, whose: str, *, open_marks: bool
) -> None:
    chosen = rows[rows["variant"] == algorithm].sort_values("size_bytes")
    if chosen.empty:
        return
    color, dash, marker = style.algorithm_line(algorithm)
    figure.add_scatter(
        name=f"{algorithm}, {whose}",
        mode="lines+markers",
        x=chosen["size_bytes"].tolist(),
        y=chosen["time_us"].tolist(),
        line={"color": color, "dash": dash, "width": 1 if open_marks else 2},
        marker={"color": color, "symbol": marker + ("-open" if open_marks else ""), "size": 9},
        hovertemplate=f"{algorithm}, {whose}<br>%{{x:,}} B: %{{y:,.0f}} µs<extra></extra>",
    )
