"""The live panels with real workers, driven through their controls."""

from __future__ import annotations

import inspect
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import cpkit
from cpkit.cost import Host, HostModel
from cpkit.notebook import intervals, style
from cpkit.notebook.explorer import Explorer
from cpkit.notebook.live import STALE
from cpkit.notebook.show import NoPicture, find_browser
from cpkit_lessons.stepper import Stepper
from tests.helpers.processes import until

pytestmark = pytest.mark.workers


@pytest.fixture
def panel(lab: cpkit.Lab) -> Iterator[Explorer]:
    explorer = lab.explore([256, 64], cp_size=4)
    yield explorer
    explorer.close()


def drawn(panel: Explorer) -> dict[str | None, Any]:
    """Return the first trace of each name. Plotly has checked them."""
    return {trace.name: trace for trace in reversed(panel.panel.still().data)}


def test_it_measures_the_workload_of_the_controls(panel: Explorer) -> None:
    panel.start()
    sample = panel.wait(samples=2)
    assert sample.workload == panel.controls.workloads()[0]
    until(lambda: "call time, each gather on its slowest rank" in panel.summary_html)
    panel.controls.algorithms.value = ("padded",)
    assert panel.wait(samples=1).workload.algorithm == "padded"
    panel.controls.algorithms.value = ("plan",)
    assert panel.wait(samples=1).path == "symmetric"
    panel.controls.symmetric.value = False
    assert panel.wait(samples=1).path == "fallback"
    panel.controls.preset.value = "small: 64 tokens"
    assert panel.wait(samples=1).workload.lengths == (64,)
    panel.controls.lengths.value = "65"
    assert panel.controls.preset.value == "own lengths"
    panel.controls.lengths.value = "64"
    assert panel.controls.preset.value == "small: 64 tokens"
    assert panel.controls.rows.value == "Llama 3: K and V, 8 heads of 128"
    panel.controls.rows.value = "index keys of 128 bytes"
    assert panel.wait(samples=1).workload.row_bytes == 128
    panel.controls.tensors.value = 2
    assert panel.controls.rows.value == "own rows"
    panel.controls.tensors.value = 1
    assert panel.controls.rows.value == "index keys of 128 bytes"


def test_several_algorithms_are_measured_side_by_side(panel: Explorer) -> None:
    names = ("padded", "padded_symm", "direct", "plan")
    panel.controls.algorithms.value = names[::-1]
    panel.start().wait(samples=9)
    samples = panel.samples[-4 * 9 :]
    assert [sample.algorithm for sample in samples] == list(names) * 9
    assert len({sample.sequence for sample in samples}) == 9
    until(lambda: None not in drawn(panel)["to the first algorithm"].x, why="ratios of 8 intervals")
    traces = drawn(panel)
    assert list(traces["wire"].y) == list(names)
    for name in names:
        assert f">{name}</th>" in panel.summary_html
        assert traces[name].showlegend
    assert panel.summary_html.count("● symmetric") == 3
    assert "○ fallback" in panel.summary_html
    assert "padded uses ordinary buffers by design; select" in panel.summary_html
    assert "4 ranks on " in panel.contention_html


def test_a_button_selects_one_more_algorithm_and_none_is_an_error(panel: Explorer) -> None:
    buttons = panel.controls.algorithms.buttons
    assert panel.controls.algorithms.value == ("direct",)
    buttons["plan"].value = True
    assert panel.controls.algorithms.value == ("direct", "plan")
    assert [button.description for button in buttons.values()][-2:] == ["✓ direct", "✓ plan"]
    for button in buttons.values():
        button.value = False
    assert "no algorithm is selected" in panel.status_html
    buttons["direct"].value = True
    assert [work.algorithm for work in panel.controls.workloads()] == ["direct"]


def test_a_pinned_state_is_the_baseline_of_what_follows(
    panel: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervals, "BLOCK_S", 0.1)  # otherwise this takes twice 8 s
    with pytest.raises(RuntimeError, match="nothing is measured yet"):
        panel.pin()
    panel.start().wait(samples=12)
    panel.pin()
    panel.controls.lengths.value = "8192"
    until(lambda: "▲ B is slower" in panel.comparison_html)
    assert "lengths 256, 64 tokens" in panel.comparison_html
    assert drawn(panel)["B / A"].x[0] > 2
    panel.unpin()
    until(lambda: drawn(panel)["B / A"].x == (None,))
    assert panel.comparison_html == ""


