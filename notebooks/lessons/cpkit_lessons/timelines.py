"""Draw a failing schedule: one lane per rank, one column per step, the wrong read in red."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from cpkit.notebook import style
from cpkit_lessons.simulate import Event, Failure

_LANE_PX = 58


def schedule_timeline(failure: Failure) -> go.Figure:
    """Draw the ranks' steps in their order; arrows are writes into a peer's memory."""
    events = failure.events
    figure = go.Figure()
    for rank in range(failure.size):
        mine = [(n, e) for n, e in enumerate(events, start=1) if e.rank == rank and not e.fault]
        figure.add_trace(_cells(mine, f"rank {rank}", style.rank_color(rank)))
    wrong = [(n, event) for n, event in enumerate(events, start=1) if event.fault]
    if wrong:
        figure.add_trace(_cells(wrong, "✗ wrong", style.WRONG))
    for number, event in enumerate(events, start=1):
        if event.step.kind in ("put", "signal") and event.step.peer != event.rank:
            figure.add_annotation(_arrow(number, event))
    for rank, where in failure.stuck:
        figure.add_annotation(_stuck(len(events), rank, where))
    plot_height = _LANE_PX * failure.size + 20
    figure.update_layout(
        barmode="overlay",
        xaxis=style.axis(
            "step (order of all ranks' steps)",
            range=[0.4, len(events) + (2.6 if failure.stuck else 0.6)],
            dtick=1,
            showgrid=False,
        ),
        yaxis=style.axis(
            "",
            range=[failure.size - 0.5, -0.5],
            ticks="",
            showgrid=False,
            type="category",
        ),
    )
    lanes = [f"rank {rank}" for rank in range(failure.size)]
    figure.update_yaxes(categoryorder="array", categoryarray=lanes)
    return style.finish(
        figure,
        title=f"The smallest schedule that fails: {failure.kind}",
        subtitle=_subtitle(failure),
        alt=f"{failure.size} ranks. {failure}.",
        height=150 + plot_height,
    )


def _subtitle(failure: Failure) -> str:
    steps = f"{failure.size} ranks, {len(failure.events)} steps"
    if failure.stuck:
        ranks = ", ".join(f"rank {rank}" for rank, _ in failure.stuck)
        return f"{steps}; then {ranks} would wait forever"
    return f"{steps}; the last read {failure.events[-1].mismatch}"


def _cells(steps: Sequence[tuple[int, Event]], name: str, color: str) -> go.Bar:
    return go.Bar(
        name=name,
        orientation="h",
        y=[f"rank {event.rank}" for _, event in steps],
        x=[0.94] * len(steps),
        base=[number - 0.47 for number, _ in steps],
        text=[_label(event) for _, event in steps],
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        textfont={"color": style.text_color(color), "size": 11},
        marker={"color": color, "line": {"color": style.PAPER, "width": 1}},
        hovertemplate="%{y}: %{text}<extra></extra>",
    )


def _label(event: Event) -> str:
    """Return the text of a step: `put r1` over `→ rank 0`; for a read, the round that it found."""
    step, mark = event.step, "✗ " if event.fault else ""
    match step.kind:
        case "put":
            return f"put r{step.round}<br>→ rank {step.peer}"
        case "read":
            return f"{mark}read {step.peer}:<br>{f'r{event.found}' if event.found else 'nothing'}"
        case "barrier" | "store":
            return step.kind
    arrow = "→" if step.kind == "signal" else "←"
    return f"{step.kind}<br>{step.channel} {arrow} {step.peer}"


def _arrow(number: int, event: Event) -> dict[str, Any]:
    return {
        "x": number,
        "y": f"rank {event.step.peer}",
        "ax": number,
        "ay": f"rank {event.rank}",
        "xref": "x",
        "yref": "y",
        "axref": "x",
        "ayref": "y",
        "showarrow": True,
        "arrowhead": 2,
        "arrowwidth": 1.4,
        "arrowcolor": "#57606a",
        "standoff": 4,
        "startstandoff": 20,
        "text": "",
    }


def _stuck(steps: int, rank: int, where: str) -> dict[str, Any]:
    return {
        "x": steps + 1.5,
        "y": f"rank {rank}",
        "text": f"✗ waits forever:<br>{where}",
        "showarrow": False,
        "font": {"color": style.WRONG, "size": 11},
    }
