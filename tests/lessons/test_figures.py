"""Figures show the arrays that they are given, and have a title, units and a text alternative."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from cpkit.layout import STRATEGIES, prepare_context_parallel_metadata
from cpkit.notebook import show, style
from cpkit_lessons import figures
from cpkit_lessons.divergence import simulate_push
from cpkit_lessons.mistakes import Mistake
from cpkit_lessons.padding.exercises import written_bytes
from cpkit_lessons.pool_live import Served
from cpkit_lessons.rows import ROW_BYTES
from cpkit_lessons.simulate import smallest_failure
from cpkit_lessons.symmetric.synchronization import no_barrier
from tests.helpers.drawn import LAYOUT, Padded, sample


def sweep_table() -> pd.DataFrame:
    names = ("direct", "padded")
    rows = [
        {"size_bytes": size, "algorithm": name, "cp_size": 4, "time_us": 9.0}
        for name, size in itertools.product(names, (1 << 16, 1 << 20))
    ]
    return pd.DataFrame(rows)


SPANS = pd.DataFrame([{"rank": 0, "stage": "wire", "start_us": 0.0, "stop_us": 5.0}])
MODELLED = pd.DataFrame(
    [{"machine": "a", "size_bytes": 1e6, "cp_size": n, "time_us": n} for n in (2, 4)]
)
STAMPS = np.array([[1, (1 << 32) + 1], [1, (1 << 32) + 7]])
SERVED = [Served(8, 12.0, 0.0, 16, 0), Served(24, 95.0, 80.0, 16, 25.2)]
LATE = [("alloc", "old", 8), ("alloc", "kv", 4)]
EARLY = [*LATE, ("free", "old", 0)]
FIGURES: dict[str, Callable[[], go.Figure]] = {
    "ownership": lambda: figures.ownership_strip(LAYOUT),
    "padding": lambda: figures.padding_grid(LAYOUT),
    "stages": lambda: figures.stage_grid(Padded()),
    "waste": lambda: figures.waste_map([[13, 9], [64]], [2, 4]),
    "who": lambda: figures.who_wrote_where(STAMPS, rounds=1),
    "split": lambda: figures.stage_split([sample()]),
    "timeline": lambda: figures.timeline(SPANS, "direct"),
    "work": lambda: figures.work_bars({"zigzag": [75, 75], "contiguous": [30, 120]}),
    "roof": lambda: figures.roof({1 << 16: 5.0, 1 << 20: 9.0}, sweep_table(), ("direct", 3, 1e-5)),
    "steps": lambda: figures.steps({"direct": 3.0}, {"direct": 4.0}),
    "gain": lambda: figures.gain([1 << 20, 1 << 24], [2.0, 1.0]),
    "scale": lambda: figures.scale_out(MODELLED),
    "damage": lambda: figures.damage({"no barrier": Mistake(10.0, 40.0, [9.0, 10.0, 11.0])}),
    "bytes": lambda: figures.byte_bars(LAYOUT, {"a model": 1_000_000}),
    "requests": lambda: figures.pool_requests(SERVED),
    "memory": lambda: figures.memory_map(simulate_push([LATE, EARLY], 3, 18)),
    "schedule": lambda: figures.schedule_timeline(smallest_failure(no_barrier, 2, 1).failure),
}
UNITS = {
    "ownership": "token (index in the flattened batch)",
    "padding": "slot (row of the rank's buffer)",
    "stages": "slot (row of the buffer)",
    "waste": "",
    "who": "memory of",
    "split": "time (µs, mean over ranks)",
    "timeline": "time since the first rank entered (µs)",
    "work": "keys attended to",
    "roof": "time (µs, slowest rank)",
    "steps": "time (µs, slowest rank)",
    "gain": "time ratio, ring / symmetric",
    "scale": "modelled time (µs)",
    "damage": "reported time / right time",
    "bytes": "bytes written on each rank (MB, one layer)",
    "requests": "response time (ms)",
    "memory": "row of the rank's arena",
    "schedule": "step (order of all ranks' steps)",
}
WRONG = {"who", "memory", "schedule", "damage"}  # the figures above that show a fault


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_title_units_and_text(name: str) -> None:
    figure = FIGURES[name]()
    text = figures.text_alternative(figure)
    assert figure.layout.title.text in text
    assert len(text) > len(figure.layout.title.text) + 30, "the alternative describes the figure"
    axes = [*figure.select_xaxes(), *figure.select_yaxes()]
    assert UNITS[name] in [axis.title.text for axis in axes]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_the_same_every_time(name: str) -> None:
    first, second = (show.bundle(FIGURES[name]()) for _ in range(2))
    assert first == second
    assert "bdata" not in json.dumps(first), "plain lists survive other versions of numpy"
    assert set(first) == {"text/plain", show.PLOTLY_MIME}


@pytest.mark.parametrize("name", FIGURES)
def test_only_faults_are_red(name: str) -> None:
    red = style.WRONG in json.dumps(show.bundle(FIGURES[name]())[show.PLOTLY_MIME]["data"])
    assert red == (name in WRONG)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ownership_strip_shows_the_owner_of_every_token(strategy: str) -> None:
    layout = prepare_context_parallel_metadata([24], 4, strategy)
    drawn = dict(_cells(figures.ownership_strip(layout)))
    owners = layout.owners().tolist()
    assert drawn == {token: f"rank {owner}" for token, owner in enumerate(owners)}


def test_hover_texts_name_what_a_cell_is() -> None:
    """Positions, slots or rows of an arena; a round only where a gather has written it."""
    owned = _hovers(figures.ownership_strip(LAYOUT))
    assert all("<br>position " in each and "round" not in each for each in owned)
    padded = _hovers(figures.padding_grid(LAYOUT))
    assert all("<br>slot " in each and "round" not in each for each in padded)
    assert any("padding: no token" in each for each in padded)
    arena = _hovers(figures.memory_map(simulate_push([LATE, EARLY], 3, 18)))
    assert any("<br>row 8<br>rank 0, block 2, row 0<br>round 1" in each for each in arena)
    assert any(each.endswith("never written") for each in arena)


def test_padding_grid_hatches_exactly_the_padding() -> None:
    figure = figures.padding_grid(LAYOUT)
    padding = next(trace for trace in figure.data if trace.name == "padding")
    assert padding.marker.pattern.shape == "/"
    assert sum(padding.x) == sum(LAYOUT.max_rank_len) - LAYOUT.total_tokens == 2
    assert "2 of 24 slots are padding (8.3%)" in figure.layout.title.text


def test_a_stage_grid_shows_the_arrays_of_the_stages() -> None:
    figure = figures.stage_grid(Padded(), ["reorder"], rank=2)
    text = [t for trace in figure.data for t in trace.text]
    assert sorted(text) == sorted([f"0:{i}" for i in range(13)] + [f"1:{i}" for i in range(9)])
    assert "reorder, on rank 2: rank 0 ×2, rank 1 ×2" in figures.text_alternative(figure)


def test_a_schedule_shows_every_step_and_marks_the_wrong_read() -> None:
    failure = smallest_failure(no_barrier, 2, 1).failure
    figure = figures.schedule_timeline(failure)
    drawn = {(x, lane) for t in figure.data for x, lane in zip(t.base, t.y, strict=True)}
    assert drawn == {(n + 0.53, f"rank {e.rank}") for n, e in enumerate(failure.events)}
    wrong = next(trace for trace in figure.data if trace.name == "✗ wrong")
    assert list(wrong.text) == ["✗ read 0:<br>nothing"]


def test_a_memory_map_marks_what_is_lost_and_what_is_overwritten() -> None:
    found = simulate_push([EARLY, LATE], 3, 18)
    figure = figures.memory_map(found)
    wrong = next(trace for trace in figure.data if trace.name == "✗ wrong")
    assert sum(wrong.x) == sum(map(len, found.lost + found.overwritten)) == 9
    assert "never written" in [trace.name for trace in figure.data]


def test_requests_show_the_time_of_a_spill() -> None:
    drawn = {trace.name: list(trace.y) for trace in figures.pool_requests(SERVED).data}
    assert drawn["request without spill"] == [12.0, 15.0]
    assert drawn["spill: registering a segment"] == [0.0, 80.0]
    assert "24 MB took 95 ms, 80 ms of it a spill" in figures.text_alternative(
        figures.pool_requests(SERVED)
    )


def test_byte_bars_show_what_torch_writes() -> None:
    figure = figures.byte_bars(LAYOUT, {"m": ROW_BYTES})
    drawn = {trace.name: trace.x[0] for trace in figure.data}
    most = max((written_bytes(LAYOUT, rank) for rank in range(4)), key=lambda w: sum(w.values()))
    assert drawn == {stage: written / 1e6 for stage, written in most.items()}
    assert figure.data[1].x[1] == LAYOUT.total_tokens * ROW_BYTES / 1e6, (
        "direct writes each row once"
    )


def test_many_slots_are_drawn_as_runs() -> None:
    layout = prepare_context_parallel_metadata([4096], 8)
    figure = figures.ownership_strip(layout)
    assert sum(len(trace.x) for trace in figure.data) == 15, "rank 7's two blocks are neighbours"
    assert sum(sum(trace.x) for trace in figure.data) == 4096


def test_a_wrong_slot_is_red_and_marked() -> None:
    slots = figures.token_line(LAYOUT)
    line = figures.Line("got", slots, wrong=np.arange(len(slots)) == 5)
    figure = figures.draw_lines([line], title="t", alt="a", axis_title="slot")
    wrong = next(trace for trace in figure.data if trace.marker.color == style.WRONG)
    assert list(wrong.text) == ["✗0:5"]


def _hovers(figure: go.Figure) -> list[str]:
    return [text for trace in figure.data for text in trace.hovertext]


def _cells(figure: go.Figure) -> list[tuple[int, str]]:
    """Return (first slot, legend name) of every cell."""
    return [(round(base + 0.5), trace.name) for trace in figure.data for base in trace.base]
