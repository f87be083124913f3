"""Checks that need no workers reject every broken variant, and accept the solution.

tests/tools/test_rehearsal.py does this for all exercises, in a kernel with workers.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch

from cpkit import doctor
from cpkit_lessons import feedback, guard, padding, performance, symmetric
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
    lesson.LESSON.records[name].passed = None
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


# ------------------------------------------------------------------------- odd and endless code

ODD = (
    "x", float("nan"), -1, 10**30, object(), [], {}, (1, 2), [[1], [2]], {object()},
    (object(), object()), (torch.tensor([1.0, 2.0]), 1.0), {"pad": torch.tensor([1, 2])},
    torch.tensor([1, 2]), np.array([1, 2]), torch.zeros(2, 2, 8, dtype=torch.bfloat16),
)  # fmt: skip
PROGRAMS = ("check_exchange", "check_signals", "check_pull_gather")
NEED_MORE = ("check_price", "check_cause", "check_order")  # workers, post-mortems, a list
CHECKS = [
    pytest.param(getattr(lesson, name), id=name)
    for lesson in (padding, symmetric, performance)
    for name in dir(lesson)
    if name.startswith("check_") and name not in NEED_MORE
]
each_check = pytest.mark.parametrize("check", CHECKS)


def shown(check: Callable[..., None], attempt: object) -> str:
    """Return the text that a check shows for an attempt."""
    with mock.patch.object(feedback, "display") as display:
        check(attempt)
    text: str = display.call_args[0][0]["text/plain"]
    return text


@each_check
@pytest.mark.parametrize("number", range(len(ODD)))
def test_an_odd_value_is_a_wrong_answer_and_not_a_traceback(check, number: int) -> None:
    def attempt(*_: object) -> object:
        return ODD[number]

    def program(*_: object) -> Iterator[object]:
        yield ODD[number]

    assert shown(check, attempt).startswith("✗")
    assert shown(check, program).startswith("✗")


@each_check
def test_another_number_of_arguments_is_a_wrong_answer(check) -> None:
    assert "takes 0 positional arguments" in shown(check, lambda: 0)


@each_check
def test_a_name_that_holds_no_function_is_a_wrong_answer(check) -> None:
    assert "is 3; it must be a function (`def " in shown(check, 3)


@each_check
def test_a_missing_return_is_named(check) -> None:
    is_program = check.__name__ in PROGRAMS
    wanted = "has no `yield`" if is_program else "returned None. Is a `return` missing?"
    assert wanted in shown(check, lambda *_: None)


@pytest.mark.parametrize("verdict", ["seven", [], 2, torch.tensor([True, True])])
def test_a_verdict_of_another_kind_is_not_taken_for_true_or_false(verdict: object) -> None:
    assert "accepts returned" in shown(padding.check_accepts, lambda *_: verdict)


def test_a_step_without_yield_is_named_before_the_deadlock_that_it_causes() -> None:
    def exchange(me):
        for number in me.rounds:
            for peer in me.peers:
                yield me.put(peer, number)
                me.signal(peer, "full")
            for peer in me.peers:
                yield me.wait(peer, "full")
                yield me.read(peer, number)

    def pull_gather(me, shard, out, tokens):
        yield me.store(shard)
        yield me.barrier()
        for peer in me.all_ranks:
            out[tokens[peer]] = me.load(peer, len(tokens[peer]))
        yield me.barrier()

    lost = "`me.signal(peer, 'full')` without `yield` has no effect"
    assert lost in shown(symmetric.check_signals, exchange)
    lost = "`me.load(peer, len(tokens[peer]))` without `yield` has no effect"
    assert lost in shown(symmetric.check_pull_gather, pull_gather)


@pytest.mark.timeout(20)
@each_check
def test_an_endless_loop_is_a_wrong_answer_that_names_the_case(
    check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "LIMIT_S", 0.15)
    before = signal.getsignal(signal.SIGALRM)

    def endless(*_: object) -> None:
        while True:
            try:
                time.sleep(0.001)
            except Exception:  # noqa: BLE001 - what stops it must not be caught by mistake
                continue

    def endless_program(*_: object) -> Iterator[None]:
        endless()
        yield

    is_program = check.__name__ in PROGRAMS
    attempt = endless_program if is_program else endless
    text = shown(check, attempt)
    assert f"{attempt.__name__}(" in text
    assert "has not ended after 0.15 s (line " in text
    assert "Is there an endless loop?" in text
    assert signal.getsignal(signal.SIGALRM) == before


def test_a_slow_check_of_quick_calls_is_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LIMIT_S", 0.2)
    quick = guard.guarded(lambda: 1)
    assert callable(quick)
    with guard.time_limit():
        for _ in range(5):
            assert quick() == 1
            time.sleep(0.1)  # the check's own work


@pytest.mark.parametrize("inside_s", [0.05, 0.6])
def test_another_timer_of_the_process_still_rings(inside_s: float) -> None:
    rings = threading.Event()
    before = signal.signal(signal.SIGALRM, lambda *_: rings.set())
    left_s, _ = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with guard.time_limit():
            time.sleep(inside_s)
        assert rings.wait(5)
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left_s)


@pytest.mark.parametrize("order", [None, "x", [True, "x"], [object()], [torch.tensor([1, 2])], [2]])
def test_an_order_of_other_things_is_a_wrong_answer(order: object) -> None:
    assert shown(symmetric.check_order, order).startswith("✗")


def test_any_kind_of_set_says_which_blocks_are_free() -> None:
    def frozen(released: list[set[int]], _me: int) -> frozenset[int]:
        return frozenset(released[0]).intersection(*released)

    assert shown(symmetric.check_may_free, frozen).startswith("✓")


def test_rank_1_may_be_the_fast_one_as_the_help_says() -> None:
    assert shown(symmetric.check_order, (0, 0, 0, 1, 1, 1, *[1] * 4, 0, 0)).startswith("✓")