def test_steps_add_to_what_was_measured_and_a_reset_forgets_it(
    panel: Explorer, lab: cpkit.Lab
) -> None:
    for count in (1, 2):
        panel.step()
        panel.wait(samples=count)
        until(lambda: "stopped" in panel.status_html, why="the step to end")
    until(lambda: lab.status().state == "idle", why="the workers to rest")
    assert [sample.sequence for sample in panel.samples] == [0, 1]
    assert f">{2 * panel.samples[0].iterations}</td>" in panel.summary_html, "gathers"
    panel.reset()
    assert panel.samples == []
    until(lambda: not panel.summary_html, why="an empty table")
    panel.start().wait(samples=2)
    panel.step()
    until(lambda: "stopped" in panel.status_html, why="the step to end")
    assert len(panel.samples) >= 3, "a step after a run adds to it"


def test_the_settings_measured_before_are_in_the_log(panel: Explorer) -> None:
    assert panel.log == ()
    panel.start().wait()
    panel.controls.cp_size.value = 2
    panel.wait()
    panel.start().wait()
    panel.controls.tensors.value = 1
    panel.wait()
    first, second = (measured.described for measured in panel.log)
    assert first.startswith("cp_size 4 · direct; zigzag, symmetric memory, lengths 256, 64 tokens")
    assert second.startswith("cp_size 2 · direct")
    assert second.endswith("2 tensors of 8×128 bfloat16")
    shown = panel._log_shown.value
    assert "Settings measured before: 2" in shown
    assert shown.index("cp_size 2") < shown.index("cp_size 4"), "newest first"


def test_each_sequence_of_a_small_batch_has_a_slider(panel: Explorer) -> None:
    lengths, sliders = panel.controls.lengths, panel.controls.each_length
    assert [slider.value for slider in sliders.children] == [256, 64]
    sliders.children[1].value = 100
    assert lengths.value == "256, 100"
    assert panel.controls.workloads()[0].lengths == (256, 100)
    lengths.value = "3*20000"
    assert [slider.value for slider in sliders.children] == [20000] * 3
    assert lengths.value == "3*20000", "it stays as it was written"
    for text in ("9*64", "64, x"):
        lengths.value = text
        assert sliders.children == ()
    lengths.value = "8*64"
    assert len(sliders.children) == 8
    shown = sliders.children
    lengths.value = "64"
    panel.close()
    assert all(slider.comm is None for slider in shown), "also those that were not shown"


@pytest.mark.parametrize("view", ["sizes", "cp sizes"])
def test_a_sweep_starts_from_the_present_setting(
    panel: Explorer, lab: cpkit.Lab, view: str
) -> None:
    panel.view.value = view
    assert "measured once per setting" in panel.panel.still().layout.title.subtitle.text
    panel.controls.algorithms.value = ("padded", "direct")
    panel.controls.tensors.value = 1
    panel.start().wait(samples=2)
    lines = drawn(panel)
    assert {*lines} == {"padded", "direct"}
    row = panel.controls.workloads()[0].row_bytes
    sizes = [row * (16 + 8), row * (64 + 16), row * (256 + 64), row * (1024 + 256)]
    assert list(lines["direct"].x) == (sizes if view == "sizes" else list(lab.cp_sizes))
    assert all(us > 0 for line in lines.values() for us in line.y)
    panel.controls.lengths.value = "17"
    panel.controls.strategy.value = "interleave"

    def swept() -> list[list[int]]:
        table = panel.panel.sweeps.get(view)
        return [] if table is None else table["lengths"].tolist()

    until(lambda: [17] in swept(), why="a sweep of the new setting")
    assert min(drawn(panel)["direct"].x) == (row * 8 if view == "sizes" else 1)


def test_a_sweep_that_is_refused_says_why(panel: Explorer) -> None:
    panel.view.value = "cp sizes"
    panel.controls.lengths.value = "7"  # too short for 4 ranks, not for 2
    panel.controls.cp_size.value = 2
    panel.start().wait(samples=2)
    assert "the shortest sequence has 7 tokens" in panel.panel.still().layout.title.subtitle.text


