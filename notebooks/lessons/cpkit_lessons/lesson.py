"""The predictions and exercises of one notebook, and the learner's results.

    predict("waste", 0.33)      record the learner's answer
    reveal("waste", measured)   show the guess, the measured value and their ratio, and explain
    check_owner(owner)          check an exercise: ✓ with a score, or ✗ with the first fault
    progress()                  show all results in one table

A wrong or missing answer never raises, so a notebook always runs to its end. With
CPKIT_ANSWER_KEY=1 an open prediction takes the correct answer.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

from cpkit_lessons import feedback, guard
from cpkit_lessons.feedback import Score, WrongAnswer
from cpkit_lessons.prediction import Answer, Prediction

KEY_VARIABLE = "CPKIT_ANSWER_KEY"
Check = Callable[..., Score]


@dataclass
class Record:
    """The learner's result in one prediction or exercise."""

    title: str
    guess: Answer | None = None
    measured: Answer | None = None
    changed_after_reveal: bool = False
    passed: bool | None = None  # None: not tried
    score: str = ""


@dataclass
class Lesson:
    """The predictions and exercises of one notebook, in the order in which they are declared."""

    name: str
    predictions: dict[str, Prediction] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)

    def ask(self, key: str, question: str, **options: Any) -> None:
        """Declare a prediction; for the options see `Prediction`."""
        assert key not in self.records, f"{key} is declared twice"
        self.predictions[key] = Prediction(question, **options)
        self.records[key] = Record(question)

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
        except ValueError as problem:
            feedback.show_open(str(problem))
            return
        record.changed_after_reveal = record.measured is not None and answer != record.guess
        record.guess = answer
        feedback.show_noted(f"Written down: {asked.format(answer)}.")

    def reveal(self, key: str, measured: Answer) -> None:
        """Show the guess beside the measured value and explain; without a guess, ask for one."""
        asked, record = self._prediction(key)
        if record.guess is None:
            feedback.show_open(
                "No prediction yet. Put one in place of `...` above, run that cell, then this one."
            )
            return
        record.measured = asked.parse(measured)
        record.passed = asked.is_close(record.guess, record.measured)
        feedback.show_reveal(asked, record.guess, record.measured, passed=record.passed)

    def exercise(self, name: str, title: str) -> Callable[[Check], Callable[..., None]]:
        """Declare an exercise; decorates its check.

        The check takes the learner's solution and raises `WrongAnswer` or returns a `Score`. An
        exception raised by the solution counts as wrong, and is shown with its line.
        """
        assert name not in self.records, f"{name} is declared twice"
        self.records[name] = record = Record(title)

        def decorate(check: Check) -> Callable[..., None]:
            @functools.wraps(check)
            def run(*attempt: object) -> None:
                try:
                    score = check(*map(guard.guarded, attempt))
                except WrongAnswer as fault:
                    record.passed, record.score = False, ""
                    feedback.show_wrong(name, title, str(fault))
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


def _number(name: str) -> int:
    """Return 2 for the exercise `e2`; 0 for a prediction."""
    return int(name[1:]) if name[1:].isdigit() else 0
