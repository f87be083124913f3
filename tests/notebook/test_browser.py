"""The live widgets and a learner's steps, in a real JupyterLab in a real Chromium.

One server, one browser, one page. A plot is judged by its points (tests/helpers/notebook_page.py),
never by a count of plots or by a screenshot.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cpkit
from cpkit.notebook.show import find_browser
from tests.helpers.lab_server import JupyterLab
from tests.helpers.live_widgets import LIVE_CELLS, MORTAL, WIDGETS, busy_loops
from tests.helpers.notebook_page import CHROMIUM_FLAGS, NotebookPage, drawn
from tests.helpers.processes import LIMIT_S, until
from tools import source
from tools.build import SOURCES
from tools.source import Cell

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = find_browser()

pytestmark = [
    pytest.mark.workers,
    pytest.mark.notebook,
    pytest.mark.browser,
    pytest.mark.timeout(180),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def server(lab: cpkit.Lab, runtime_dir: Path) -> Iterator[JupyterLab]:
    """A JupyterLab whose kernels use the session's workers."""
    home = Path(tempfile.mkdtemp(prefix="lab-"))
    started = JupyterLab(home, runtime_dir, "tests")
    try:
        started.wait()
        yield started
    finally:
        started.stop()
        left = started.left_behind()
        shutil.rmtree(home, ignore_errors=True)
    assert not left, "kernels end with the server"


@pytest.fixture(scope="module")
def browser_page(server: JupyterLab) -> Iterator[NotebookPage]:
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=BROWSER, args=CHROMIUM_FLAGS)
        page = chromium.new_page(viewport={"width": 1400, "height": 1000})
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.set_default_timeout(60_000)  # a page beside busy loops is slow
        yield NotebookPage(page, server)
        chromium.close()


@pytest.fixture
def notebook(browser_page: NotebookPage) -> Iterator[NotebookPage]:
    """The page. Every error that it reports fails the test."""
    with browser_page.without_errors():
        yield browser_page


@pytest.fixture
def live(notebook: NotebookPage) -> NotebookPage:
    """The notebook of the three live widgets, each of them shown."""
    if not notebook.runs:
        notebook.open("live", LIVE_CELLS)
        for cell in ("setup", *WIDGETS):
            notebook.run(cell)
    return notebook


def test_each_live_widget_shows_what_the_kernel_sent(live: NotebookPage) -> None:
    for widget in WIDGETS:
        plot = live.wait_for_plot(widget)
        assert plot["title"] in plot["label"], "the text alternative"
        assert 300 < plot["width"] <= 860


def test_a_control_changes_the_plot(live: NotebookPage) -> None:
    for widget, slider, key, such in (
        ("stepper", ".cp-size", "Home", lambda plot: "rank 3" not in plot["label"]),
        ("pool", ".arena-mb", "End", lambda plot: plot["title"] == "0 of 4 requests spill"),
    ):
        handle = live.cell(widget).locator(f"{slider} .noUi-handle")
        handle.focus()
        live.page.keyboard.press(key)
        live.wait_for_plot(widget, such=such)


SLIDERS = {  # what the figure says after the key →, after a click at the left end, and after n keys
    "cp_size": ("cp_size 4", "cp_size 1", 1, "cp_size 2"),
    "heads": ("16×128", "1×128", 3, "8×128"),
    "head_dim": ("8×192", "8×64", 1, "8×128"),
    "tensors": ("3 tensors", "1 tensor of", 1, "2 tensors"),
}
CHOICES = {  # what the figure says after the key ↓, and after the choice of an option
    "strategy": ("interleave", "contiguous", "contiguous"),
    "dtype": ("8×128 float16", "float32", "float32"),
    "preset": ("lengths 4096 tokens", "small: 64 tokens", "lengths 64 tokens"),
    "rows": ("8×128 bfloat16", "index keys of 128 bytes", "1 tensor of 1×128 float8_e4m3fn"),
}


