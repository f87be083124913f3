"""The source of a notebook: its starters, solutions and mutants, and what it must not contain."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest

from tools import source
from tools.build import SOURCES

TEXT = '''# %% e1-task [markdown]
# ### Exercise 1 · Add

# %% e1
def add(a, b):
    """Sum."""
    # >>> your code
    #: total = 0
    #: return total
    return a + b
    # <<<

# %% e1-check
check(add)

# %% e1-mutant-minus
def add(a, b):
    return a - b

# %% e1-help [markdown]
# one
# ---
# two
# ---
# three
# ---
# because
'''


def write(tmp_path: Path, text: str = TEXT) -> Path:
    path = tmp_path / "09_test.py"
    path.write_text(text)
    return path


def test_one_source_gives_starter_and_solution(tmp_path: Path) -> None:
    made = source.read(write(tmp_path))
    starter, solution = (dict(_texts(made, solved)) for solved in (False, True))
    assert "    total = 0\n    return total\n" in starter["e1"]
    assert "a + b" not in starter["e1"]
    assert "    return a + b\n" in solution["e1"]
    assert starter.keys() == solution.keys() == {"e1-task", "e1", "e1-check", "e1-help"}
    assert [name for name in starter if starter[name] != solution[name]] == ["e1"]
    assert starter["e1-help"].count("<details>") == 4, "each hint is folded into the one before"
    assert "return a + b" in starter["e1-help"]
    assert "#:" not in starter["e1-help"] + starter["e1"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# %% e1-mutant-minus", "# %% minus", "exercise e1 needs the cells e1-mutant-NAME"),
        ("# %% e1-help [markdown]", "# %% helps [markdown]", "exercise e1 needs the cells e1-help"),
        ("    #: total = 0\n    #: return total\n", "", "needs a starter"),
        ("    return a + b\n    # <<<", "    # <<<", "a solution"),
        ("    # <<<", "", "one region from"),
        ("# two\n# ---\n", "", "three hints and the why"),
        ("# %% e1-check", "# %% e1", "every cell needs its own id"),
        ("# %% e1-check", "# %%", "every cell needs its own id"),
    ],
)
def test_a_source_that_lacks_something_is_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in TEXT
    with pytest.raises(ValueError, match=message):
        list(source.read(write(tmp_path, TEXT.replace(old, new))).rendered())


def _texts(made: source.Source, solved: bool):
    return [(cell.id, cell.text) for cell in made.rendered(solved=solved)]


@pytest.mark.parametrize("path", sorted(SOURCES.glob("*.py")), ids=lambda path: path.stem[:2])
def test_no_cell_reassigns_the_names_of_an_earlier_reveal(path: Path) -> None:
    """A learner may run a reveal again, alone and after later cells."""
    cells = [cell for cell in source.read(path).rendered() if cell.kind == "code"]
    for place, cell in enumerate(cells):
        read = names_of(cell.text, ast.Load) if cell.id.endswith("-reveal") else set()
        for later in cells[place + 1 :]:
            reused = read & names_of(later.text, ast.Store)
            assert not reused, f"{cell.id} reads {reused}, and {later.id} assigns it again"


@pytest.mark.parametrize("path", sorted(SOURCES.glob("*.py")), ids=lambda path: path.stem[:2])
def test_no_paragraph_becomes_a_list(path: Path) -> None:
    """A sentence that goes on with `1. ` at the start of a line is shown as a list of one item."""
    for cell in source.read(path).cells:
        numbers = re.findall(r"(?m)^(\d+)\. ", cell.text) if cell.kind == "markdown" else []
        starts = [place for place, number in enumerate(numbers) if number == "1"]
        for start, end in itertools.pairwise([*starts, len(numbers)]):
            assert end - start > 1, f"{cell.id} has a list of one item; wrap its text differently"
        assert bool(starts) == bool(numbers), f"{cell.id} has a list that does not begin with 1"


def names_of(code: str, context: type[ast.expr_context]) -> set[str]:
    """Return the names that the top-level code of a cell reads or assigns."""
    parts = [part for part in ast.parse(code).body if not isinstance(part, ast.FunctionDef)]
    nodes = [node for part in parts for node in ast.walk(part)]
    targets = [node.target for node in nodes if isinstance(node, ast.comprehension)]
    local = {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    local |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    names = (n for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, context))
    return {node.id for node in names} - local