def test_the_views_show_tokens_bandwidth_and_pool(panel: Explorer) -> None:
    panel.controls.algorithms.value = ("direct", "plan")
    panel.start().wait()

    def shown(view: str, words: str) -> dict[str, Any]:
        panel.view.value = view
        until(lambda: words in style.text_alternative(panel.panel.still()))
        return drawn(panel)

    panel.controls.lengths.value = "257, 65, 19, 301"
    bars = shown("tokens", "Rows per rank: 162, 160, 160, 160")[None]
    assert list(bars.y) == pytest.approx([0, 2 / 162, 2 / 162, 2 / 162])
    panel.controls.lengths.value = "13, 9"
    tokens = shown("tokens", "2 of 24 slots are padding")
    assert tokens["padding"].hovertext[0].endswith("padding: no token")
    assert "rank 1, sequence 0, token" in tokens["rank 1"].hovertext[0]

    bandwidth = shown("bandwidth", "at most")
    total_bytes = panel.controls.workloads()[0].total_bytes
    assert f"({total_bytes:,} bytes)" in panel.panel.still().layout.title.text
    assert "no cost model is fitted" in panel.panel.still().layout.title.subtitle.text
    floor = next(trace for name, trace in bandwidth.items() if name.startswith("at most"))
    assert floor.x[0] > max(bandwidth["achieved (median)"].x)
    panel.panel.floor_us = 1e9  # as if other programs had delayed it: gathers are faster
    until(lambda: panel.panel.floor_us < 1e6)
    panel.stop()
    until(lambda: "stopped" in panel.status_html)
    medians_us = [summary.median_us for summary in panel.panel.summaries]
    achieved = shown("bandwidth", "at most")["achieved (median)"].x
    assert list(achieved) == pytest.approx([total_bytes / us / 1e3 for us in medians_us])
    panel.model = HostModel(Host(4, 1 << 25), {"plan": (100, 0, 0, 0, 0)})
    predicted = shown("bandwidth", "predicted plan")["the model's prediction"]
    assert list(predicted.y) == ["plan"]
    assert predicted.x[0] == pytest.approx(total_bytes / 100 / 1e3)

    panel.start()
    pool = shown("pool", "of an arena of")
    stats = panel._lab.pool.stats(4)
    assert list(pool["peak"].x) == pytest.approx(stats["peak_bytes"] / 1e6, abs=1e-3)


def test_the_code_measures_the_setting_of_the_controls(
    panel: Explorer, capsys: pytest.CaptureFixture[str]
) -> None:
    panel.controls.algorithms.value = ("padded_symm", "plan")
    panel.controls.strategy.value = "interleave"
    panel.controls.tensors.value = 1
    ran: dict[str, Any] = {}
    exec(panel.code, ran)
    assert ran["sample"].workload == panel.controls.workloads()[1]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["padded_symm", "plan"] * 10
    shown = ran["lab"].explore(**ran["setting"])
    assert shown.controls.workloads() == panel.controls.workloads()
    shown.close()
    ran["lab"].close()


def test_saved_samples_load_again(panel: Explorer, tmp_path: Path) -> None:
    panel.controls.algorithms.value = ("direct", "plan")
    panel.start().wait(samples=9)
    panel.stop()
    until(lambda: "stopped" in panel.status_html)
    samples = panel.samples
    assert len(samples) >= 2 * 9, "a stopped panel keeps what it measured"
    assert ">plan</th>" in panel.summary_html
    panel.pin()
    panel.save_json(tmp_path / "samples.json")
    panel.save_csv(tmp_path / "samples.csv")
    assert cpkit.load_samples(tmp_path / "samples.json") == tuple(samples)
    table = pd.read_csv(tmp_path / "samples.csv")
    assert table["algorithm"].tolist() == ["direct", "plan"] * (len(samples) // 2)
    assert np.allclose(table["time_us"], [sample.time_us for sample in samples])
    other = '{"format": "x", "version": "", "samples": []}'
    for text, words in (("{}", "has no samples"), (other, "'x'")):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            cpkit.load_samples(tmp_path / "other.json")


def test_pictures_and_a_trace_are_saved(
    panel: Explorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel.save_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["tid"] for event in events if event["ph"] == "X"} == {0, 1, 2, 3}
    if find_browser():
        panel.save_svg(tmp_path / "figure.svg")
        assert "Rows per rank" in (tmp_path / "figure.svg").read_text()
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")
    with pytest.raises(NoPicture, match="'/nowhere', which is not an executable"):
        panel.save_png(tmp_path / "figure.png")


def test_explore_shows_the_parameters_of_the_panel() -> None:
    shown = dict(inspect.signature(cpkit.Lab.explore).parameters)
    accepted = dict(inspect.signature(Explorer).parameters)
    del shown["self"], accepted["lab"]
    assert shown == accepted


def test_many_quick_changes_never_block_and_the_last_one_is_measured(panel: Explorer) -> None:
    panel.start()
    panel.wait()
    start_s = time.monotonic()
    for _ in range(10):
        for cp_size in (1, 2, 4, 2):
            panel.controls.cp_size.value = cp_size
    assert time.monotonic() - start_s < 1.0, "40 changes only submit 40 settings"
    assert panel.wait(samples=3).workload.cp_size == 2
    assert list(drawn(panel)["rows"].x) == ["rank 0", "rank 1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("64, x", "for example 4097, 812"),
        ("64, 3", "zigzag over 4 ranks"),
        ("9*999999999", "and the limit is"),
        ("1025*64", "at most 1024 sequences"),
    ],
)
def test_bad_input_stops_the_measurement_and_greys_what_is_shown(
    lab: cpkit.Lab, panel: Explorer, text: str, message: str
) -> None:
    panel.start()
    panel.wait()
    assert STALE not in panel._box._dom_classes
    panel.controls.lengths.value = text
    until(lambda: message in panel.status_html)
    assert "✗" in panel.status_html
    assert STALE in panel._box._dom_classes
    until(lambda: lab.status().state == "idle", why="nothing is measured under an error")
    panel.controls.lengths.value = "128"
    assert panel.wait().workload.lengths == (128,)
    assert STALE not in panel._box._dom_classes
    assert "✗" not in panel.status_html


