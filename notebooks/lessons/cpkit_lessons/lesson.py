"""One notebook's predictions and exercises: what is asked, what was answered, how it went.

    predict("waste", 0.33)      writes the learner's answer down
    reveal("waste", measured)   shows yours, measured and their ratio, and explains
    check_owner(owner)          runs an exercise's check: ✓ with a score, or ✗ with the first fault
    progress()                  all of it in one table

Nothing here raises because a learner is wrong or has not begun: a notebook always runs to its end.
With CPKIT_ANSWER_KEY=1 a prediction that was left open takes the answer of the key.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

from cpkit_lessons import feedback as verdict
from cpkit_lessons import guard
from cpkit_lessons.feedback import Score, Wrong
from cpkit_lessons.prediction import Answer, Prediction

KEY_VARIABLE = "CPKIT_ANSWER_KEY"
Check = Callable[..., Score]


@dataclass
class Record:
    """What is known of one prediction or exercise."""

    title: str
    guess: Answer | None = None
    measured: Answer | None = None
    late: bool = False  # the guess was changed after the reveal
    passed: bool | None = None  # None: not tried
    score: str = ""


@dataclass
class Lesson:
    """The predictions and exercises of one notebook, in the order they are declared."""

    name: str
    predictions: dict[str, Prediction] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)

    def ask(self, key: str, question: str, **options: Any) -> None:
        """Declare a prediction; options as `Prediction`."""
        assert key not in self.records, f"{key} is declared twice"
        self.predictions[key] = Prediction(question, **options)
        self.records[key] = Record(question)

    def predict(self, key: str, guess: Answer | EllipsisType | None = ...) -> None:
        """Write a guess down: a number, a name, or names in order; `...` leaves it open.

        Raises ValueError for a key that this lesson does not have.
        """
        asked, record = self._prediction(key)
        if guess is ... or guess is None:
            guess = asked.answer if os.environ.get(KEY_VARIABLE) == "1" else None
        if guess is None:
            verdict.show_open(asked.invitation())
            return
        try:
            answer = asked.read(guess)
        except ValueError as problem:
            verdict.show_open(str(problem))
            return
        record.late = record.measured is not None and answer != record.guess
        record.guess = answer
        verdict.show_noted(f"Written down: {asked.words(answer)}.")

    def reveal(self, key: str, measured: Answer) -> None:
        """Show the guess beside what was measured, and say why. Without a guess, ask for one."""
        asked, record = self._prediction(key)
        if record.guess is None:
            verdict.show_open(
                "No prediction yet. Put one in place of `...` above, run that cell, then this one."
            )
            return
        record.measured = asked.read(measured)
        record.passed = asked.is_close(record.guess, record.measured)
        verdict.show_reveal(asked, record.guess, record.measured, passed=record.passed)

    def exercise(self, name: str, title: str) -> Callable[[Check], Callable[..., None]]:
        """Declare an exercise; decorates its check.

        The check takes what the learner wrote, raises `Wrong` or returns a `Score`. A function of
        the learner's that raises counts as wrong, with its line.
        """
        assert name not in self.records, f"{name} is declared twice"
        self.records[name] = record = Record(title)

        def decorate(check: Check) -> Callable[..., None]:
            @functools.wraps(check)
            def run(*attempt: object) -> None:
                try:
                    score = check(*map(guard.guarded, attempt))
                except Wrong as fault:
                    record.passed, record.score = False, ""
                    verdict.show_wrong(name, title, str(fault))
                else:
                    record.passed, record.score = True, score.line()
                    verdict.show_passed(name, title, score)

            return run

        return decorate

    def progress(self) -> None:
        """Show every prediction and exercise of this notebook, and how it went."""
        verdict.show_progress(
            [self._prediction_row(key) for key in self.predictions],
            [(f"{verdict.label(name)}, {r.title}", r.passed, r.score) for name, r in self._tried()],
        )

    def _tried(self) -> list[tuple[str, Record]]:
        """The exercises in the order of their numbers."""
        mine = [(name, r) for name, r in self.records.items() if name not in self.predictions]
        return sorted(mine, key=lambda named: int(named[0].removeprefix("e")))

    def _prediction_row(self, key: str) -> tuple[str, str, str, bool | None]:
        asked, record = self._prediction(key)
        yours = "" if record.guess is None else asked.words(record.guess)
        found = "" if record.measured is None else asked.words(record.measured)
        note = " (changed after the reveal)" if record.late else ""
        return asked.question, yours + note, found, record.passed if found else None

    def _prediction(self, key: str) -> tuple[Prediction, Record]:
        if key not in self.predictions:
            raise ValueError(
                f"this lesson asks no {key!r}; its predictions are {', '.join(self.predictions)}"
            )
        return self.predictions[key], self.records[key]
