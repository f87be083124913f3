"""Every exercise in a real kernel: starter and mutants fail their check, the solution passes.

Also with 2 ranks instead of 4, and as little shared memory for each as a container of 64 MB has for
4 ranks.

Slow: in `make test`, tests/lessons/test_notebooks.py runs the starters, test_lessons.py has the
checks, and test_gates.py shows that the rehearsal finds each kind of fault.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.processes import in_small_tmpfs
from tools.build import SOURCES
from tools.rehearse import CellResult, rehearse
from tools.source import read

pytestmark = [
    pytest.mark.workers,
    pytest.mark.notebook,
    pytest.mark.slow("runs every notebook once more, with solutions and mutants"),
    pytest.mark.timeout(600),
]
PATHS = sorted(SOURCES.glob("*.py"))
each_source = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)

REHEARSE = (sys.executable, "-m", "tools.rehearse")


@functools.cache
def rehearsed(path: Path) -> tuple[list[CellResult], list[str]]:
    return rehearse(path)


@each_source
def test_starters_and_mutants_fail_and_solutions_pass(path: Path) -> None:
    outcomes, late = rehearsed(path)
    assert [outcome.fault for outcome in outcomes if outcome.fault] == []
    assert late == [], "every cell stays within its budget, and shows its progress"


@each_source
def test_every_exercise_ran_in_all_its_variants(path: Path) -> None:
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


@each_source
def test_with_two_ranks_in_a_small_container_the_same_holds(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*in_small_tmpfs(tmp_path, 32), *REHEARSE, "--nproc=2", path.stem],
        env=os.environ | {"CPKIT_SHM_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 faults, " in done.stdout
    assert " 2 ranks" in done.stdout