def test_wait_raises_what_the_measurement_raised(panel: Explorer) -> None:
    panel.controls.lengths.value = "64, 3"
    panel.start()
    with pytest.raises(ValueError, match="zigzag over 4 ranks"):
        panel.wait()
    panel.controls.lengths.value = "128"
    panel.stop()
    with pytest.raises(RuntimeError, match="the panel is stopped: press Start"):
        panel.wait()
    with pytest.raises(ValueError, match="samples is 0; it must be 1 or more"):
        panel.wait(0)


@pytest.mark.parametrize("end", [Explorer.stop, Explorer.close])
def test_stop_and_close_end_a_wait(panel: Explorer, end: Callable[[Explorer], None]) -> None:
    panel.start().wait()
    timer = threading.Timer(0.3, end, [panel])
    timer.start()
    start_s = time.monotonic()
    with pytest.raises(RuntimeError, match="the panel is stopped"):
        panel.wait(samples=10_000)
    assert time.monotonic() - start_s < 5
    timer.join()


def test_an_untouched_panel_measures_once_per_second_until_it_is_touched(lab: cpkit.Lab) -> None:
    panel = Explorer(lab, lengths=[64], cp_size=2, interval_s=0.05, idle_after_s=1.5)
    panel.start().wait()
    until(lambda: "once per second" in panel.status_html)
    newest = panel._newest
    panel.wait(newest.count + 3)
    *_, before, last = newest._kept
    assert 0.9 < last.at_s - before.at_s < 3
    panel.panel.plot.plot_state._handle_custom_msg({"view": "a", "touched": True}, [])
    until(lambda: "● measuring" in panel.status_html)
    assert panel._newest is newest, "a touch keeps what was measured"
    sequences = [sample.sequence for sample in panel.samples]
    assert sequences == list(range(len(sequences))), "the rates share one numbering"
    until(lambda: "once per second" in panel.status_html)
    panel.controls.cp_size.value = 4
    assert not panel._presence.is_idle, "a new setting is a touch"
    panel.close()


def test_a_panel_that_no_page_shows_does_not_measure(lab: cpkit.Lab, panel: Explorer) -> None:
    def report(view: str, visible: bool) -> None:
        """Send what plot.js sends."""
        content = {"view": view, "visible": visible}
        panel.panel.plot.plot_state._handle_custom_msg(content, [])

    panel.start().wait()
    report("first", True)
    report("second", True)
    report("first", False)
    count = panel._newest.count
    panel.wait(count + 2)
    report("second", False)
    until(lambda: "no page shows" in panel.status_html)
    until(lambda: lab.status().state == "idle")
    panel.controls.lengths.value = "128"
    until(lambda: "lengths 128 tokens" in panel.panel.still().layout.title.subtitle.text)
    until(lambda: lab.status().state == "idle")
    assert panel.wait().workload.lengths == (128,), "a cell that waits counts as a page"
    until(lambda: "no page shows" in panel.status_html)
    panel.controls.lengths.value = "192"
    report("third", True)
    assert panel.wait().workload.lengths == (192,)


def test_a_stopped_panel_leaves_the_workers_idle(lab: cpkit.Lab) -> None:
    panel = Explorer(lab, lengths=[64], cp_size=4)
    panel.start().wait()
    panel.stop()
    until(lambda: "stopped" in panel.status_html)
    panel.controls.cp_size.value = 2
    until(
        lambda: len(drawn(panel)["rows"].x) == 2,
        why="the layout is drawn while the panel is stopped",
    )
    until(lambda: lab.status().state == "idle")
    panel.close()


def test_the_stepper_gathers_again(lab: cpkit.Lab) -> None:
    stepper = Stepper(lab, [13, 9], cp_size=4)
    stepper.wait(done=1)
    assert "→ reorder" in stepper.figure.layout.title.text
    stepper.algorithm.value = "direct"
    stepper.wait(done=2)
    assert stepper.figure.layout.title.text.endswith("shard → wire")
    stepper.algorithm.value = "plan"
    stepper.wait(done=3)
    assert stepper.figure.layout.title.text.endswith("shard → wire")
    stepper.cp_size.value = 2
    stepper.wait(done=4)
    names = [trace.name for trace in stepper.figure.data]
    assert names == ["rank 0", "rank 1"]
    stepper.close()