def test_each_control_changes_the_figure_by_keyboard_and_by_mouse(live: NotebookPage) -> None:
    panel, keys = live.cell("panel"), live.page.keyboard

    def shows(words: str) -> None:
        def such(plot: dict[str, Any]) -> bool:
            is_measured = any(drawn(plot, "plan per rank")["y"])
            return is_measured and words in f"{plot['title']}; {plot['subtitle']}"

        live.wait_for_plot("panel", such=such)

    def click(handle: Any, fraction: float) -> None:
        rail = handle.locator("xpath=ancestor::*[contains(@class, 'noUi-base')]")
        rail.scroll_into_view_if_needed()
        track = rail.bounding_box()
        x = track["x"] + fraction * track["width"]
        live.page.mouse.click(x, track["y"] + track["height"] / 2)

    for name, (by_key, by_mouse, count, again) in SLIDERS.items():
        handle = panel.get_by_role("slider", name=name)
        handle.focus()
        keys.press("ArrowRight")
        shows(by_key)
        click(handle, 0)
        shows(by_mouse)
        handle.focus()
        for _ in range(count):
            keys.press("ArrowRight")
        shows(again)
    handle = panel.get_by_role("slider", name="sequence 1")
    handle.focus()
    keys.press("ArrowRight")
    shows("lengths 256, 65 tokens")
    click(handle, 0.5)
    live.until(lambda: handle.get_attribute("aria-valuetext") != "65", LIMIT_S, "it moves")
    shows(f"lengths 256, {handle.get_attribute('aria-valuetext')} tokens")
    for name, (by_key, option, by_mouse) in CHOICES.items():
        choice = panel.get_by_role("combobox", name=name)
        choice.focus()
        keys.press("ArrowDown")
        shows(by_key)
        choice.select_option(option)
        shows(by_mouse)
    panel.get_by_label("symmetric memory").click()
    shows("ordinary memory")
    table = panel.locator(".cpkit-ranks tr")
    live.until(lambda: table.count() == 4, LIMIT_S, "a head, a row per rank, and their skew")
    first = table.nth(1).inner_text()
    live.until(lambda: table.nth(1).inner_text() != first, LIMIT_S, "the table follows the times")
    live.run("panel")


def test_the_buttons_start_stop_step_and_reset(live: NotebookPage) -> None:
    panel = live.cell("panel")
    status, table = panel.locator(".cpkit-status"), panel.locator(".cpkit-algorithms")

    def press(name: str, *, mouse: bool) -> None:
        button = panel.get_by_role("button", name=name, exact=True)
        if mouse:
            button.click()
        else:
            button.focus()
            live.page.keyboard.press("Enter")

    for mouse in (False, True):
        press("Stop", mouse=mouse)
        live.until(lambda: "stopped" in status.inner_text(), LIMIT_S, "it stops")
        press("Reset", mouse=mouse)
        live.until(lambda: not table.count(), LIMIT_S, "the samples are forgotten")
        press("Step", mouse=mouse)
        live.until(table.count, LIMIT_S, "a step has samples")
        live.until(lambda: "stopped" in status.inner_text(), LIMIT_S, "the step has ended")
        press("Start", mouse=mouse)
        live.until(lambda: "● measuring" in status.inner_text(), LIMIT_S, "it measures")


def test_algorithms_are_selected_by_mouse_and_keyboard(live: NotebookPage) -> None:
    panel = live.cell("panel")

    button = panel.get_by_role("button", name=re.compile("^(✓ )?padded_symm$"))

    def shows(*names: str) -> None:
        plot = live.wait_for_plot("panel", such=lambda plot: drawn(plot, "wire")["y"] == [*names])
        for name in ("padded", "padded_symm", "direct", "plan"):
            assert any(drawn(plot, name)["y"]) is (name in names), name

    button.click()
    shows("padded_symm", "direct", "plan")
    ratios = live.wait_for_plot("panel", such=lambda p: drawn(p, "to the first algorithm")["x"][2])
    assert drawn(ratios, "to the first algorithm")["y"] == ["padded_symm", "direct", "plan"]
    table = panel.locator(".cpkit-algorithms")
    live.until(lambda: "×" in table.inner_text(), LIMIT_S, "the ratios are in the table")
    assert panel.locator(".cpkit-path", has_text="● symmetric").count() == 3
    assert "core" in panel.locator(".cpkit-contention").inner_text()
    panel.get_by_label("symmetric memory").focus()
    live.page.keyboard.press("Space")
    remedy = panel.locator(".cpkit-path", has_text="○ fallback").filter(has_text="tick")
    live.until(lambda: remedy.count() == 3, LIMIT_S, "each path has its reason and its remedy")
    live.page.keyboard.press("Space")
    button.focus()
    live.page.keyboard.press("Space")
    shows("direct", "plan")


