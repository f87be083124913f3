"""What a live panel is made of: lengths that are typed, a picture drawn anew, the newest wish."""

from __future__ import annotations

import json
import threading

import plotly.graph_objects as go
import pytest

from cpkit.control.messages import Workload
from cpkit.layout import prepare_context_parallel_metadata
from cpkit.notebook import figures, show
from cpkit.notebook.controls import parse_lengths
from cpkit.notebook.latest import LatestWins
from cpkit.notebook.live import redraw
from cpkit.notebook.panel import Panel
from tests.drawn import LAYOUT, Padded, sample
from tests.processes import until


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
    assert tuple(panel.widget.data[0].y) == four.per_rank_actual_token
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
    until(lambda: begun == [0])
    for wish in range(1, 10):
        worker.ask(wish)
    go_on.set()
    until(lambda: len(failures) == 1)
    assert begun == [0, 9], "wishes 1 to 8 were overtaken"
    worker.ask(10)
    until(lambda: begun[-1] == 10)
    assert worker.close(), "a failure does not end the thread; close does"
