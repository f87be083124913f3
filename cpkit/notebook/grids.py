"""Draw arrays: which rank owns which token, where the padding is, what each stage contains.

A cell is a slot of a real array, or a run of slots of one rank. Each slot is a row of decoded
provenance, `(round, rank, sequence, token)`; all four are -1 where no rank wrote a token. The
round is -1 where the rows come from a layout instead of a gather.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from cpkit.control.results import GatherResult
from cpkit.layout import ContextParallelMetadata
from cpkit.notebook import style

Ints = npt.NDArray[np.int64]
RANK = 1  # column of the decoded provenance
MAX_LEVEL = 32  # up to this many slots per line, labels are horizontal; beyond, they do not fit
MAX_LABELLED = 72  # up to this many slots per line, each slot has its own cell and label


class Words(NamedTuple):
    """What a hover text calls the last two columns of a slot, and a slot that no rank wrote."""

    group: str
    item: str
    empty: str


_IN_A_GATHER = Words("sequence", "token", "padding: no token")


@dataclass(frozen=True)
class Line:
    """One line of cells. `wrong` marks slots with wrong contents."""

    label: str
    slots: Ints  # [slots, 4]
    wrong: npt.NDArray[np.bool_] | None = None
    words: Words = _IN_A_GATHER


@dataclass(frozen=True)
class Cell:
    """Adjacent slots that are drawn as one bar."""

    first: int
    count: int
    rank: int  # -1: padding
    wrong: bool
    text: str
    hover: str


def rows_of(metadata: ContextParallelMetadata, rank: int) -> Ints:
    """Return the rows that `rank` holds, as provenance without a round: int64 `[rows, 4]`."""
    return _describe(metadata, metadata.rank_rows(rank).numpy())


def token_line(metadata: ContextParallelMetadata) -> Ints:
    """Return all tokens in order, as provenance without a round: int64 `[total_tokens, 4]`."""
    return _describe(metadata, np.arange(metadata.total_tokens))


def pad_rows(slots: Ints, length: int) -> Ints:
    """Append slots without a token, up to `length` slots: int64 `[length, 4]`."""
    padding = np.full((length - len(slots), 4), -1, dtype=np.int64)
    return np.concatenate([slots, padding])


def ownership_strip(
    metadatas: ContextParallelMetadata | Sequence[ContextParallelMetadata],
) -> go.Figure:
    """Draw which rank owns each token: one line per layout, in token order, coloured by rank."""
    layouts = [metadatas] if isinstance(metadatas, ContextParallelMetadata) else list(metadatas)
    lines = [Line(f"{m.strategy}, cp_size {m.cp_size}", token_line(m)) for m in layouts]
    first = layouts[0]
    words = "; ".join(
        f"{m.strategy}: " + ", ".join(f"rank {r} owns {n}" for r, n in _counts(m)) for m in layouts
    )
    return draw_lines(
        lines,
        title="Which rank owns which token",
        subtitle=f"lengths {list(first.lengths)} tokens{_label_words(first, first.total_tokens)}",
        alt=f"Tokens 0 to {first.total_tokens - 1} in token order. {words} tokens.",
        axis_title="token (index in the flattened batch)",
    )


def padding_grid(metadata: ContextParallelMetadata) -> go.Figure:
    """Draw the gathered buffer before the padding is stripped: one line per rank."""
    length = metadata.max_rank_len[0]
    lines = [
        Line(f"rank {rank}: {rows} rows", pad_rows(rows_of(metadata, rank), length))
        for rank, rows in _counts(metadata)
    ]
    slots = length * metadata.cp_size
    waste = slots - metadata.total_tokens
    words = f"{waste} of {slots} slots are padding ({waste / slots:.1%})"
    return draw_lines(
        lines,
        title=f"Padded to one length: {words}",
        subtitle=f"{metadata.strategy}, lengths {list(metadata.lengths)} tokens, "
        f"max_rank_len {length} rows{_label_words(metadata, length)}",
        alt=f"{metadata.cp_size} ranks with {list(metadata.per_rank_actual_token)} rows, "
        f"each padded to {length} rows: {words}.",
        axis_title="slot (row of the rank's buffer)",
    )


def stage_grid(
    gathered: GatherResult, stages: Iterable[str] | None = None, rank: int = 0
) -> go.Figure:
    """Draw the rows of a real gather after each stage; from `wire` on, those on `rank`."""
    wanted = list(stages if stages is not None else dict.fromkeys(["shard", *gathered.stages]))
    lines = [line for name in wanted for line in _stage_lines(gathered, name, rank)]
    metadata = gathered.metadata
    longest = max(len(line.slots) for line in lines)
    words = ". ".join(f"{line.label}: {in_words(line.slots)}" for line in lines)
    return draw_lines(
        lines,
        title="Stage by stage: " + " → ".join(wanted),
        subtitle=f"{metadata.strategy}, cp_size {metadata.cp_size}, lengths "
        f"{list(metadata.lengths)} tokens{_label_words(metadata, longest)}",
        alt=words + ".",
        axis_title="slot (row of the buffer)",
    )


def draw_lines(
    lines: Sequence[Line], *, title: str, subtitle: str = "", alt: str, axis_title: str
) -> go.Figure:
    """Draw lines of cells, the first on top, with a legend of the ranks and the padding."""
    figure = go.Figure()
    longest = max(len(line.slots) for line in lines)
    is_level = longest <= MAX_LEVEL
    plot_height = (34 if is_level else 44) * len(lines) + 6
    unit = axis_title.split(maxsplit=1)[0].replace("token", "position")
    cells = [(line.label, cell) for line in lines for cell in _cells(line, longest, unit)]
    ranks = {cell.rank for _, cell in cells if not cell.wrong}
    for rank in sorted(ranks, key=lambda r: (r < 0, r)):  # padding last
        chosen = [(label, cell) for label, cell in cells if cell.rank == rank and not cell.wrong]
        figure.add_trace(_bars(chosen, *_look(rank)))
    wrong = [(label, cell) for label, cell in cells if cell.wrong]
    if wrong:
        figure.add_trace(_bars(wrong, "✗ wrong", style.WRONG, ""))
    figure.update_traces(textangle=0 if is_level else -90)
    figure.update_layout(
        barmode="overlay",
        xaxis=style.axis(axis_title, range=[-0.5, longest - 0.5], showgrid=False, title_standoff=4),
        yaxis=style.names_axis(showgrid=False),
    )
    figure.update_yaxes(categoryorder="array", categoryarray=[line.label for line in lines])
    return style.finish(figure, title=title, subtitle=subtitle, alt=alt, height=150 + plot_height)


def in_words(slots: Ints) -> str:
    """Return the runs of slots with one owner as text: `rank 0 ×2, padding ×1`."""
    runs = _runs(slots[:, RANK])
    shown = [f"{_name(int(slots[first, RANK]))} ×{count}" for first, count in runs[:12]]
    return ", ".join(shown) + (", …" if len(runs) > 12 else "")


def _describe(metadata: ContextParallelMetadata, tokens: Ints) -> Ints:
    owners = metadata.owners().numpy()[tokens]
    ends = np.cumsum(metadata.lengths)
    sequences = np.searchsorted(ends, tokens, side="right")
    starts = np.array(metadata.starts)[sequences]
    columns = [np.full_like(tokens, -1), owners, sequences, tokens - starts]
    return np.stack(columns, axis=1).astype(np.int64)


def _counts(metadata: ContextParallelMetadata) -> list[tuple[int, int]]:
    return list(enumerate(metadata.per_rank_actual_token))


def _label_words(metadata: ContextParallelMetadata, longest: int) -> str:
    if longest > MAX_LABELLED:
        return "; a cell is a run of rows of one rank"
    return "; a cell shows " + ("its token" if len(metadata.lengths) == 1 else "sequence:token")


def _stage_lines(gathered: GatherResult, name: str, rank: int) -> Iterator[Line]:
    """Yield one line per rank for `shard` and `pad`, and one line of `rank` for any other stage."""
    ranks = range(gathered.metadata.cp_size)
    if name == "shard":
        yield from (Line(f"shard, rank {r}", rows_of(gathered.metadata, r)) for r in ranks)
    elif name == "pad":
        yield from (Line(f"pad, rank {r}", gathered.stage(name, r)) for r in ranks)
    else:
        yield Line(f"{name}, on rank {rank}", gathered.stage(name, rank))


def _runs(owners: Ints) -> list[tuple[int, int]]:
    """Return (first, count) of each run of equal values."""
    edges = np.flatnonzero(np.diff(owners)) + 1
    firsts = np.concatenate([[0], edges]) if len(owners) else np.array([], dtype=np.int64)
    stops = np.concatenate([firsts[1:], [len(owners)]])
    return [(int(first), int(stop - first)) for first, stop in zip(firsts, stops, strict=True)]


def _cells(line: Line, longest: int, unit: str) -> Iterator[Cell]:
    """Yield one cell per slot if labels fit, otherwise one per run of slots with one owner."""
    wrong = np.zeros(len(line.slots), bool) if line.wrong is None else line.wrong
    single = longest <= MAX_LABELLED
    several = bool((line.slots[:, 2] > 0).any())
    keys = line.slots[:, RANK] * 2 + wrong
    runs = [(i, 1) for i in range(len(keys))] if single else _runs(keys)
    for first, count in runs:
        _, rank, sequence, token = (int(v) for v in line.slots[first])
        bad = bool(wrong[first])
        label = f"{sequence}:{token}" if several else str(token)
        text = ("✗" if bad else "") + (label if rank >= 0 else "") if single else ""
        yield Cell(first, count, rank, bad, text, _hover(line, first, count, unit))


def _hover(line: Line, first: int, count: int, unit: str) -> str:
    round_, rank, sequence, token = (int(v) for v in line.slots[first])
    words, last = line.words, f" to {first + count - 1}" if count > 1 else ""
    place = f"{line.label}<br>{unit} {first}{last}"
    if rank < 0:
        return f"{place}<br>{words.empty}"
    gathered = f"<br>round {round_}" if round_ >= 0 else ""
    return f"{place}<br>rank {rank}, {words.group} {sequence}, {words.item} {token}{gathered}"


def _name(rank: int) -> str:
    return f"rank {rank}" if rank >= 0 else "padding"


def _look(rank: int) -> tuple[str, str, str]:
    """Return legend name, colour and hatch."""
    return (
        _name(rank),
        (style.rank_color(rank) if rank >= 0 else style.PADDING),
        ("" if rank >= 0 else "/"),
    )


def _bars(cells: Sequence[tuple[str, Cell]], name: str, color: str, hatch: str) -> go.Bar:
    marker: dict[str, Any] = {"color": color, "line": {"color": style.PAPER, "width": 1}}
    if hatch:
        marker["line"] = {"color": "#8c959f", "width": 1}
        marker["pattern"] = style.hatch(hatch)
    return go.Bar(
        name=name,
        orientation="h",
        y=[label for label, _ in cells],
        x=[cell.count for _, cell in cells],
        base=[cell.first - 0.5 for _, cell in cells],
        text=[cell.text for _, cell in cells],
        hovertext=[cell.hover for _, cell in cells],
        hoverinfo="text",
        textposition="inside",
        insidetextanchor="middle",
        constraintext="none",
        textfont={"color": style.text_color(color), "size": 11},
        marker=marker,
    )