def test_a_pinned_state_is_compared_with_what_follows(live: NotebookPage) -> None:
    panel = live.cell("panel")
    field, pin = panel.locator(".lengths input"), panel.locator("button.pin")
    lengths = field.input_value()
    live.run("scratch", "panel.wait(samples=12)")  # A needs 8 complete blocks, as B does
    pin.focus()
    live.page.keyboard.press("Enter")
    live.until(lambda: pin.inner_text() == "Unpin A", LIMIT_S, "the button unpins")
    field.fill("32768")  # a hundred times the rows: no noise hides the difference
    field.press("Enter")
    slower = panel.locator(".cpkit-baseline", has_text="▲ B is slower")
    live.until(slower.count, LIMIT_S, "a verdict on B against A")
    live.wait_for_plot("panel", such=lambda p: all(x and x > 1 for x in drawn(p, "B / A")["x"]))
    pin.click()
    live.wait_for_plot("panel", such=lambda p: not any(drawn(p, "B / A")["x"]))
    assert panel.locator(".cpkit-baseline").count() == 0
    field.fill(lengths)
    field.press("Enter")


def test_what_a_panel_shows_is_grey_under_an_error(live: NotebookPage) -> None:
    field = live.cell("panel").locator(".lengths input")
    shown = live.cell("panel").locator(".cpkit-shown").first
    lengths = field.input_value()
    for text, opacity in (("64, x", "0.35"), (lengths, "1")):
        field.fill(text)
        field.press("Enter")
        live.until(
            lambda wanted=opacity: shown.evaluate("x => getComputedStyle(x).opacity") == wanted,
            LIMIT_S,
            f"opacity {opacity} with lengths {text!r}",
        )


def test_two_views_of_one_widget_both_follow_it(live: NotebookPage) -> None:
    live.run("second-view")
    first = live.wait_for_plot("second-view", created_by="panel")
    for cell in ("panel", "second-view"):
        live.wait_for_plot(
            cell, created_by="panel", such=lambda plot: plot["revision"] > first["revision"] + 5
        )
    live.run("second-view", "pass")  # later tests replace the panel, and this view with it


def test_a_hidden_page_stops_the_measurement_and_a_shown_one_resumes_it(
    live: NotebookPage, lab: cpkit.Lab
) -> None:
    status = live.cell("panel").locator(".cpkit-status")
    live.until(lambda: "● measuring" in status.inner_text(), LIMIT_S, "the panel measures")
    live.show_page(False)
    live.until(lambda: "no page shows" in status.inner_text(), 10, "the status says why")
    live.until(lambda: lab.status().state == "idle", 10, "the workers rest")
    hidden = live.wait_for_plot("panel")
    live.show_page(True)
    live.wait_for_plot("panel", such=lambda plot: plot["revision"] > hidden["revision"])
    assert "● measuring" in status.inner_text()


@pytest.mark.slow("waits; test_explorer.py has the rates")
def test_an_untouched_panel_slows_down_until_it_is_touched(live: NotebookPage) -> None:
    live.run("scratch", "idle_s = 3")
    live.run("panel")
    status = live.cell("panel").locator(".cpkit-status")
    live.until(lambda: "once per second" in status.inner_text(), LIMIT_S, "the panel is idle")
    status.click()
    live.until(lambda: "● measuring" in status.inner_text(), LIMIT_S, "the full rate again")
    live.run("scratch", "idle_s = 120")
    live.run("panel")


