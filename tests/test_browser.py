"""What a newcomer does: open JupyterLab, run the three notebooks, move the slider.

A real JupyterLab, a real kernel, real workers, a real Chromium. The page is looked at through its
DOM and plotly's own data, not through screenshots.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpkit.notebook import source
from cpkit.notebook.build import NOTEBOOKS, SOURCES
from cpkit.notebook.show import find_browser
from tests.lab_server import JupyterLab, code_cells

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = find_browser()

pytestmark = [
    pytest.mark.workers,
    pytest.mark.notebook,
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome: apt-get install chromium"),
]
RUN_TIMEOUT_MS = 180_000
CHROMIUM_FLAGS = [
    "--no-sandbox",  # a container's root may not make one; the page is our own
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
LIVE_PLOT = "[...document.querySelectorAll('.js-plotly-plot')].find(p => p.layout.uirevision)"
STILL = "[...document.querySelectorAll('.js-plotly-plot')].filter(p => p.layout.uirevision)[1]"

NO_CELL_RUNS = """() =>
    ![...document.querySelectorAll('.jp-InputPrompt')].some(p => p.innerText.includes('*'))"""


@pytest.fixture(scope="module")
def lab() -> Iterator[JupyterLab]:
    home = Path(tempfile.mkdtemp(prefix="lab-"))
    server = JupyterLab(home)
    try:
        server.wait()
        yield server
    finally:
        server.stop()
        left = server.left_behind()
        shutil.rmtree(home, ignore_errors=True)
    assert not left, "kernels and workers end with the server"


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=BROWSER, args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser) -> Iterator[object]:
    """A page; every error that it reports fails the test."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    fresh = context.new_page()
    errors: list[str] = []
    fresh.on("pageerror", lambda error: errors.append(f"uncaught: {error}"))
    fresh.on(
        "console", lambda m: errors.append(f"{m.text} {m.location}") if m.type == "error" else None
    )
    yield fresh
    context.close()
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize("name", ["01_padding_and_reorg", "02_symmetric_memory"])
def test_a_notebook_runs_from_top_to_bottom(lab: JupyterLab, page, name: str) -> None:
    run_all(lab, page, name)
    plots = page.locator(".js-plotly-plot")
    assert plots.count() >= 3, "figures are live in the page"
    if name.startswith("02"):
        a_larger_arena_spills_less(page)
    shut_down_kernel(page)


def a_larger_arena_spills_less(page) -> None:
    """The live pool is still there after the whole notebook, and serves the requests again."""
    handle = page.locator(".arena-mb .noUi-handle")
    handle.scroll_into_view_if_needed()
    handle.focus()
    page.keyboard.press("End")
    titles = "[...document.querySelectorAll('.js-plotly-plot')].map(p => p.layout.title.text)"
    page.wait_for_function(f"() => {titles}.includes('0 of 9 requests spill')", timeout=30_000)


def test_the_slider_changes_the_plot(lab: JupyterLab, page) -> None:
    run_all(lab, page, "03_allgather_perf")
    page.wait_for_function(f"() => {LIVE_PLOT}?.data[2].y.length === 4", timeout=20_000)
    a_still_picture_keeps_its_axes(page)
    before = page.evaluate(f"{LIVE_PLOT}.layout.title.text")
    handle = page.locator(".cp-size .noUi-handle")
    handle.scroll_into_view_if_needed()
    handle.focus()
    page.keyboard.press("ArrowLeft")
    measured = (
        f"() => {{ const y = {LIVE_PLOT}.data[2].y; return y.length === 2 && y.every(t => t > 0) }}"
    )
    page.wait_for_function(measured, timeout=20_000)
    after = page.evaluate(f"{LIVE_PLOT}.layout.title.text")
    assert before.startswith("cp_size 4"), before
    assert after.startswith("cp_size 2"), after
    assert page.locator(".cpkit-ranks tr").count() == 3, "the table beside the plot says the same"
    times = page.evaluate(f"[...{LIVE_PLOT}.data[3].y]")
    page.wait_for_function(f"() => {LIVE_PLOT}.data[3].y.length > {len(times) + 3}", timeout=10_000)
    page.locator(".stop").click()
    page.get_by_text("○ stopped").wait_for(timeout=10_000)
    shut_down_kernel(page)


