"""The committed notebooks: equal to their sources, readable on GitHub, and repeatable.

nbval runs each of them from top to bottom in a real kernel with real workers, and compares every
output that is not tagged `nbval-ignore-output`. A notebook holds the starters of its exercises;
tests/tools/test_rehearsal.py runs the solutions and the mutants.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import nbformat
import pytest

from cpkit.notebook.show import PLOTLY_MIME
from tests.helpers.notebook_gates import RUN_LIMIT_S, figure_faults, region_faults, rerun_faults
from tools import source
from tools.build import NOTEBOOKS, SOURCES, problems

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
EXERCISES = {  # at least
    "01": 8,
    "02": 8,
    "03": 7,
}
PANELS = ("Stepper(", "Explorer(", "PoolLive(")
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def test_there_are_three() -> None:
    assert [path.stem[:3] for path in PATHS] == ["01_", "02_", "03_"]


@each_notebook
def test_it_is_canonical_small_and_equal_to_its_source(path: Path) -> None:
    assert problems(path) == []
    nbformat.validate(nbformat.read(path, as_version=4))


@each_notebook
def test_it_holds_no_widget_state_and_no_machine_path(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert "widget-view" not in path.read_text()
    assert str(NOTEBOOKS) not in path.read_text()


@each_notebook
def test_every_figure_has_a_picture_a_title_units_and_a_text_alternative(path: Path) -> None:
    shown = [o.data for o in _outputs(path) if PLOTLY_MIME in o.get("data", {})]
    assert len(shown) >= 3
    assert [fault for data in shown for fault in figure_faults(data)] == []


@each_notebook
def test_starter_and_solution_differ_only_inside_the_region(path: Path) -> None:
    committed = {cell.id: cell.source for cell in nbformat.read(path, as_version=4).cells}
    assert region_faults(source.read(SOURCES / f"{path.stem}.py"), committed) == []


@each_notebook
def test_every_exercise_has_all_its_parts(path: Path) -> None:
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
        assert len(output.data["text/plain"].split("\n")) >= 2, (
            "a second line names the first fault"
        )


@each_notebook
def test_it_ran_in_order_without_error(path: Path) -> None:
    cells = _code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {(o.output_type, o.get("name")) for o in _outputs(path)}
    assert not {kind for kind in kinds if kind[0] == "error" or kind[1] == "stderr"}


@each_notebook
def test_its_cells_are_short(path: Path) -> None:
    cells = _code_cells(path)
    assert "lab = cpkit.connect()" in cells[0].source
    assert max(len(cell.source.splitlines()) for cell in cells) <= 15
    assert sum("assert " in cell.source for cell in cells) >= 6
    panels = sum(cell.source.count(name) for cell in cells for name in PANELS)
    assert panels <= 1, "one live panel per notebook: two would compete for the workers"


@each_notebook
def test_a_cell_can_run_again_after_later_sections(path: Path) -> None:
    """No section gives a new value to a name that another section's cells pass on."""
    bound, passed_on, section = defaultdict[str, set[str]](set), set[str](), ""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            section = cell.source.split("\n")[0]
        elif cell.cell_type == "code":
            names = _names(cell.source)
            passed_on |= {name for name, is_bound in names.items() if not is_bound}
            for name in (name for name, is_bound in names.items() if is_bound):
                bound[name].add(section)
    shared = {name for name, sections in bound.items() if len(sections) > 1}
    assert shared & passed_on == set()


def _names(source: str) -> dict[str, bool]:
    """Return the names in a cell, and whether the cell first binds them; not those of scopes."""
    scopes = (ast.FunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp)
    pending, first = list[ast.AST]([ast.parse(source)]), dict[str, bool]()
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.Name):
            first.setdefault(node.id, isinstance(node.ctx, ast.Store))
        inner = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Assign | ast.AugAssign | ast.For):  # the value is read first
            inner.sort(key=lambda child: isinstance(getattr(child, "ctx", None), ast.Store))
        pending[:0] = [] if isinstance(node, (*scopes, ast.GeneratorExp)) else inner
    return first


@pytest.mark.workers
@pytest.mark.notebook
@pytest.mark.timeout(RUN_LIMIT_S + 60)
@each_notebook
def test_a_second_run_gives_the_same_outputs(path: Path) -> None:
    faults = rerun_faults(path)
    assert not faults, "\n".join(faults)


def _code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def _outputs(path: Path) -> list[nbformat.NotebookNode]:
    return [output for cell in _code_cells(path) for output in cell.outputs]