def test_the_code_and_the_samples_can_be_taken_away(live: NotebookPage, tmp_path: Path) -> None:
    panel, page = live.cell("panel"), live.page
    live.until(panel.locator(".cpkit-path").count, LIMIT_S, "samples")
    panel.locator("button.take-code").focus()
    page.keyboard.press("Enter")
    live.until(
        lambda: "import cpkit" in panel.locator(".cpkit-taken").inner_text(), LIMIT_S, "code"
    )
    code = page.evaluate("navigator.clipboard.readText()")
    assert "lab.measure(**setting" in code
    assert "lengths=[256, 64]" in code
    for kind in ("csv", "json"):
        with page.expect_download() as taken:
            panel.locator(f"button.take-{kind}").click()
        assert taken.value.suggested_filename.endswith(f".{kind}")
        taken.value.save_as(tmp_path / kind)
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<svg")):
        with page.expect_download() as taken:
            panel.locator(f"button.take-{kind}").click()
        assert taken.value.suggested_filename.endswith(f".{kind}")
        taken.value.save_as(tmp_path / kind)
        assert (tmp_path / kind).read_bytes().startswith(start)
    assert "plan" in (tmp_path / "svg").read_text()
    assert {sample.algorithm for sample in cpkit.load_samples(tmp_path / "json")} == {
        "direct",
        "plan",
    }
    assert (
        (tmp_path / "csv")
        .read_text()
        .startswith("sequence,captured,size_bytes,count,type,algorithm")
    )


@pytest.mark.slow("waits for deadlines and a start; test_worker_hangs.py has the same faults")
def test_workers_that_hang_or_die_are_named_and_can_be_restarted(live: NotebookPage) -> None:
    live.run("scratch", "panel.stop()")
    live.run("mortal", MORTAL)
    panel = live.cell("mortal")
    status, banner = panel.locator(".cpkit-status"), panel.locator(".cpkit-banner")
    live.wait_for_plot("mortal", such=lambda plot: any(drawn(plot, "direct")["y"]))
    with cpkit.connect("mortal", launch=False) as other:
        pid = other.status().workers[1].pid

    os.kill(pid, signal.SIGSTOP)
    live.until(
        lambda: "A rank does not respond" in banner.inner_text(), LIMIT_S, "the rank is named"
    )
    assert f"process {pid}" in banner.inner_text()
    os.kill(pid, signal.SIGCONT)
    live.until(lambda: "● measuring" in status.inner_text(), LIMIT_S, "it measures again")
    live.until(lambda: not banner.inner_text(), LIMIT_S, "the banner is gone")

    os.kill(pid, signal.SIGKILL)
    alert = panel.get_by_role("alert")
    live.until(alert.count, LIMIT_S, "the banner")
    assert "Rank 1 has ended, with exit code -9 (SIGKILL)" in alert.inner_text()
    assert "last lines of its log" in alert.inner_text()
    assert "not measuring" in status.inner_text()
    dead = live.wait_for_plot("mortal")
    banner.get_by_role("button", name="Restart").focus()
    live.page.keyboard.press("Enter")
    live.wait_for_plot(
        "mortal",
        60,
        such=lambda p: p["revision"] > dead["revision"] and any(drawn(p, "direct")["y"]),
    )
    live.until(lambda: not banner.inner_text(), LIMIT_S, "the banner is gone")
    live.run("mortal", "mortal.close(); mortal._lab.stop(); del os.environ['CPKIT_DEADLINE_S']")
    for cell in ("mortal", "scratch"):
        live.run(cell, "pass")  # a later test runs all cells
    live.run("panel")


def test_views_are_chosen_by_keyboard(live: NotebookPage) -> None:
    panel = live.cell("panel")
    for view, title in (
        ("tokens", "Padded to one length"),
        ("bandwidth", "Bandwidth"),
        ("pool", "Symmetric pool"),
        ("sizes", "The batch at 1/16"),
        ("times", "cp_size 2"),
    ):
        panel.get_by_role("button", name=view, exact=True).focus()
        live.page.keyboard.press("Space")
        live.wait_for_plot("panel", such=lambda p, words=title: p["title"].startswith(words))


