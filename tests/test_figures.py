"""Figures are drawn from the arrays they are given, and can be read by everybody."""

from __future__ import annotations

import itertools
import json
import threading
import time
from base64 import b64decode
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import Image

from cpkit.control.messages import Sample, Workload
from cpkit.divergence import push_into
from cpkit.layout import STRATEGIES, prepare_context_parallel_metadata
from cpkit.notebook import figures, show, style
from cpkit.notebook.controls import parse_lengths
from cpkit.notebook.latest import LatestWins
from cpkit.notebook.lessons.padding_gathers import ROW_BYTES, written_bytes
from cpkit.notebook.lessons.symmetric_orders import no_barrier
from cpkit.notebook.live import redraw
from cpkit.notebook.mistakes import Mistake
from cpkit.notebook.panel import Panel
from cpkit.notebook.requests import Served
from cpkit.notebook.schedules import smallest_failure

LAYOUT = prepare_context_parallel_metadata([13, 9], 4)


class Padded:
    """The stages of a padded gather, computed from the layout alone."""

    metadata = LAYOUT
    stages = ("pad", "wire", "strip", "reorder")

    def stage(self, name: str, rank: int) -> np.ndarray:
        shards = [figures.rows_of(LAYOUT, r) for r in range(4)]
        padded = [figures.pad_rows(rows, LAYOUT.max_rank_len[0]) for rows in shards]
        wire = np.concatenate(padded)
        strip = wire[wire[:, 1] >= 0]
        return {
            "pad": padded[rank],
            "wire": wire,
            "strip": strip,
            "reorder": strip[LAYOUT.token_order.numpy()],
        }[name]


def sample(cp_size: int = 4, algorithm: str = "padded", first_us: float = 10.0) -> Sample:
    times = tuple(first_us + rank for rank in range(cp_size))
    work = Workload(cp_size=cp_size, lengths=(13, 9), algorithm=algorithm)
    stages = {"pad": times, "wire": times}
    return Sample(work, 0, 5, 1000, times, times, times, stages, "symmetric", "in the pool")


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
    "gain": lambda: figures.gain([1 << 20, 1 << 24], [20.0, 40.0], [10.0, 40.0]),
    "scale": lambda: figures.scale_out(MODELLED),
    "damage": lambda: figures.damage({"no barrier": Mistake(10.0, 40.0, [9.0, 10.0, 11.0])}),
    "bytes": lambda: figures.byte_bars(LAYOUT, {"a model": 1_000_000}),
    "requests": lambda: figures.pool_requests(SERVED),
    "memory": lambda: figures.memory_map(push_into([LATE, EARLY], 3, 18)),
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
    "work": "keys looked at",
    "roof": "time (µs, slowest rank)",
    "steps": "time (µs, slowest rank)",
    "gain": "time ratio, ring / symmetric",
    "scale": "modelled time (µs)",
    "damage": "reported time / right time",
    "bytes": "bytes written on each rank (MB, one layer)",
    "requests": "until the answer (ms)",
    "memory": "row of the rank's arena",
    "schedule": "step (order of all ranks' steps)",
}
WRONG = {
    "who",
    "memory",
    "schedule",
    "damage",
}  # of these figures, those that are given something wrong


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_title_units_and_text(name: str) -> None:
    figure = FIGURES[name]()
    text = figures.text_alternative(figure)
    assert figure.layout.title.text in text
    assert len(text) > len(figure.layout.title.text) + 30, "the alternative says what is shown"
    axes = [*figure.select_xaxes(), *figure.select_yaxes()]
    assert UNITS[name] in [axis.title.text for axis in axes]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_the_same_every_time(name: str) -> None:
    first, second = (show.bundle(FIGURES[name]()) for _ in range(2))
    assert first == second
    assert "bdata" not in json.dumps(first), "plain lists survive other versions of numpy"
    assert set(first) == {"text/plain", show.PLOTLY_MIME}


