"""The common style of all figures: the meaning of colours and hatches, and the text of stages.

    colour      the rank that owns or wrote a row, the same in every figure
    hatching    padding: a slot that holds no token
    red, ✗      an error, and nothing else
    grey        anything that belongs to no rank: stages, totals, references

Colour is never the only sign: cells show their token, and lines differ in dash and marker. Each
figure has a title, units on its axes, and a text alternative.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:  # a live figure is a plain dictionary, and needs no plotly in the kernel
    import plotly.graph_objects as go

PlainFigure = dict[str, Any]  # {"data": [traces], "layout": {…}}, as plotly.js reads it
AnyFigure = TypeVar("AnyFigure", "go.Figure", PlainFigure)

# The palettes of Okabe and Ito and of Tol, without reds. Adjacent colours also differ in lightness.
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

# Stages are greys, and the expensive ones are darker; "pad" has the hatch of padding.
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
    "plan": ("#cc79a7", "longdash", "triangle-up"),
}
OWN_LINES = (  # of algorithms that a user has added to the workers
    ("#44337a", "dashdot", "star"),
    ("#56b4e9", "dash", "cross"),
    ("#e69f00", "dot", "pentagon"),
)

# Of plotly.js, for every figure: no button that sends the chart to a server, or selects points.
CONFIG = {
    "displaylogo": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "sendChartToCloud"],
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
TEMPLATE: dict[str, Any] = {
    "layout": {
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
}


def rank_color(rank: int) -> str:
    """Return the colour of a rank. The colours repeat from rank 8 on."""
    return RANK_COLORS[rank % len(RANK_COLORS)]


def text_color(background: str) -> str:
    """Return `INK` or `PAPER`, whichever is more legible on a `#rrggbb` background."""
    red, green, blue = (int(background[i : i + 2], 16) for i in (1, 3, 5))
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else PAPER


def stage_style(stage: str) -> tuple[str, str]:
    """Return the grey and the hatch of a stage; an unknown stage has no hatch."""
    return STAGE_STYLES.get(stage, ("#b0b8c0", ""))


def stage_marker(stage: str) -> dict[str, Any]:
    """Return plotly's marker for the bar of a stage."""
    color, shape = stage_style(stage)
    line = {"color": "#57606a", "width": 0.6}
    return {"color": color, "line": line, "pattern": hatch(shape)}


def stage_bar(stage: str, **options: object) -> dict[str, Any]:
    """Return the trace of a stage: horizontal bars, with their text inside."""
    return {
        "type": "bar",
        "name": stage,
        "orientation": "h",
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textfont": {"color": text_color(stage_style(stage)[0])},
        "marker": stage_marker(stage),
        **options,
    }


def algorithm_line(algorithm: str) -> tuple[str, str, str]:
    """Return the colour, dash and marker of an algorithm's line; one of `OWN_LINES` if unknown."""
    own = OWN_LINES[sum(algorithm.encode()) % len(OWN_LINES)]
    return ALGORITHM_LINES.get(algorithm, own)


def byte_words(count: float) -> str:
    """Return a byte count with a decimal unit: `33.6 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def axis(title: str, **options: object) -> dict[str, Any]:
    """Return the layout of an axis; its title includes the unit."""
    return {"title": {"text": title}, **options}


def names_axis(title: str = "", **options: object) -> dict[str, Any]:
    """Return the layout of a vertical axis of names, the first at the top."""
    looks = {"autorange": "reversed", "ticks": "", "ticklabelstandoff": 6, **options}
    # Names are longer than numbers, so their axis has its title further away.
    return {"title": {"text": title, "standoff": 12}, **looks}


def hatch(shape: str = "/") -> dict[str, Any]:
    """Return the hatch of padding, or the same with another shape; an empty shape is no hatch."""
    return {"shape": shape, "fgcolor": "#8c959f", "size": 6, "solidity": 0.2}


class Plot(NamedTuple):
    """One of several plots of a figure: its place, from 0 to 1, its heading, and its axes."""

    across: tuple[float, float]
    up: tuple[float, float]
    heading: str
    x: Mapping[str, object]
    y: Mapping[str, object]


def several_plots(plots: Sequence[Plot]) -> dict[str, Any]:
    """Return a layout of several plots. The axes of the second one are `x2` and `y2`, and so on."""
    layout: dict[str, Any] = {"annotations": []}
    for number, plot in enumerate(plots, 1):
        n = "" if number == 1 else number
        layout[f"xaxis{n}"] = {**plot.x, "domain": plot.across, "anchor": f"y{n}"}
        layout[f"yaxis{n}"] = {**plot.y, "domain": plot.up, "anchor": f"x{n}"}
        place = {"x": sum(plot.across) / 2, "y": plot.up[1], "xref": "paper", "yref": "paper"}
        look = {"showarrow": False, "yanchor": "bottom", "font": {"size": 13}}
        layout["annotations"].append({"text": plot.heading, **place, **look})
    return layout


def finish(
    figure: AnyFigure, *, title: str, subtitle: str = "", alt: str, height: int, width: int = 860
) -> AnyFigure:
    """Apply the common style, the title and the text alternative `alt` to a figure.

    Raises ValueError without a title or a text alternative, which a screen reader needs.
    """
    if not title or not alt:
        raise ValueError(f"a figure needs a title and a text alternative; got {title!r}, {alt!r}")
    look = {
        "template": TEMPLATE,
        "title": {"text": title, "subtitle": {"text": subtitle}, "y": 1 - 14 / height},
        "width": width,
        "height": height,
        "meta": {"alt": " ".join(alt.split())},
    }
    if isinstance(figure, dict):
        figure["layout"] |= look
    else:
        figure.update_layout(look, overwrite=True)
    return figure


def recorded(
    figure: go.Figure, *, machine: str, date: str, source: str, note: str = "not measured here"
) -> go.Figure:
    """Label a finished figure as recorded elsewhere: in its title, subtitle and text alternative.

    `machine` and `date` say where and when; `source` is the file in benchmarks/results. `note` says
    which marks were recorded, if not all. Raises ValueError if one of the first three is missing,
    because a recorded figure must not look like a measured one.
    """
    if not (machine and date and source):
        raise ValueError(f"pass machine, date and source; got {machine!r}, {date!r}, {source!r}")
    words = f"Recorded on {machine}, {date} ({source}); {note}."
    title = figure.layout.title
    title.text = f"Recorded: {title.text}"
    title.subtitle.text = " ".join([words, title.subtitle.text or ""]).strip()
    figure.layout.meta = {"alt": f"{words} {figure.layout.meta['alt']}"}
    return figure


def plain(figure: go.Figure) -> PlainFigure:
    """Return a plotly figure as a plain one."""
    content: PlainFigure = json.loads(figure.to_json())
    return content


def text_alternative(figure: go.Figure | PlainFigure) -> str:
    """Return the figure as text: its title and its text alternative."""
    layout = figure["layout"]
    return f"Figure: {layout['title']['text']}. {layout['meta']['alt']}"