CONTROLS = {  # by role
    "button": {
        "Start",
        "Stop",
        "Step",
        "Reset",
        "Pin as A",
        "Copy code",
        "CSV",
        "JSON",
        "PNG",
        "SVG",
        "times",
        "pool",
        "sizes",
    },
    "slider": {"cp_size", "heads", "head_dim", "tensors", "sequence 0", "sequence 1"},
    "textbox": {"lengths"},
    "combobox": {"preset", "strategy", "rows", "dtype"},
    "checkbox": {"symmetric memory"},
}


def test_every_control_has_a_name_and_is_reached_by_keyboard(live: NotebookPage) -> None:
    panel = live.cell("panel").locator(".cpkit-live")
    live.wait_for_plot("panel")
    named = live.accessible(panel, {*CONTROLS})
    assert all(name for _, name in named), named
    for role, names in CONTROLS.items():
        assert names <= {name for kind, name in named if kind == role}, role
    heads = panel.get_by_role("slider", name="heads")
    assert heads.get_attribute("aria-valuetext") == "8", "not the option's number"
    direct = panel.get_by_role("button", name="✓ direct", exact=True)
    assert direct.get_attribute("aria-pressed") == "true"

    panel.get_by_role("button", name="padded", exact=True).focus()
    reached = []
    for _ in range(50):
        name = live.page.evaluate(
            "document.activeElement.ariaLabel || document.activeElement.labels?.[0]?.innerText"
            " || document.activeElement.innerText"
        )
        reached.append((name or "").strip())
        live.page.keyboard.press("Tab")
    assert set().union(*CONTROLS.values()) <= {*reached}, reached


def test_a_screen_reader_is_told_the_medians(live: NotebookPage) -> None:
    region = live.cell("panel").locator(".cpkit-spoken")
    assert region.get_attribute("role") == "status"
    medians = r"^Medians: direct [\d,]+ µs; plan [\d,]+ µs, .* of direct\."
    until(lambda: re.search(medians, region.inner_text()), why=region.inner_text)
    assert region.inner_text().endswith("Paths: direct symmetric, plan symmetric.")
    width = region.evaluate("region => region.getBoundingClientRect().width")
    assert width <= 1, "not visible"


@pytest.mark.slow("waits for two changes; test_a_screen_reader_is_told_the_medians has the text")
def test_a_screen_reader_is_told_the_medians_every_five_seconds(live: NotebookPage) -> None:
    times_s = (
        live.cell("panel")
        .locator(".cpkit-spoken")
        .evaluate(
            """region => new Promise(done => {
            const times = [];
            new MutationObserver(() => times.push(performance.now() / 1000)).observe(
                region, { subtree: true, childList: true, characterData: true });
            setTimeout(() => done(times), 11_500);
        })"""
        )
    )
    moments = [time_s for time_s in times_s if time_s - times_s[0] > 1]
    assert len(moments) >= 1, times_s
    assert all(time_s - times_s[0] > 4.5 for time_s in moments), times_s


def test_zoom_by_hand_survives_updates(live: NotebookPage) -> None:
    rows = live.cell("panel").locator(".js-plotly-plot .xy .nsewdrag, .nsewdrag[data-subplot=xy]")
    before = live.wait_for_plot("panel")
    rows.first.scroll_into_view_if_needed()
    box = rows.first.bounding_box()
    live.page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.2)
    live.page.mouse.down()
    live.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.8, steps=4)
    live.page.mouse.up()
    zoomed = live.wait_for_plot("panel", such=lambda plot: plot["range"] != before["range"])
    later = live.wait_for_plot("panel", such=lambda plot: plot["revision"] > zoomed["revision"] + 3)
    assert later["range"] == zoomed["range"]


def test_plots_are_zoomed_by_keyboard(live: NotebookPage) -> None:
    plot = live.wait_for_plot("panel")
    for name in ("Zoom in", "Reset axes"):
        live.cell("panel").get_by_role("button", name=name, exact=True).focus()
        live.page.keyboard.press("Enter")
        before = plot["range"]
        plot = live.wait_for_plot("panel", such=lambda p, old=before: p["range"] != old)


