"""One visual language for every picture: what a colour, a hatch and a word mean.

    colour      the rank that owns or wrote a row, the same in every figure
    hatching    padding: a slot that holds no token
    red, ✗      something is wrong; nothing else is ever red
    grey        what belongs to no rank: stages, totals, references

Colour never carries a meaning alone: cells hold their token, lines differ in dash and marker.
Every figure has a title, units on its axes, and a text alternative that says the same in words.
"""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

# Okabe and Ito's and Tol's palettes without their reds; neighbours also differ in lightness.
RANK_COLORS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#f0e442",
    "#44337a",
    "#8c6d31",
)
WRONG = "#d00000"
PADDING = "#ffffff"
INK = "#24292f"
FAINT = "#d0d7de"
PAPER = "#ffffff"

# Stages are greys, from the cheap to the dear; the hatch of "pad" is the hatch of padding.
STAGE_STYLES: dict[str, tuple[str, str]] = {
    "agree": ("#eaeef2", ""),
    "allocate": ("#dde3e9", ""),
    "pad": ("#ffffff", "/"),
    "wire": ("#4f5b66", ""),
    "strip": ("#8f9ba8", ""),
    "reorder": ("#c9d1d9", ""),
    "exit": ("#f7f7f7", ""),
}
STAGE_MEANINGS = {
    "agree": "all ranks agree to start",
    "allocate": "take the result's memory from the pool",
    "pad": "copy the rows into a buffer of max_rank_len rows",
    "wire": "move rows between ranks",
    "strip": "copy the rows without the padding: rank order",
    "reorder": "copy the rows once more: token order",
    "exit": "wait until every peer has written",
}
ALGORITHM_LINES: dict[str, tuple[str, str, str]] = {  # colour, dash, marker
    "padded": ("#8c959f", "dot", "x"),
    "padded_symm_recv": ("#8c6d31", "dashdot", "square"),
    "padded_symm": ("#009e73", "dash", "diamond"),
    "direct": ("#0072b2", "solid", "circle"),
}

# The look of every figure. plot.js replaces its colours by those of the page's theme.
_AXIS = {
    "title": {"font": {"size": 12}},
    "automargin": True,
    "gridcolor": "#eaeef2",
    "linecolor": FAINT,
    "tickcolor": FAINT,
    "ticks": "outside",
    "zeroline": False,
}
pio.templates["cpkit"] = go.layout.Template(
    layout={
        "font": {"family": "DejaVu Sans, Verdana, sans-serif", "size": 12, "color": INK},
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "title": {
            "font": {"size": 16},
            "subtitle": {"font": {"size": 12, "color": "#57606a"}},
            "x": 0.01,
            "xanchor": "left",
            "yanchor": "top",
        },
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "bargap": 0.3,
        "uniformtext": {"mode": "hide", "minsize": 9},
        "legend": {
            "orientation": "h",
            "traceorder": "normal",
            "x": 0,
            "y": 0,
            "yref": "container",
            "yanchor": "bottom",
        },
        "margin": {"l": 60, "r": 16, "t": 66, "b": 84},
    }
)


def rank_color(rank: int) -> str:
    """Colour of a rank. Ranks 8 and up begin again; the cell's text tells them apart."""
    return RANK_COLORS[rank % len(RANK_COLORS)]


def text_color(background: str) -> str:
    """Ink or paper, whichever reads better on a `#rrggbb` background."""
    red, green, blue = (int(background[i : i + 2], 16) for i in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else PAPER


def stage_style(stage: str) -> tuple[str, str]:
    """Grey and hatch of a stage; an unknown stage is plain."""
    return STAGE_STYLES.get(stage, ("#b0b8c0", ""))


def stage_marker(stage: str) -> dict[str, Any]:
    """How the bar of a stage is filled, for plotly."""
    color, shape = stage_style(stage)
    line = {"color": "#57606a", "width": 0.6}
    return {"color": color, "line": line, "pattern": hatch(shape)}


def stage_bar(stage: str, **options: object) -> go.Bar:
    """A horizontal bar of a stage, with its words inside."""
    return go.Bar(
        name=stage,
        orientation="h",
        textposition="inside",
        insidetextanchor="middle",
        textfont={"color": text_color(stage_style(stage)[0])},
        marker=stage_marker(stage),
        **options,
    )


def algorithm_line(algorithm: str) -> tuple[str, str, str]:
    """Colour, dash and marker of an algorithm's line."""
    return ALGORITHM_LINES.get(algorithm, (INK, "longdash", "triangle-up"))


def axis(title: str, **options: object) -> dict[str, Any]:
    """Return the layout of an axis; its title includes the unit."""
    return {"title": {"text": title}, **options}


def names_axis(title: str = "", **options: object) -> dict[str, Any]:
    """Return the layout of a vertical axis of names, the first at the top."""
    return axis(title, autorange="reversed", ticks="", **options)


def hatch(shape: str = "/") -> dict[str, Any]:
    """The pattern of padding, or another (or no) shape drawn alike."""
    return {"shape": shape, "fgcolor": "#8c959f", "size": 6, "solidity": 0.2}


def finish(
    figure: go.Figure, *, title: str, subtitle: str = "", alt: str, height: int, width: int = 860
) -> go.Figure:
    """Give a figure the common look, its title in one place and its text alternative.

    Raises ValueError without a title or a text alternative: a picture that cannot be read aloud is
    not finished.
    """
    if not title or not alt:
        raise ValueError(f"a figure needs a title and a text alternative; got {title!r}, {alt!r}")
    figure.update_layout(
        template="cpkit",
        title={"text": title, "subtitle": {"text": subtitle}, "y": 1 - 14 / height},
        width=width,
        height=height,
        meta={"alt": " ".join(alt.split())},
    )
    return figure


def recorded(figure: go.Figure, *, machine: str, date: str, source: str) -> go.Figure:
    """Label a finished figure as recorded elsewhere: in its title, subtitle and text alternative.

    `machine` and `date` say where and when; `source` is the file in benchmarks/results. Raises
    ValueError where one is missing: a replayed figure that does not say so is a lie.
    """
    if not (machine and date and source):
        raise ValueError(f"say all of machine, date, source; got {machine!r}, {date!r}, {source!r}")
    words = f"Recorded on {machine}, {date} ({source}); not measured here."
    title = figure.layout.title
    title.text = f"Recorded: {title.text}"
    title.subtitle.text = " ".join([words, title.subtitle.text or ""]).strip()
    figure.layout.meta = {"alt": f"{words} {figure.layout.meta['alt']}"}
    return figure


def text_alternative(figure: go.Figure) -> str:
    """The figure in words: its title, then what it shows."""
    meta = figure.layout.meta or {}
    title = figure.layout.title.text or "untitled"
    return f"Figure: {title}. {meta.get('alt', '')}".rstrip()
