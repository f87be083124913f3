"""Lessons: predictions, exercises, the glossary, capabilities and the copy counter."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cpkit.control.launch_options import Launch
from cpkit.control.runtime_dir import Worker
from cpkit.processes import process_id
from cpkit.worker.main import _status as rank_0_status
from cpkit_lessons import capabilities, symmetric
from cpkit_lessons.copy_counter import CopyCounter
from cpkit_lessons.failure_lab import CASES, PostMortem, RankReport
from cpkit_lessons.feedback import Score, WrongAnswer
from cpkit_lessons.lesson import KEY_VARIABLE, Lesson
from cpkit_lessons.prediction import Prediction
from tests.helpers.cards import shown
from tools import glossary
from tools.build import NOTEBOOKS, SOURCES

MODULES = {"01": "padding", "02": "symmetric", "03": "performance"}
LESSONS = {
    path.stem: importlib.import_module(f"cpkit_lessons.{MODULES[path.stem[:2]]}").LESSON
    for path in sorted(SOURCES.glob("*.py"))
}
PREDICTIONS = [
    pytest.param(asked, id=f"{name[:2]}-{key}")
    for name, lesson in LESSONS.items()
    for key, asked in lesson.predictions.items()
]


# ------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("asked", PREDICTIONS)
def test_a_prediction_has_a_key_that_it_accepts(asked: Prediction) -> None:
    answer = asked.parse(asked.answer)
    assert asked.is_close(answer, answer)
    assert asked.question.endswith("?")
    assert asked.why.endswith((".", "!"))


@pytest.mark.parametrize("asked", PREDICTIONS)
def test_typical_wrong_answers_are_wrong_and_explained(asked: Prediction) -> None:
    assert asked.wrong, "name at least one typical wrong answer"
    for wrong in asked.wrong:
        guess = asked.parse(wrong)
        assert not asked.is_close(guess, asked.parse(asked.answer)), wrong
        assert len(asked.oversight(guess)) > 15, wrong
        asked.check_range(guess)  # a guess that is refused is never explained


@pytest.mark.parametrize("path", sorted(SOURCES.glob("*.py")), ids=lambda path: path.stem)
def test_every_prediction_is_asked_and_revealed_once_in_the_order_of_progress(path: Path) -> None:
    for call in ("predict", "reveal"):
        asked = re.findall(rf'^lesson\.{call}\("(\w+)"', path.read_text(), re.MULTILINE)
        assert asked == list(LESSONS[path.stem].predictions), call


@pytest.fixture
def lesson(monkeypatch: pytest.MonkeyPatch) -> Lesson:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    made = Lesson("test")
    made.ask("share", "How much?", answer=0.25, unit="of it", wrong={0.5: "Twice."}, why="So.")
    made.ask(
        "order", "Which first?", answer=("a", "b"), choices=("b", "a"), wrong={("b", "a"): "No."},
        why="A is first.",
    )  # fmt: skip
    return made


def test_an_open_prediction_says_what_to_write_and_hides_the_answer(lesson: Lesson) -> None:
    assert shown(lesson.predict, "share") == (
        "○ How much? Replace `...` with a number, and run this cell."
    )
    assert "a list of these names in order: 'b', 'a'" in shown(lesson.predict, "order", ...)
    text = shown(lesson.reveal, "share", 0.25)
    assert text.startswith("○ No prediction yet")
    assert "0.25" not in text


def test_a_prediction_is_recorded_and_revealed(lesson: Lesson) -> None:
    assert shown(lesson.predict, "share", 0.5) == "✎ Written down: 0.5 of it."
    assert shown(lesson.reveal, "share", 0.25).split("\n") == [
        "≠ You said 0.5 of it, it is 0.25 of it: 2 times too high.",
        "Twice.",
        "So.",
    ]
    for order in (["a", "b"], "a < b"):
        shown(lesson.predict, "order", order)
        assert shown(lesson.reveal, "order", ["a", "b"]).startswith(
            "✓ You said a < b, it is a < b: exact.\n"
        )


def test_a_verdict_says_how_far_a_guess_is_off() -> None:
    rank = Prediction("Which rank?", answer=2, why="So.")
    assert [rank.verdict(guess, 2.0) for guess in (2.0, 3.0)] == ["exact", ""]
    time = replace(rank, answer=2.0, unit="ms")
    guesses = {2.005: "exact", 2.1: "close enough, 5% off", 3.0: "1.5 times too high"}
    guesses |= {
        0.5: "4 times too low",
        2.6: "30% too high",
        1.5: "25% too low",
        0.0: "2 ms too low",
    }
    assert {guess: time.verdict(guess, 2.0) for guess in guesses} == guesses
    count = replace(rank, unit="rows")
    assert [count.verdict(guess, 2.0) for guess in (3.0, 0.0)] == ["1 too high", "2 too low"]
    assert "Replace `...` with a number in ms, and run" in time.invitation()


def test_a_guess_after_the_reveal_is_marked(lesson: Lesson) -> None:
    shown(lesson.predict, "share", 0.5)
    shown(lesson.reveal, "share", 0.25)
    shown(lesson.predict, "share", 0.25)
    assert "0.25 of it (changed after the reveal)" in shown(lesson.progress)


@pytest.mark.parametrize("guess", ["a lot", True, ["a"], [1, "a"], float("nan")])
def test_a_guess_of_the_wrong_kind_is_refused_politely(lesson: Lesson, guess: object) -> None:
    assert "is not a number: write a number" in shown(lesson.predict, "share", guess)
    refused = "is not possible: write a list of these names in order"
    assert refused in shown(lesson.predict, "order", guess)


def test_the_answer_key_replaces_a_learner(lesson: Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "1")
    assert shown(lesson.predict, "share", ...) == "✎ Written down: 0.25 of it."
    assert shown(lesson.predict, "share", 0.1) == "✎ Written down: 0.1 of it.", (
        "a guess overrides the key"
    )


def test_an_unknown_prediction_is_an_error(lesson: Lesson) -> None:
    with pytest.raises(
        ValueError, match="has no prediction 'waste'; its predictions are share, order"
    ):
        lesson.predict("waste", 1)


# --------------------------------------------------------------------------------- exercises


def exercise(lesson: Lesson):
    @lesson.exercise("e1", "double it")
    def check(double) -> Score:
        for number in range(3):
            if double(number) != 2 * number:
                raise WrongAnswer(f"double({number}) is {double(number)}; expected {2 * number}")
        return Score(3, {"kernels": (2, 1)})

    return check


def test_a_check_shows_its_score_or_the_first_fault(lesson: Lesson) -> None:
    check = exercise(lesson)
    assert shown(check, lambda n: n).endswith("not solved yet\ndouble(1) is 1; expected 2")
    assert "✗" in shown(lesson.progress)
    assert shown(check, lambda n: n + n).startswith("✓ Exercise 1, double it: solved\n3 cases; ker")
    assert "✓ | Exercise 1, double it | 3 cases; kernels: 2 (reference 1)" in shown(lesson.progress)


def test_a_solved_exercise_stays_solved(lesson: Lesson) -> None:
    check = exercise(lesson)
    shown(check, lambda n: n + n)
    text = shown(check, lambda n: n)
    assert "not solved by this code; your earlier solution counts" in text
    assert "✓ | Exercise 1, double it | 3 cases" in shown(lesson.progress)


def test_a_number_outside_its_range_is_refused_with_the_range(lesson: Lesson) -> None:
    lesson.ask("padding", "Which part?", answer=0.5, unit="of all", between=(0, 1), why="So.")
    assert "Replace `...` with a number from 0 to 1, and" in shown(lesson.predict, "padding")
    for guess in (1.5, -0.1):
        assert f"{guess} is not possible: write a number from 0 to 1" in (
            shown(lesson.predict, "padding", guess)
        )
    assert lesson.records["padding"].guess is None
    lesson.ask("rank", "Which rank?", answer=1, why="So.")
    lesson.ask("rate", "How fast?", answer=1.5, unit="GB/s", why="So.")
    for name, guess, form in (("rank", 2.5, "a whole number"), ("rate", -5, "a number in GB/s")):
        assert f"{guess} is not possible: write {form}" in shown(lesson.predict, name, guess)
    shown(lesson.predict, "padding", 1)
    assert "it is 1.5" in shown(lesson.reveal, "padding", 1.5), "a measured value may be odd"


def test_progress_counts_exercises_in_their_order(lesson: Lesson) -> None:
    for name in ("e10", "e2", "e1"):
        lesson.exercise(name, f"title of {name}")(lambda: Score(1))
    lines = shown(lesson.progress).split("\n")
    assert lines[0] == "0 of 2 predicted, 0 right; 0 of 3 solved"
    assert [line.split(",")[0] for line in lines[-3:]] == [
        "○ | Exercise 1", "○ | Exercise 2", "○ | Exercise 10"
    ]  # fmt: skip


def test_an_exception_of_the_attempt_is_one_line(lesson: Lesson) -> None:
    def broken(number):
        return [2 * number][number]

    text = shown(exercise(lesson), broken)
    assert "broken(1) raised IndexError: list index out of range (line " in text
    assert text.endswith("of the cell: `return [2 * number][number]`)")
    assert "takes 0 positional" in shown(exercise(Lesson("x")), lambda: 1)


def test_an_error_of_the_check_itself_is_not_shown_as_a_wrong_answer(lesson: Lesson) -> None:
    @lesson.exercise("e1", "broken check")
    def check(attempt) -> Score:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        check(len)


# ------------------------------------------------- glossary, capabilities and copy counter


def test_the_glossary_expands_its_terms() -> None:
    table = glossary.expand("before\n{glossary: rank order; token, row}\nafter")
    assert "| **rank order** | all rows of rank 0" in table
    assert table.endswith("|\nafter")
    with pytest.raises(ValueError, match="has no \\['warp'\\]"):
        glossary.expand("{glossary: warp}")
    text = "".join(path.read_text() for path in SOURCES.glob("*.py"))
    used = {word for line in re.findall(r"{glossary: (.+)}", text) for word in line.split("; ")}
    assert used == glossary.WORDS.keys()


@pytest.mark.parametrize(
    ("device", "devices", "name"),
    [
        ("cpu", ["cpu", "cpu"], "cpu"),
        ("cuda", ["cuda:0 A", "cuda:0 A"], "one_gpu"),
        ("cuda", ["cuda:0 A", "cuda:1 B"], "gpus"),
        ("cuda", ["cuda:0 A", "cuda:0 B"], "gpus"),  # each rank sees only its own
    ],
)
def test_the_capabilities_follow_from_the_devices_of_the_ranks(
    device, devices, name, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("cpkit.worker.main._describe_device", lambda: device)
    workers = tuple(Worker(rank, "here", process_id(), "", d) for rank, d in enumerate(devices))
    runtime_dir = SimpleNamespace(log_dir=tmp_path)
    status = rank_0_status(Launch(nproc=2), runtime_dir, workers, "ipc://s", 0, 1.0)
    assert status.gpus == {"cpu": 0, "one_gpu": 1, "gpus": 2}[name]
    found = capabilities.capabilities_of(status)
    assert found.name == name
    text = capabilities.describe(status)
    parts = [part for it in found.limitations for part in (it.what, it.why, it.instead)]
    assert all(part in text for part in parts)


def test_the_counter_counts_kernels_and_bytes() -> None:
    x = torch.zeros(10, 4)
    with CopyCounter() as counted:
        view = x[2:8].reshape(-1)
        out = torch.empty(10, 4)
        assert (counted.kernels, counted.bytes_written) == (0, 0), "views and allocations are free"
        out[:5].copy_(x[:5])
        assert (counted.kernels, counted.bytes_written) == (1, 80)
        torch.cat([x, out])
    assert (counted.kernels, counted.bytes_written) == (2, 80 + 320)
    assert view.numel() == 24
    with CopyCounter() as counted:
        out[torch.tensor([1, 2])] = x[:2]
    assert (counted.kernels, counted.bytes_written) == (1, 32), (
        "a scatter writes only the scattered rows"
    )


def test_every_lesson_belongs_to_a_notebook() -> None:
    assert [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))] == list(LESSONS)
    for name, lesson in LESSONS.items():
        assert lesson.name == name


@pytest.mark.parametrize(
    ("case", "symptom", "report"),
    [
        (
            "skips_the_rendezvous",
            "error after the deadline",
            RankReport(0, "BarrierTimeout", "waited 1.5 s at barrier 1", waited_s=1.5),
        ),
        (
            "receive_only",
            "fast path missed",
            RankReport(0, waited_s=0.07, paths={"nccl 2.28.9": "fallback"}),
        ),
    ],
)
def test_a_rule_that_fits_one_run_only_is_refused(
    case: str, symptom: str, report: RankReport
) -> None:
    """The other run of the check has the same symptom."""
    seen = [report, RankReport(1)]
    cards = {case: PostMortem(case, 1.5, tuple(seen))}
    cards |= {other: PostMortem(other, 1.5, ()) for other in CASES if other != case}

    def memorized(ranks: list[RankReport]) -> str:
        return case if sorted(ranks, key=lambda rank: rank.rank) == seen else "another cause"

    text = shown(symmetric.check_cause, memorized, cards)
    assert f"With another barrier and time: {symptom}" in text
    assert "at barrier 1" not in text
