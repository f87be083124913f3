"""One question that is answered before the measurement: a number, a name, or names in order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

Answer = float | str | tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """A question, its answer key, and what the typical wrong answers overlook.

    Without `choices` the answer is a number of `unit`; no unit says that it only names something, a
    rank or a slot. With them it is one of the choices, or all of them in order where `answer` is
    a tuple. `close` is the relative error that counts as right.
    `wrong` maps typical wrong answers to what each overlooks; `why` is shown to everybody.
    """

    question: str
    answer: Answer
    why: str
    unit: str = ""
    choices: tuple[str, ...] = ()
    wrong: Mapping[Answer, str] = field(default_factory=dict)
    close: float = 0.1

    def read(self, guess: object) -> Answer:
        """A learner's guess as an answer. Raises ValueError that says what is asked for."""
        if self.choices and isinstance(self.answer, tuple):
            names = tuple(guess) if isinstance(guess, list | tuple) else ()
            if sorted(names) != sorted(self.choices):
                raise ValueError(f"{guess!r} is not an order of {', '.join(self.choices)}")
            return names
        if self.choices:
            if guess not in self.choices:
                raise ValueError(f"{guess!r} is none of {', '.join(self.choices)}")
            return str(guess)
        if not isinstance(guess, Real) or isinstance(guess, bool) or not math.isfinite(guess):
            raise ValueError(f"{guess!r} is not a number")
        return float(guess)

    def is_close(self, guess: Answer, measured: Answer) -> bool:
        """Whether a guess counts as right."""
        if isinstance(guess, float) and isinstance(measured, float):
            return abs(guess - measured) <= self.close * abs(measured)
        return guess == measured

    def oversight(self, guess: Answer) -> str:
        """What a typical wrong guess overlooks; empty for a guess that is not typical."""
        return next((why for wrong, why in self.wrong.items() if self._same(guess, wrong)), "")

    def invitation(self) -> str:
        """The question, and what to write."""
        if isinstance(self.answer, tuple):
            how = f"an order of [{', '.join(map(repr, self.choices))}]"
        elif self.choices:
            how = f"one of {', '.join(map(repr, self.choices))}"
        else:
            how = f"a number{f' ({self.unit})' if self.unit else ''}"
        return f"{self.question} Write {how} in place of `...`, and run this cell."

    def words(self, answer: Answer) -> str:
        """An answer with its unit."""
        if isinstance(answer, tuple):
            return " < ".join(answer)
        if isinstance(answer, str):
            return answer
        return f"{answer:,.4g}" + (f" {self.unit}" if self.unit else "")

    def ratio(self, guess: Answer, measured: Answer) -> str:
        """Guess by measured in words; empty where that means nothing, as for a rank's number."""
        if not (self.unit and isinstance(guess, float) and isinstance(measured, float)):
            return ""
        if guess * measured <= 0:
            return f"off by {guess - measured:+,.4g}"
        times = guess / measured
        return (
            f"{times:.2f} × the measured" if times >= 0.1 else f"1/{1 / times:.0f} of the measured"
        )

    def _same(self, guess: Answer, wrong: Answer) -> bool:
        if isinstance(guess, float) and isinstance(wrong, float | int):
            return abs(guess - wrong) <= self.close * abs(wrong)
        return guess == wrong