def a_still_picture_keeps_its_axes(page) -> None:
    """An open page takes data out of the widget's dict, once the kernel has time to hear of it."""
    cell = page.locator(".jp-Cell", has_text="panel.panel.still()")
    prompt = cell.locator(".jp-InputPrompt")
    before = prompt.inner_text()
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    # Not by "[*]", which may be gone before it is seen.
    playwright.expect(prompt).not_to_have_text(before, timeout=10_000)
    page.wait_for_function(NO_CELL_RUNS, timeout=30_000)
    names = page.evaluate(f"[{STILL}.data[2].x, {STILL}.data[4].y].map(names => [...names ?? []])")
    assert names == [[f"rank {rank}" for rank in range(4)], ["gather"]]


def test_a_learner_predicts_opens_hints_and_solves(lab: JupyterLab, page) -> None:
    name = "01_padding_and_reorg"
    run_all(lab, page, name)
    made = source.read(SOURCES / f"{name}.py")
    ids = [cell.id for cell in made.rendered()]
    cells = page.locator(".jp-Notebook .jp-Cell")

    def cell(id_: str):
        return cells.nth(ids.index(id_))

    def write(id_: str, text: str) -> None:
        cell(id_).locator(".cm-content").click()
        page.keyboard.press("Control+a")
        page.keyboard.insert_text(text)
        page.keyboard.press("Shift+Enter")

    def run_again(id_: str) -> None:
        cell(id_).locator(".cm-content").click()
        page.keyboard.press("Shift+Enter")

    write("waste-predict", 'lesson.predict("waste", 0)')
    cell("waste-predict").get_by_text("Written down: 0 of all slots.").wait_for(timeout=20_000)
    run_again("waste-reveal")
    cell("waste-reveal").get_by_text("you said 0 of all slots; it is 0.08333").wait_for()
    assert "do not divide evenly" in cell("waste-reveal").inner_text(), "what 0 overlooks"

    assert "not solved yet" in cell("e4-check").inner_text()
    hints = cell("e4-help").locator("summary")
    assert [hint.is_visible() for hint in hints.all()] == [True, False, False, False]
    hints.nth(0).click()
    assert [hint.is_visible() for hint in hints.all()] == [True, True, False, False]
    assert not cell("e4-help").locator("code", has_text="torch.cat").first.is_visible()
    write("e4", made.exercises["e4"].solution)
    run_again("e4-check")
    cell("e4-check").get_by_text("Exercise 4, strip the padding: solved").wait_for(timeout=20_000)
    run_again("progress")
    cell("progress").get_by_text("1 of 9 predicted, 1 of 8 solved").wait_for(timeout=20_000)
    shut_down_kernel(page)


def run_all(lab: JupyterLab, page, name: str) -> None:
    """Open a notebook as it is committed, run all cells by the menu, save, and look for errors."""
    # What an earlier test saved shows widgets of a kernel that is gone.
    shutil.copy(NOTEBOOKS / f"{name}.ipynb", lab.notebooks / f"{name}.ipynb")
    page.goto(lab.url(f"lab/tree/{name}.ipynb") + "&reset")
    page.get_by_text("| Idle").wait_for(timeout=60_000)
    page.locator(".jp-Notebook .jp-Cell").first.click()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".jp-InputPrompt", has_text="[*]").first.wait_for(timeout=10_000)
    page.wait_for_function(NO_CELL_RUNS, timeout=RUN_TIMEOUT_MS)
    page.keyboard.press("Control+s")
    cells = _saved(lab.notebooks / f"{name}.ipynb")
    failed = [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]
    assert not failed, json.dumps(failed, indent=1)
    said = page.locator(".jp-OutputArea-output[data-mime-type*=stderr]").all_inner_texts()
    # The live panel measures on: on a busy machine a cell that asks meanwhile says that it waits.
    assert not [text for text in said if not text.startswith("the workers are busy:")], said


def shut_down_kernel(page) -> None:
    """End the kernel by the menu; its workers end with it, and the next notebook starts its own."""
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_role("menuitem", name="Shut Down Kernel", exact=True).click()
    page.get_by_text("| No Kernel").or_(page.get_by_text("No Kernel")).first.wait_for(
        timeout=20_000
    )


def _saved(path: Path, timeout_s: float = 20.0) -> list[dict]:
    """The code cells of a notebook once it was saved after a full run."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(json.JSONDecodeError):  # it is being written
            cells = code_cells(json.loads(path.read_text()))
            if [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1)):
                return cells
        time.sleep(0.1)
    pytest.fail(f"{path.name} was not saved with all cells run; see its execution counts")