def test_plots_follow_the_theme_of_the_page(live: NotebookPage) -> None:
    named = "theme => document.body.dataset.jpThemeName === theme"
    paper = "getComputedStyle(document.body).getPropertyValue('--jp-layout-color0').trim()"
    seen = []
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        live.command("apputils:change-theme", theme=theme)
        live.page.wait_for_function(named, arg=theme)
        seen.append(live.page.evaluate(paper))
        for widget in WIDGETS:
            live.wait_for_plot(widget, such=lambda plot: plot["paper"] == seen[-1])
    assert seen[1] in ("white", "#fff", "#ffffff"), seen
    assert seen[0] != seen[1]


def test_a_cell_that_runs_again_replaces_its_widget(live: NotebookPage) -> None:
    counts = []
    for _ in range(2):
        live.run_all(*WIDGETS)
        for widget in WIDGETS:
            live.wait_for_plot(widget)
        live.run("count")
        counts.append(live.cell("count").locator(".jp-OutputArea-output").inner_text())
    assert counts[0] == counts[1], "threads and widgets do not grow"
    assert counts[0].count("cpkit-") >= len(WIDGETS), counts


def test_a_reloaded_page_shows_the_widgets_of_the_running_kernel(live: NotebookPage) -> None:
    live.reload()
    for widget in WIDGETS:
        live.wait_for_plot(widget)
    first = live.wait_for_plot("panel")
    live.wait_for_plot("panel", such=lambda plot: plot["revision"] > first["revision"])


TOUCH = """plot => new Promise(done => {
  const touchedAt = performance.now();
  const drawn = () => done(performance.now() - touchedAt);
  new MutationObserver(drawn).observe(plot, { attributeFilter: ["data-revision"] });
  plot.dispatchEvent(new KeyboardEvent("keydown", { bubbles: true }));
})"""


def test_a_touch_postpones_what_waits_and_ends_the_rest_of_the_page(live: NotebookPage) -> None:
    """The figure that waits shows the old setting, and that of the new one is drawn at once."""
    live.run("panel")
    live.wait_for_plot("panel")
    live.run("scratch", "panel.stop()")
    live.page.wait_for_timeout(500)
    live.page.evaluate("globalThis.cpkitRestUntil = performance.now() + 20_000")
    live.run("scratch", "panel.view.value = 'tokens'")
    drawn_ms = live.cell("panel").locator(".js-plotly-plot").evaluate(TOUCH)
    assert 190 < drawn_ms < 5_000, "after a short wait, and not after the 20 s"


def test_a_view_that_is_scrolled_away_rests(live: NotebookPage) -> None:
    live.run("scratch", "idle_s = 120")
    live.run("panel")
    live.wait_for_plot("panel")
    live.page.set_viewport_size({"width": 1400, "height": 500})
    live.cell("stepper").scroll_into_view_if_needed()
    live.page.wait_for_timeout(500)  # a drawing that has begun may end
    (away,) = live.plots("panel")
    live.page.wait_for_timeout(1500)
    assert live.plots("panel") == [away], "the panel measures on, and its view is as it was"
    live.wait_for_plot("panel", such=lambda plot: plot["revision"] > away["revision"] + 3)
    live.page.set_viewport_size({"width": 1400, "height": 1000})


def test_plots_do_not_need_the_messages_that_anywidget_drops(live: NotebookPage) -> None:
    """anywidget drops the messages of a model after two seconds; here at once."""
    live.page.evaluate("AbortSignal.limit = AbortSignal.timeout")
    live.page.evaluate("AbortSignal.timeout = ms => AbortSignal.limit(ms === 2000 ? 0 : ms)")
    for widget in WIDGETS:
        live.run(widget)
        live.wait_for_plot(widget)
    live.page.evaluate("AbortSignal.timeout = AbortSignal.limit")


