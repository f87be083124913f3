"""Checks that need no workers reject every broken variant, and accept the solution.

tests/tools/test_rehearsal.py does this for all exercises, in a kernel with workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from unittest import mock

import pytest

from cpkit import doctor
from cpkit_lessons import feedback, padding, symmetric
from cpkit_lessons.symmetric.allocation import wanted_path
from tools.build import SOURCES
from tools.source import read

EXERCISES = (
    ("01_padding_and_reorg", "e7", padding, "accepts"),
    ("02_symmetric_memory", "e6", symmetric, "fast_path"),
)


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


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        ((2, 26, 5), "fallback"),
        ((2, 27, 7), "sound"),
        ((2, 28, 0), "racy"),
        ((2, 28, 9), "racy"),
        ((2, 29, 7), "racy"),
        ((2, 30, 4), "racy"),
        ((2, 30, 7), "sound"),
    ],
)
def test_exercise_6_and_doctor_agree_on_the_race(
    version: tuple[int, ...], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = [("attn_cp", 4096)] * 2
    assert wanted_path(version, registered, registered)[0] == wanted
    monkeypatch.setattr(doctor.dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(doctor, "loaded_nccl_version", lambda: version)
    monkeypatch.setattr(doctor, "settings_of_this_process", lambda: None)
    monkeypatch.setattr(doctor, "window_problem", lambda _: "")
    names = [check.subject for check in doctor._nccl()]
    assert ("NCCL race" in names) is (wanted == "racy")


def test_sending_in_place_takes_the_fast_path_and_receiving_at_other_offsets_does_not() -> None:
    same: list[tuple[str, int] | None] = [("attn_cp", 4096)] * 2
    in_place: list[tuple[str, int] | None] = [("attn_cp", 4096), ("attn_cp", 8192)]
    for version in ((2, 27, 7), (2, 28, 9), (2, 29, 7), (2, 30, 7)):
        assert wanted_path(version, in_place, same)[0] != "fallback"
        assert wanted_path(version, same, in_place)[0] == "fallback"
