"""The committed notebooks: what their sources say, seen without JavaScript, true when run again.

nbval runs each of them from top to bottom in a real kernel with real workers, and compares every
output that is not tagged `nbval-ignore-output`. It ends its kernel by SIGKILL, so what is left
afterwards shows whether workers really end with their owner. A notebook holds the starters of its
exercises; tests/test_rehearsal.py runs the solutions and the mutants.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import pytest

from cpkit.notebook import source
from cpkit.notebook.build import MAX_BYTES, NOTEBOOKS, SOURCES, canonical, check, complaints
from cpkit.notebook.show import PLOTLY_MIME

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
CELL_TIMEOUT_S = 60
RUN_TIMEOUT_S = 120  # of each of three: together at most six minutes
EXERCISES = {  # at least
    "01": 8,
    "02": 8,
    "03": 7,
}
PANELS = ("Stepper(", "Explorer(", "PoolLive(")
MEND = "run `make notebooks`"
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def test_there_are_three() -> None:
    assert [path.stem[:3] for path in PATHS] == ["01_", "02_", "03_"]


@each_notebook
def test_it_is_canonical_and_what_its_source_says(path: Path) -> None:
    assert complaints(path) == []
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size <= MAX_BYTES


def test_another_form_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = nbformat.read(PATHS[0], as_version=4)
    notebook.cells[0].metadata["collapsed"] = True
    copy = tmp_path / "copy.ipynb"
    nbformat.write(notebook, copy)
    assert check([copy]) == 1
    assert "copy.ipynb is not in canonical form" in capsys.readouterr().err


@each_notebook
def test_it_holds_no_widget_state_and_no_machine_path(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert "widget-view" not in path.read_text()
    assert str(NOTEBOOKS) not in path.read_text()


def test_another_source_is_noticed(tmp_path: Path) -> None:
    notebook = nbformat.read(PATHS[0], as_version=4)
    notebook.cells[1].source += " "
    notebook.cells[2].source += "!"
    copy = tmp_path / PATHS[0].name
    copy.write_text(canonical(notebook))
    assert complaints(copy) == [f"{copy.name} is not what its source in src/ says: {MEND}"]


@each_notebook
def test_every_figure_has_a_picture_a_title_units_and_words(path: Path) -> None:
    shown = [o.data for o in _outputs(path) if PLOTLY_MIME in o.get("data", {})]
    assert len(shown) >= 3
    assert [fault for data in shown for fault in figure_faults(data)] == []


def figure_faults(data: dict) -> list[str]:
    """What a displayed figure lacks: picture, title, units on its axes, text alternative."""
    layout = data[PLOTLY_MIME]["layout"]
    title = layout.get("title", {}).get("text", "")
    named = [axis for name, axis in layout.items() if name.startswith(("xaxis", "yaxis"))]
    traces = data[PLOTLY_MIME]["data"]
    lacks = {
        "a picture: GitHub shows no plotly": len(data.get("image/png", "")) > 5000,
        "a title": len(title) > 5,
        "a text alternative": data.get("text/plain", "").startswith(f"Figure: {title}. ")
        and len(data["text/plain"]) > len(title) + 40,
        "units": all(_says_what_it_is(axis, traces) for axis in named),
    }
    return [f"{title or 'a figure'} lacks {what}" for what, there in lacks.items() if not there]


def _says_what_it_is(axis: dict, traces: list[dict]) -> bool:
    """An axis has a title, or each of its ticks is a name, or the cells carry their own words."""
    named = axis.get("type") == "category" or "categoryarray" in axis or "ticktext" in axis
    names = named or any(t.get("orientation") == "h" or t["type"] == "heatmap" for t in traces)
    return bool(axis.get("title", {}).get("text")) or names


def test_a_figure_that_lacks_something_is_named() -> None:
    (good, *_) = [o.data for o in _outputs(PATHS[0]) if PLOTLY_MIME in o.get("data", {})]
    assert figure_faults(good) == []
    assert figure_faults({**good, "image/png": ""})[0].endswith("GitHub shows no plotly")
    assert "a text alternative" in figure_faults({**good, "text/plain": "Figure: "})[0]
    bare = json.loads(json.dumps(good[PLOTLY_MIME]))
    bare["layout"] |= {"title": {"text": ""}, "xaxis": {}}
    bare["data"] = [{"type": "scatter"}]
    faults = figure_faults({**good, PLOTLY_MIME: bare})
    assert [fault.split("lacks ")[1] for fault in faults] == [
        "a title",
        "a text alternative",
        "units",
    ]


@each_notebook
def test_starter_and_solution_differ_only_inside_the_region(path: Path) -> None:
    made = source.read(SOURCES / f"{path.stem}.py")
    committed = {cell.id: cell.source for cell in nbformat.read(path, as_version=4).cells}
    for cell in made.rendered(solved=True):
        if cell.part[1] != "code":
            assert cell.text == committed[cell.id]
            continue
        starter, solution = (source.split(text) for text in (committed[cell.id], cell.text))
        assert (starter[0], starter[2]) == (solution[0], solution[2])
        assert starter[1] != solution[1]


@each_notebook
def test_every_exercise_says_all_that_a_learner_needs(path: Path) -> None:
    exercises = source.read(SOURCES / f"{path.stem}.py").exercises
    assert list(exercises) == [f"e{n}" for n in range(1, len(exercises) + 1)]
    assert len(exercises) >= EXERCISES[path.stem[:2]]
    for number, exercise in enumerate(exercises.values(), start=1):
        assert exercise.task.startswith(f"### Exercise {number} · "), exercise.name
        for word in ("**Goal** ", "**Example** ", "**About** "):
            assert word in exercise.task, (exercise.name, word)
        assert re.search(r"\*\*About\*\* \d+ minutes, [★☆]{3}", exercise.task), exercise.name
        assert "**Why** " in exercise.help, exercise.name
        assert "**Another way** " in exercise.help, exercise.name
        assert len(exercise.mutants) >= 2, exercise.name


@each_notebook
def test_the_starter_fails_politely_in_the_committed_file(path: Path) -> None:
    checks = [cell for cell in _code_cells(path) if re.fullmatch(r"e\d+-check", cell.id)]
    for cell in checks:
        (output,) = cell.outputs
        assert output.data["text/plain"].startswith("✗ Exercise "), cell.id
        assert len(output.data["text/plain"].split("\n")) >= 2, "it says what is wrong first"


@each_notebook
def test_it_ran_in_order_without_error(path: Path) -> None:
    cells = _code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {(o.output_type, o.get("name")) for o in _outputs(path)}
    assert not {kind for kind in kinds if kind[0] == "error" or kind[1] == "stderr"}


@each_notebook
def test_it_reads_well(path: Path) -> None:
    cells = _code_cells(path)
    assert "lab = cpkit.connect()" in cells[0].source
    assert max(len(cell.source.splitlines()) for cell in cells) <= 15
    assert sum("assert " in cell.source for cell in cells) >= 6
    panels = sum(cell.source.count(name) for cell in cells for name in PANELS)
    assert panels <= 1, "a FigureWidget brings 5 MB to the page"


@pytest.fixture
def surroundings() -> Iterator[dict[str, str]]:
    """An environment in which all that a run leaves behind can be found. Checks it afterwards."""
    home = Path(tempfile.mkdtemp(prefix="nb-"))
    shm = Path(
        tempfile.mkdtemp(prefix="nb-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    )
    (home / "tmp").mkdir()
    private = {
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
        "TMPDIR": str(home / "tmp"),
        "CPKIT_SHM_DIR": str(shm),
    }
    try:
        yield os.environ | private
        left = _wait_for_end(home, shm)
    finally:
        for process in _processes_of(home):
            process.kill()
        shutil.rmtree(home)
        shutil.rmtree(shm)
    assert not left


@pytest.mark.workers
@pytest.mark.notebook
@pytest.mark.slow
@pytest.mark.timeout(RUN_TIMEOUT_S + 60)
@each_notebook
def test_it_is_true_when_run_again(path: Path, surroundings: dict[str, str]) -> None:
    options = ["--nbval", "--nbval-current-env", f"--nbval-cell-timeout={CELL_TIMEOUT_S}"]
    quiet = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "--timeout=0"]
    command = [sys.executable, "-m", "pytest", *options, *quiet, str(path)]
    code, text = _run(command, surroundings)
    assert code == 0, text
    assert f"{len(_code_cells(path))} passed" in text


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run in a session of its own, at most RUN_TIMEOUT_S; the exit code and all output."""
    with subprocess.Popen(
        command,
        env=environment,
        cwd=NOTEBOOKS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            text, _ = process.communicate(timeout=RUN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text = process.communicate()[0] + f"\nnot done after {RUN_TIMEOUT_S} s"
    return process.returncode, text


def _wait_for_end(home: Path, shm: Path, timeout_s: float = 10.0) -> list[str]:
    """What is still there after a while: processes, shared memory, sockets and connection files."""
    deadline = time.monotonic() + timeout_s
    while (left := _left_behind(home, shm)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _left_behind(home: Path, shm: Path) -> list[str]:
    processes = [f"process {p.pid}: {' '.join(p.cmdline())}" for p in _processes_of(home)]
    sockets = [str(path) for path in (home / "tmp").iterdir()]
    connections = [str(path) for path in (home / "runtime").rglob("connection.json")]
    return processes + sockets + connections + [str(path) for path in shm.iterdir()]


def _processes_of(home: Path) -> list[psutil.Process]:
    """Processes that were started with our runtime directory in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("JUPYTER_RUNTIME_DIR") == str(home / "runtime"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def _outputs(path: Path) -> list[nbformat.NotebookNode]:
    return [output for cell in _code_cells(path) for output in cell.outputs]