@pytest.mark.slow("a second browser; tests/lab/test_sharing.py has several clients")
def test_two_browsers_share_the_workers(live: NotebookPage) -> None:
    other_cell = """other = Explorer(lab, [128], cp_size=4, algorithms=["padded"])
record(other, "other")
other.start()"""
    setup = next(cell for cell in LIVE_CELLS if cell.id == "setup")
    context = live.page.context.browser.new_context(viewport={"width": 1400, "height": 1000})
    other = NotebookPage(context.new_page(), live.lab, workspace="other")
    with other.without_errors():
        other.open("other", [setup, Cell("other", "code", other_cell)])
        for cell in ("setup", "other"):
            other.run(cell)
        for _ in range(2):  # both go on, each with its own setting
            shown = [live.wait_for_plot("panel"), other.wait_for_plot("other")]
            for page, cell, plot in ((live, "panel", shown[0]), (other, "other", shown[1])):
                newer = lambda p, old=plot: p["revision"] > old["revision"] + 2  # noqa: E731
                page.wait_for_plot(cell, such=newer)
            assert [len(drawn(plot, "rows")["y"]) for plot in shown] == [2, 4]
    context.close()


@pytest.mark.timeout(400)
@pytest.mark.slow("twelve displays beside busy loops; test_each_live_widget has one of each")
def test_twelve_displays_beside_busy_loops(live: NotebookPage) -> None:
    """Two fresh pages, and in each all cells run twice."""
    live.run("scratch", "idle_s = 1")  # the panels shown so far should not compete for the cores
    for _ in range(2):
        live.reload()
        with busy_loops(12):
            for _ in range(2):
                live.run_all(*WIDGETS)
                for widget in WIDGETS:
                    live.wait_for_plot(widget, 60)


def test_widgets_report_a_dead_kernel(live: NotebookPage) -> None:
    live.run("scratch", "idle_s = 120")
    live.run("panel")
    status = live.cell("panel").locator(".cpkit-status")
    live.wait_for_plot("panel")
    live.until(lambda: "● measuring" in status.inner_text(), LIMIT_S, "the panel measures")
    live.command("kernelmenu:restart")
    live.page.locator(".jp-Dialog .jp-mod-accept").click()
    for widget in WIDGETS:
        output = live.cell(widget)
        live.until(
            lambda output=output: "run this cell again" in output.inner_text(),
            LIMIT_S,
            f"{widget} reports that its kernel has ended",
        )
    assert "measuring" not in status.inner_text()
    live.until(lambda: live.page.evaluate("commandEnded"), LIMIT_S, "the kernel has restarted")
    live.wait_for_kernel()
    live.runs.clear()
    live.run("setup")
    live.run("panel")
    live.wait_for_plot("panel")
    assert "run this cell again" not in live.cell("panel").inner_text()
    live.cell("panel").locator(".stop").click()


@pytest.mark.slow("opens a second notebook; tests/lessons has its parts")
def test_a_learner_predicts_opens_hints_and_solves(notebook: NotebookPage) -> None:
    made = source.read(SOURCES / "01_padding_and_reorg.py")
    needed = ("connect", "setup", "waste-predict", "padding", "waste-reveal")
    needed += ("e4", "e4-check", "e4-help", "progress")
    notebook.open("lesson", [cell for cell in made.rendered() if cell.id in needed])
    for id_ in needed:
        if id_ != "e4-help":
            notebook.run(id_)
    text = {id_: notebook.cell(id_) for id_ in needed}

    notebook.run("waste-predict", 'lesson.predict("waste", 0)')
    assert "Written down: 0 of all slots." in text["waste-predict"].inner_text()
    notebook.run("waste-reveal")
    assert "You said 0 of all slots, it is 0.08333" in text["waste-reveal"].inner_text()
    assert "some hold fewer rows" in text["waste-reveal"].inner_text(), "what 0 overlooks"

    assert "not solved yet" in text["e4-check"].inner_text()
    hints = text["e4-help"].locator("summary")
    assert [hint.is_visible() for hint in hints.all()] == [True, False, False, False]
    hints.nth(0).click()
    assert [hint.is_visible() for hint in hints.all()] == [True, True, False, False]
    assert not text["e4-help"].locator("code", has_text="torch.cat").first.is_visible()
    notebook.run("e4", made.exercises["e4"].solution)
    notebook.run("e4-check")
    assert "Exercise 4, strip the padding: solved" in text["e4-check"].inner_text()
    notebook.run("progress")
    assert "1 of 10 predicted, 0 right; 1 of 8 solved" in text["progress"].inner_text()