@pytest.mark.parametrize("name", FIGURES)
def test_red_means_wrong_and_nothing_else(name: str) -> None:
    red = style.WRONG in json.dumps(show.bundle(FIGURES[name]())[show.PLOTLY_MIME]["data"])
    assert red == (name in WRONG)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ownership_strip_shows_the_owner_of_every_token(strategy: str) -> None:
    layout = prepare_context_parallel_metadata([24], 4, strategy)
    drawn = dict(_cells(figures.ownership_strip(layout)))
    owners = layout.owners().tolist()
    assert drawn == {token: f"rank {owner}" for token, owner in enumerate(owners)}


def test_padding_grid_hatches_exactly_the_padding() -> None:
    figure = figures.padding_grid(LAYOUT)
    padding = next(trace for trace in figure.data if trace.name == "padding")
    assert padding.marker.pattern.shape == "/"
    assert sum(padding.x) == sum(LAYOUT.max_rank_len) - LAYOUT.total_tokens == 2
    assert "2 of 24 slots are padding (8.3%)" in figure.layout.title.text


def test_a_stage_grid_follows_the_arrays_of_the_stages() -> None:
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
    found = push_into([EARLY, LATE], 3, 18)
    figure = figures.memory_map(found)
    wrong = next(trace for trace in figure.data if trace.name == "✗ wrong")
    assert sum(wrong.x) == sum(map(len, found.lost + found.overwritten)) == 9
    assert "never written" in [trace.name for trace in figure.data]


def test_requests_show_where_the_time_of_a_spill_goes() -> None:
    drawn = {trace.name: list(trace.y) for trace in figures.pool_requests(SERVED).data}
    assert drawn["the request itself"] == [12.0, 15.0]
    assert drawn["spill: registering a segment"] == [0.0, 80.0]
    assert "24 MB took 95 ms, 80 ms of it a spill" in figures.text_alternative(
        figures.pool_requests(SERVED)
    )


def test_byte_bars_show_what_torch_writes() -> None:
    figure = figures.byte_bars(LAYOUT, {"m": ROW_BYTES})
    drawn = {trace.name: trace.x[0] for trace in figure.data}
    dearest = max((written_bytes(LAYOUT, rank) for rank in range(4)), key=lambda w: sum(w.values()))
    assert drawn == {stage: written / 1e6 for stage, written in dearest.items()}
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


def test_a_figure_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a title and a text alternative"):
        style.finish(go.Figure(), title="t", alt="", height=100)


def test_a_recorded_figure_says_so_everywhere() -> None:
    figure = figures.recorded(
        FIGURES["gain"](), machine="H200", date="2026-11-24", source="results/h200.json"
    )
    words = "Recorded on H200, 2026-11-24 (results/h200.json); not measured here."
    assert figure.layout.title.text.startswith("Recorded: ")
    assert figure.layout.title.subtitle.text.startswith(words)
    assert words in figures.text_alternative(figure)
    with pytest.raises(ValueError, match="say all of machine"):
        figures.recorded(FIGURES["gain"](), machine="H200", date="", source="x")


# Machado, Oliveira and Fernandes 2009: what a dichromat sees of a colour (linear RGB, severity 1).
VISION = {
    "protanopia": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deuteranopia": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "tritanopia": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}


@pytest.mark.parametrize("vision", [None, *VISION])
def test_rank_colours_differ_for_every_kind_of_vision(vision: str | None) -> None:
    colors = [*style.RANK_COLORS, style.WRONG]
    seen = [_lab(color, VISION[vision] if vision else np.eye(3)) for color in colors]
    distances = [float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > 10, "2.3 is just noticeable; cells carry text besides"


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("4096", (4096,)), (" 4097, 812 ", (4097, 812)), ("3*5,2 x 7", (5, 5, 5, 7, 7))],
)
def test_lengths_are_read(text: str, lengths: tuple[int, ...]) -> None:
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize("text", ["", "12,", "a", "-3", "1.5", "5000*1", "0x10*3", "9" * 12])
def test_other_lengths_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"lengths .*(for example 4097|at most 4096)"):
        parse_lengths(text)


