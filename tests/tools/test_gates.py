"""Every check of a notebook finds the fault that was planted for it.

    starter, solution, mutant or answer key that is wrong; a slow cell               rehearse
    starter and solution that differ outside the region                         region_faults
    a figure without picture, title, units or text alternative                  figure_faults
    another form, another source, too large                                  build.problems
    a cell over its budget when the notebook is built                                   build
    another result, a run that hangs, something left behind                      rerun_faults
    widget state, an error, a long cell, a starter that passes, a task without example
                                                                          test_notebooks.py

tests/tools/test_source.py has the faults of a source, test_figures.py those of a figure's code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from cpkit.notebook.show import PLOTLY_MIME
from tests.helpers.notebook_gates import figure_faults, region_faults, rerun_faults
from tests.lessons import test_notebooks as conditions
from tools import run, source
from tools.build import MAX_BYTES, NOTEBOOKS, SOURCES, build, canonical, check, problems
from tools.rehearse import main, rehearse

COMMITTED = min(NOTEBOOKS.glob("*.ipynb"))
MEND = "run `make notebooks`"
SLOW = pytest.mark.slow("runs a notebook that was planted; test_notebooks.py runs the real ones")

# ----------------------------------------------------------- starter, mutants, solution, answer key

PLANTED = """# %% setup
from cpkit_lessons.lesson import Lesson
from cpkit_lessons.feedback import Score, WrongAnswer

lesson = Lesson("planted")
lesson.ask("p", "What?", answer=1, why="Because.", wrong={})

def check(name, right):
    @lesson.exercise(name, "planted")
    def run(attempt):
        if not right(attempt()):
            raise WrongAnswer("no")
        return Score(1)
    return run

# %% p-predict
lesson.predict("p", ...)

# %% p-reveal
lesson.reveal("p", 5)

# %% late budget_s=0.001
import time
time.sleep(0.05)

# %% broken
1 / 0
"""
EXERCISE = """
# %% declare-{name}
check_{name} = check("{name}", {right})

# %% {name}-task [markdown]
# ### Exercise

# %% {name}
def attempt():
    # >>> your code
    #: return {starter}
    return {solution}
    # <<<

# %% {name}-check
check_{name}(attempt)

# %% {name}-mutant-wrong
def attempt():
    return {mutant}

