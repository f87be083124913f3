"""Checks that need no workers reject every broken variant, and accept the solution.

tests/tools/test_rehearsal.py does this for all exercises, in a kernel with workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from unittest import mock

import pytest

from cpkit_lessons import feedback, padding
from tools.build import SOURCES
from tools.source import read

EXERCISES = (("01_padding_and_reorg", "e7", padding, "accepts"),)


def variants() -> Iterator[object]:
    for notebook, name, lesson, function in EXERCISES:
        exercise = read(SOURCES / f"{notebook}.py").exercises[name]
        attempts = {"starter": exercise.starter, **exercise.mutants, "solution": exercise.solution}
        for variant, code in attempts.items():
            wanted = variant == "solution"
            yield pytest.param(
                lesson, name, function, code, wanted, id=f"{notebook[:2]}-{name}-{variant}"
            )


def passes(lesson: ModuleType, name: str, attempt: Callable[..., object]) -> bool:
    """Run the check of an exercise on a solution, as a notebook does."""
    check = getattr(lesson, f"check_{attempt.__name__}")
    with mock.patch.object(feedback, "display"):
        check(attempt)
    passed = lesson.LESSON.records[name].passed
    assert passed is not None
    return passed


@pytest.mark.parametrize(("lesson", "name", "function", "code", "wanted"), list(variants()))
def test_a_check_accepts_the_solution_only(
    lesson: ModuleType, name: str, function: str, code: str, wanted: bool
) -> None:
    space: dict[str, Callable[..., object]] = {}
    exec(code, space)
    assert passes(lesson, name, space[function]) is wanted
