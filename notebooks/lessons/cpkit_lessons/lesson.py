"""The predictions and exercises of one notebook, and the learner's results.

    begin(lab)                  let the questions follow the ranks and the memory of a lab
    predict("waste", 0.33)      record the learner's answer
    reveal("waste", measured)   show the guess and the measured value, and explain
    check_owner(owner)          check an exercise: ✓ with a score, or ✗ with the first fault
    progress()                  show all results in one table

A wrong or missing answer never raises, so a notebook always runs to its end. With
CPKIT_ANSWER_KEY=1 an open prediction takes the correct answer.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Any

from cpkit.lab import Lab
from cpkit_lessons import capabilities, feedback, guard, missing_names
from cpkit_lessons.feedback import Score, WrongAnswer
from cpkit_lessons.measured import Order
from cpkit_lessons.prediction import Answer, Measured, Prediction
from cpkit_lessons.world import World, world_of

KEY_VARIABLE = "CPKIT_ANSWER_KEY"
Check = Callable[..., Score]
Question = Callable[[World], Prediction]


@dataclass
class Record:
    """The learner's result in one prediction or exercise."""

    title: str
    guess: Answer | None = None
    measured: Measured | None = None
    changed_after_reveal: bool = False
    passed: bool | None = None  # None: not tried
    score: str = ""


@dataclass
class Lesson:
    """The predictions and exercises of one notebook, in the order in which they are declared."""

    name: str
    predictions: dict[str, Prediction] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    world: World = field(default_factory=World)
    questions: dict[str, Question] = field(default_factory=dict)  # those that depend on the world

    def ask(self, key: str, question: str, **options: Any) -> None:
        """Declare a prediction; for the options see `Prediction`."""
        assert key not in self.records, f"{key} is declared twice"
        self._declare(key, Prediction(question, **options))

    def asks(self, question: Question) -> Question:
        """Declare a prediction that depends on the world; decorates a function of that name."""
        key = question.__name__
        assert key not in self.records, f"{key} is declared twice"
        self.questions[key] = question
        self._declare(key, _asked(question, self.world))
        return question

    def begin(self, lab: Lab) -> World:
        """Let the questions follow the ranks of a lab, and the memory there is.

        Raises ValueError if the workers cannot form a group of 2, 4 or 8 ranks.
        """
        status = lab.status()
        self.follow(world_of(status))
        print(f"{capabilities.describe(status)}\n{self.world}")  # noqa: T201 - a cell's output
        return self.world

    def follow(self, world: World) -> None:
        """Ask the questions of a world; the same world again keeps the learner's answers."""
        if world == self.world:
            return
        self.world = world
        for key, question in self.questions.items():
            self._declare(key, _asked(question, world))

    def explain_missing_names(self) -> None:
        """Let a cell that needs an earlier one say which section to run first."""
        missing_names.explain(self.name)

    def _declare(self, key: str, asked: Prediction) -> None:
        self.predictions[key] = asked
        self.records[key] = Record(asked.question)

    def predict(self, key: str, guess: Answer | EllipsisType | None = ...) -> None:
        """Record a guess: a number, a name, or names in order; `...` leaves it open.

        Raises ValueError for a key that this lesson does not have.
        """
        asked, record = self._prediction(key)
        if guess is ... or guess is None:
            guess = asked.answer if os.environ.get(KEY_VARIABLE) == "1" else None
        if guess is None:
            feedback.show_open(asked.invitation())
            return
        try:
            answer = asked.parse(guess)
            asked.check_range(answer)
        except ValueError as problem:
            feedback.show_open(str(problem))
            return
        record.changed_after_reveal = record.measured is not None and answer != record.guess
        record.guess = answer
        feedback.show_noted(f"Written down: {asked.format(answer)}.")

    def reveal(self, key: str, measured: Measured) -> None:
        """Show the guess beside the measured value and explain; without a guess, ask for one."""
        asked, record = self._prediction(key)
        if record.guess is None:
            feedback.show_open(
                "No prediction yet. Put your answer in place of `...` above, run that cell, and "
                "then this one."
            )
            return
        record.measured = measured if isinstance(measured, Order) else asked.parse(measured)
        record.passed = asked.is_close(record.guess, record.measured)
        feedback.show_reveal(asked, record.guess, record.measured, passed=record.passed)

    def exercise(self, name: str, title: str) -> Callable[[Check], Callable[..., None]]:
        """Declare an exercise; decorates its check.

        The check takes the learner's solution and raises `WrongAnswer` or returns a `Score`. An
        exception raised by the solution, or a loop that does not end, counts as wrong, and is shown
        with its line.
        """
        assert name not in self.records, f"{name} is declared twice"
        self.records[name] = record = Record(title)

        def decorate(check: Check) -> Callable[..., None]:
            @functools.wraps(check)
            def run(*attempt: object) -> None:
                try:
                    guard.check_functions(check, attempt)
                    with guard.time_limit():
                        score = check(*map(guard.guarded, attempt))
                except WrongAnswer as fault:
                    record.passed = record.passed or False  # a solved exercise stays solved
                    feedback.show_wrong(name, title, str(fault), solved_before=record.passed)
                else:
                    record.passed, record.score = True, str(score)
                    feedback.show_passed(name, title, score)

            return run

        return decorate

    def progress(self) -> None:
        """Show the results of all predictions and exercises of this notebook."""
        exercises = [
            (f"{feedback.label(name)}, {record.title}", record.passed, record.score)
            for name, record in sorted(self.records.items(), key=lambda item: _number(item[0]))
            if name not in self.predictions
        ]
        feedback.show_progress([self._prediction_row(key) for key in self.predictions], exercises)

    def _prediction_row(self, key: str) -> tuple[str, str, str, bool | None]:
        asked, record = self._prediction(key)
        yours = "" if record.guess is None else asked.format(record.guess)
        found = "" if record.measured is None else asked.format(record.measured)
        note = " (changed after the reveal)" if record.changed_after_reveal else ""
        return asked.question, yours + note, found, record.passed if found else None

    def _prediction(self, key: str) -> tuple[Prediction, Record]:
        if key not in self.predictions:
            raise ValueError(
                f"this lesson has no prediction {key!r}; its predictions are "
                f"{', '.join(self.predictions)}"
            )
        return self.predictions[key], self.records[key]


def _asked(question: Question, world: World) -> Prediction:
    """Return the question of a world, without wrong answers that are right in this world."""
    asked = question(world)
    right = asked.parse(asked.answer)
    wrong = {
        guess: text
        for guess, text in asked.wrong.items()
        if not asked.is_close(asked.parse(guess), right)
    }
    return replace(asked, wrong=wrong)


def _number(name: str) -> int:
    """Return 2 for the exercise `e2`; 0 for a prediction."""
    return int(name[1:]) if name[1:].isdigit() else 0
