"""Every exercise in a real kernel: the starter fails politely, mutants die, the solution passes."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from cpkit.notebook.build import SOURCES
from cpkit.notebook.rehearse import Outcome, main, rehearse
from cpkit.notebook.source import read

pytestmark = [pytest.mark.workers, pytest.mark.notebook, pytest.mark.slow, pytest.mark.timeout(240)]
PATHS = sorted(SOURCES.glob("*.py"))
each_source = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@functools.cache
def rehearsed(path: Path) -> tuple[list[Outcome], list[str]]:
    return rehearse(path)


@each_source
def test_starters_fail_mutants_die_and_solutions_pass(path: Path) -> None:
    outcomes, late = rehearsed(path)
    assert [outcome.fault for outcome in outcomes if outcome.fault] == []
    assert late == [], "every cell keeps to its budget"


@each_source
def test_every_exercise_was_tried_in_all_its_variants(path: Path) -> None:
    outcomes, _ = rehearsed(path)
    tried = {(o.cell, o.variant) for o in outcomes if o.variant}
    for name, exercise in read(path).exercises.items():
        variants = {"starter", "solution", *(f"mutant-{mutant}" for mutant in exercise.mutants)}
        assert {variant for cell, variant in tried if cell == f"{name}-check"} == variants


@each_source
def test_with_the_key_everything_is_predicted_and_solved(path: Path) -> None:
    outcomes, _ = rehearsed(path)
    progress = [o.text for o in outcomes if o.cell == "progress"]
    if read(path).exercises:
        assert progress, "a notebook ends with lesson.progress() in the cell `progress`"
        assert not {line[0] for line in progress[0].split("\n")} & set("✗≠○"), progress[0]


PLANTED = """# %% setup
from cpkit.notebook.lesson import Lesson
from cpkit.notebook.verdict import Score, Wrong

lesson = Lesson("planted")
lesson.ask("p", "What?", answer=1, why="Because.", wrong={})

def check(name, right):
    @lesson.exercise(name, "planted")
    def run(attempt):
        if not right(attempt()):
            raise Wrong("no")
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


def planted(name: str, starter: str, solution: str, mutant: str, right: str) -> str:
    return EXERCISE.format(
        name=name, starter=starter, solution=solution, mutant=mutant, right=right
    )


def test_each_kind_of_fault_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "09_planted.py"
    right = "lambda got: got == 1"
    path.write_text(
        PLANTED
        + planted("e1", "0", "1", "2", right)  # all as it should be
        + planted("e2", "1", "1", "2", right)  # the starter solves it
        + planted("e3", "0", "3", "2", right)  # the solution does not
        + planted("e4", "0", "1", "2", "lambda got: got > 0")  # the check is too weak
        + planted("e5", "0", "1", "2", "lambda got: gott == 1")  # the check itself is broken
    )
    outcomes, late = rehearse(path)
    faults = [outcome.fault for outcome in outcomes if outcome.fault]
    expected = [
        "p-reveal: with the answer key, ≠ you said 1; it is 5",
        "broken raised ZeroDivisionError",
        "e2-check starter: the check must say ✗, and said: ✓",
        "e3-check solution: the check must say ✓, and said: ✗",
        "e4-check mutant-wrong: the check must say ✗, and said: ✓",
        "e5-check starter raised NameError",
        "e5-check mutant-wrong raised NameError",
        "e5-check solution raised NameError",
    ]
    assert len(faults) == len(expected), faults
    for fault, begin in zip(faults, expected, strict=True):
        assert fault.startswith(begin)
    assert len(late) == 1
    assert late[0].startswith("cell late took ")
    assert main(["no such notebook"]) == 0, "nothing to rehearse is no fault"
    assert capsys.readouterr().out == ""