# %% {name}-help [markdown]
# a
# ---
# b
# ---
# c
# ---
# d
"""


def exercise(name: str, starter: str, solution: str, mutant: str, right: str) -> str:
    return EXERCISE.format(
        name=name, starter=starter, solution=solution, mutant=mutant, right=right
    )


@pytest.mark.notebook
@pytest.mark.workers
def test_the_rehearsal_finds_each_kind_of_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "09_planted.py"
    right = "lambda got: got == 1"
    path.write_text(
        PLANTED
        + exercise("e1", "0", "1", "2", right)  # no fault
        + exercise("e2", "1", "1", "2", right)  # the starter is a solution
        + exercise("e3", "0", "3", "2", right)  # the solution is wrong
        + exercise("e4", "0", "1", "2", "lambda got: got > 0")  # the check is too weak
        + exercise("e5", "0", "1", "2", "lambda got: gott == 1")  # the check itself is broken
    )
    results, late = rehearse(path)
    faults = [result.fault for result in results if result.fault]
    expected = [
        "p-reveal: with the answer key, ≠ You said 1, it is 5.",
        "broken raised ZeroDivisionError",
        "e2-check starter: the check must show ✗; it shows ✓",
        "e3-check solution: the check must show ✓; it shows ✗",
        "e4-check mutant-wrong: the check must show ✗; it shows ✓",
        "e5-check starter raised NameError",
        "e5-check mutant-wrong raised NameError",
        "e5-check solution raised NameError",
    ]
    assert len(faults) == len(expected), faults
    for fault, begin in zip(faults, expected, strict=True):
        assert fault.startswith(begin)
    assert len(late) == 1
    assert late[0].startswith("cell late took ")
    assert main(["no such notebook"]) == 0, "no notebook, no fault"
    assert capsys.readouterr().out == ""


# ---------------------------------------------------- starter and solution, only inside the region


@pytest.mark.parametrize(
    ("cell", "old", "new", "fault"),
    [
        ("e1", "attempt()", "attempt(x=0)", "starter and solution differ outside of the region"),
        ("e1", "# <<<", "# <<<\n    # more", "starter and solution differ outside of the region"),
        ("e1", "return 0", "return 1", "the starter is the solution"),
        ("e1-check", "attempt", "print", "differs in the solved notebook"),
    ],
)
def test_a_difference_outside_of_the_region_is_named(
    tmp_path: Path, cell: str, old: str, new: str, fault: str
) -> None:
    path = tmp_path / "09_planted.py"
    path.write_text(exercise("e1", "0", "1", "2", "bool").lstrip())
    made = source.read(path)
    committed = {cell.id: cell.text for cell in made.rendered()}
    assert region_faults(made, committed) == []
    assert old in committed[cell]
    (found,) = region_faults(made, committed | {cell: committed[cell].replace(old, new)})
    assert found.startswith(cell)
    assert found.endswith(fault)


# ---------------------------------------------------------------------------------------- figures


def test_a_figure_that_lacks_something_is_named() -> None:
    cells = nbformat.read(COMMITTED, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    good = next(o.data for o in outputs if PLOTLY_MIME in o.get("data", {}))
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


# ----------------------------------------------------------------- the committed file and its form


def test_another_form_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = nbformat.read(COMMITTED, as_version=4)
    notebook.cells[0].metadata["collapsed"] = True
    copy = tmp_path / "copy.ipynb"
    nbformat.write(notebook, copy)
    assert check([copy]) == 1
    assert "copy.ipynb is not in canonical form" in capsys.readouterr().err


def test_another_source_is_named(tmp_path: Path) -> None:
    notebook = nbformat.read(COMMITTED, as_version=4)
    notebook.cells[1].source += " "
    notebook.cells[2].source += "!"
    copy = tmp_path / COMMITTED.name
    copy.write_text(canonical(notebook))
    assert problems(copy) == [f"{copy.name} differs from its source in src/: {MEND}"]


def test_a_notebook_that_is_too_large_is_neither_made_nor_accepted(tmp_path: Path) -> None:
    notebook = nbformat.read(COMMITTED, as_version=4)
    room = MAX_BYTES - len(canonical(notebook).encode())
    notebook.cells[0].source += "x" * room
    assert len(canonical(notebook).encode()) == MAX_BYTES, "this size is allowed"
    notebook.cells[0].source += "x"
    with pytest.raises(ValueError, match=f"has {MAX_BYTES + 1} bytes; {MAX_BYTES} are allowed"):
        canonical(notebook)
    copy = tmp_path / COMMITTED.name
    nbformat.write(notebook, copy)
    (problem,) = problems(copy)
    assert problem.startswith(f"{copy.name}: the notebook has {MAX_BYTES + 1} bytes")


def _pass_the_starter(cells: dict[str, Any]) -> None:
    cells["e1-check"].outputs[0].data["text/plain"] = "✓ Exercise 1: solved\n4 cases"


def _cut_pictures(cells: dict[str, Any]) -> None:
    for output in (o for cell in cells.values() for o in cell.get("outputs", []) if "data" in o):
        output.data.pop("image/png", None)


@pytest.mark.parametrize(
    ("condition", "plant"),
    [
        (conditions.test_every_figure_has_a_picture_a_title_units_and_a_text_alternative,
         _cut_pictures),
        (conditions.test_starter_and_solution_differ_only_inside_the_region,
         lambda cells: cells["e1"].update(source=cells["e1"].source + "\n# more")),
        (conditions.test_the_starter_fails_politely_in_the_committed_file, _pass_the_starter),
        (conditions.test_it_ran_in_order_without_error,
         lambda cells: cells["setup"].update(execution_count=7)),
        (conditions.test_it_ran_in_order_without_error,
         lambda cells: cells["setup"].outputs.append(nbformat.v4.new_output("error"))),
        (conditions.test_its_cells_are_short,
         lambda cells: cells["setup"].update(source="x = 1\n" * 16)),
        (conditions.test_its_cells_are_short,
         lambda cells: cells["setup"].update(source="Explorer(lab)")),
        (conditions.test_it_holds_no_widget_state_and_no_machine_path,
         lambda cells: cells["setup"].update(source=f"open({str(NOTEBOOKS)!r})")),
    ],
)  # fmt: skip
def test_a_condition_of_the_committed_file_finds_its_fault(
    tmp_path: Path, condition: Callable[[Path], None], plant: Callable[[dict[str, Any]], None]
) -> None:
    notebook = nbformat.read(COMMITTED, as_version=4)
    condition(COMMITTED)
    plant({cell.id: cell for cell in notebook.cells})
    copy = tmp_path / COMMITTED.name
    nbformat.write(notebook, copy)
    with pytest.raises(AssertionError):
        condition(copy)


@pytest.mark.parametrize("part", ["**Example** ", "**About** ", "**Why** ", "### Exercise 1 · "])
def test_an_exercise_without_one_of_its_parts_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    name = f"{COMMITTED.stem}.py"
    (tmp_path / name).write_text((SOURCES / name).read_text().replace(part, "", 1))
    monkeypatch.setattr(conditions, "SOURCES", tmp_path)
    with pytest.raises(AssertionError):
        conditions.test_every_exercise_has_all_its_parts(COMMITTED)


# ----------------------------------------------------------------------------------- run again


@SLOW
@pytest.mark.notebook
def test_a_cell_over_its_budget_is_not_built(tmp_path: Path) -> None:
    path = tmp_path / "09_planted.py"
    path.write_text("# %% late budget_s=0.001\nimport time\ntime.sleep(0.05)\n")
    with pytest.raises(
        ValueError, match=r"09_planted.py: cell late took .*; its budget is 0.001 s"
    ):
        build(path)


@SLOW
@pytest.mark.notebook
def test_a_cell_that_shows_nothing_for_long_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SILENCE_S", 1.0)
    path = tmp_path / "09_planted.py"
    steps = "import time\nfor step in range(8):\n    time.sleep(0.2)\n"
    path.write_text(f"# %% shows\n{steps}    print(step)\n# %% silent\n{steps}")
    (fault,) = rehearse(path)[1]
    assert re.fullmatch(r"cell silent shows nothing for [12]\.\d s; print its progress", fault)


def committed(path: Path, code: str, printed: str) -> Path:
    """Write a notebook with one cell and the output that it should have printed."""
    cell = nbformat.v4.new_code_cell(code, id="planted", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=printed)]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), path)
    return path


@SLOW
@pytest.mark.notebook
def test_another_result_and_what_is_left_behind_are_named(tmp_path: Path) -> None:
    leave = "from subprocess import Popen\nPopen(['sleep', '60'], start_new_session=True)"
    planted = committed(tmp_path / "planted.ipynb", f"{leave}\nprint(1 + 1)", "3\n")
    text, left = rerun_faults(planted, end_s=1)
    assert "1 failed" in text
    assert "mismatch 'stdout'" in text
    assert left.startswith("left behind: process ")
    assert left.endswith(": sleep 60")


@SLOW
@pytest.mark.notebook
def test_a_run_that_takes_too_long_is_ended_and_named(tmp_path: Path) -> None:
    slow = committed(tmp_path / "planted.ipynb", "import time\ntime.sleep(60)", "")
    text, *_ = rerun_faults(slow, limit_s=3, end_s=1)  # a killed nbval may leave its own files
    assert text.endswith("not done after 3 s")


def test_a_notebook_whose_cell_wrote_to_stderr_is_refused() -> None:
    notebook = nbformat.read(NOTEBOOKS / "01_padding_and_reorg.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text="Traceback\nOops\n"))
    with pytest.raises(ValueError, match=rf"cell {cell.id} wrote to stderr: Oops"):
        canonical(notebook)