def test_the_panel_follows_layout_and_samples() -> None:
    panel = Panel()
    four, two = (prepare_context_parallel_metadata([13, 9], cp) for cp in (4, 2))
    panel.show_layout(Workload(cp_size=4, lengths=(13, 9)), four)
    assert list(panel.widget.data[0].y) == four.per_rank_actual_token
    panel.note(sample())
    panel.note(sample(first_us=20))
    panel.show_sample(sample(first_us=20))
    assert list(panel.widget.data[2].y) == [20, 21, 22, 23]
    assert list(panel.widget.data[3].y) == [13, 23], "the history is that of the slowest rank"
    panel.show_layout(Workload(cp_size=2, lengths=(13, 9)), two)
    assert list(panel.widget.data[3].y) == [None], "a new history"
    assert "cp_size 2" in panel.still().layout.title.text
    assert "uid" not in json.dumps(show.bundle(panel.still())), "or no two runs would be equal"
    panel.close()


def test_redraw_replaces_a_live_figure() -> None:
    widget = go.FigureWidget()
    for figure in (figures.stage_grid(Padded()), figures.ownership_strip(LAYOUT)):
        redraw(widget, figure)
        visible = [trace for trace in widget.data if trace.visible in (None, True)]
        assert [trace.name for trace in visible] == [trace.name for trace in figure.data]
        assert [list(a.x) for a in visible] == [list(b.x) for b in figure.data]
        assert widget.layout.title.text == figure.layout.title.text


def test_the_newest_wish_wins() -> None:
    begun, failures, go_on = [], [], threading.Event()

    def work(wish: int, is_newest: object) -> None:
        begun.append(wish)
        if wish == 0:
            go_on.wait(5)
        if wish == 9:
            raise RuntimeError("nine")

    worker = LatestWins("test", work, failures.append)
    worker.ask(0)
    _until(lambda: begun == [0])
    for wish in range(1, 10):
        worker.ask(wish)
    go_on.set()
    _until(lambda: len(failures) == 1)
    assert begun == [0, 9], "wishes 1 to 8 were overtaken"
    worker.ask(10)
    _until(lambda: begun[-1] == 10)
    assert worker.close(), "a failure does not end the thread; close does"


def test_a_missing_browser_means_no_picture_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPKIT_STATIC", "1")
    monkeypatch.setenv("BROWSER_PATH", "/nonexistent")
    assert "image/png" not in show.bundle(figures.padding_grid(LAYOUT))


def test_a_broken_browser_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/bin/false")
    with pytest.warns(UserWarning, match="no static picture"):
        assert show.png(figures.padding_grid(LAYOUT)) is None


@pytest.mark.browser
def test_a_picture_is_drawn_where_there_is_a_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    if show.find_browser() is None:
        pytest.skip("no Chromium or Chrome on this machine: apt-get install chromium")
    monkeypatch.setenv("CPKIT_STATIC", "1")
    drawn = b64decode(show.bundle(figures.padding_grid(LAYOUT))["image/png"])
    assert 5_000 < len(drawn) < 25_000, "256 colours: a third of what the browser gives"
    colors = {
        f"#{bytes(c).hex()}" for _, c in Image.open(BytesIO(drawn)).convert("RGB").getcolors()
    }
    assert set(style.RANK_COLORS[:4]) <= colors, "what a colour means is as exact as it was"


def _cells(figure: go.Figure) -> list[tuple[int, str]]:
    """(first slot, legend name) of every cell."""
    return [(round(base + 0.5), trace.name) for trace in figure.data for base in trace.base]


def _lab(color: str, vision: object) -> np.ndarray:
    """CIE L*a*b* of a `#rrggbb` colour as somebody with this vision sees it."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(vision) @ linear, 0, 1)
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    x, y, z = np.cbrt(np.maximum(np.array(to_xyz) @ linear / (0.9505, 1.0, 1.089), 0.009))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def _until(condition, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)
