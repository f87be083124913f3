"""A question that is answered before the measurement: a number, a name, or names in order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

from cpkit_lessons.measured import Order

Answer = float | str | tuple[str, ...]
Measured = Answer | Order  # an order says which of its differences are clear
_EXACT = 0.005  # the relative error of a guess that was rounded to three digits
_PERCENT_BELOW = 1.5  # "1.2 times too high" is harder to read than "20% too high"
_PHYSICAL = ("GB/s", "ms")  # units that a learner has to know before writing a number


@dataclass(frozen=True)
class Prediction:
    """A question, its correct answer, and what each typical wrong answer overlooks.

    With `choices`, the answer is one of them, or all of them in order if `answer` is a tuple.
    Otherwise it is a number in `unit`; without a unit the number is a name, such as a rank or slot.
    `between`: the least and the largest possible number. `tolerance` is the relative error that
    still counts as right. `wrong` maps typical wrong answers to what they overlook; `why` is always
    shown.
    """

    question: str
    answer: Answer
    why: str
    unit: str = ""
    choices: tuple[str, ...] = ()
    wrong: Mapping[Answer, str] = field(default_factory=dict)
    tolerance: float = 0.1
    between: tuple[float, float] | None = None

    def parse(self, guess: object) -> Answer:
        """Convert a learner's guess. Raises ValueError that lists the allowed answers."""
        if self.choices and isinstance(self.answer, tuple):
            names = _names_in_order(guess)
            if sorted(names) != sorted(self.choices):
                raise ValueError(f"{guess!r:.60} is not possible: write {self._form()}")
            return names
        if self.choices:
            if guess not in self.choices:
                raise ValueError(f"{guess!r:.60} is not possible: write {self._form()}")
            return str(guess)
        if not isinstance(guess, Real) or isinstance(guess, bool) or not math.isfinite(guess):
            raise ValueError(f"{guess!r:.60} is not a number: write {self._form()}")
        return float(guess)

    def check_range(self, guess: Answer) -> None:
        """Raise ValueError for a number that is impossible; a measured value is not checked."""
        if isinstance(guess, float):
            least, most = self.between or (0, math.inf)
            if not least <= guess <= most or (self._is_whole() and not guess.is_integer()):
                raise ValueError(f"{guess:g} is not possible: write {self._form()}")

    def is_close(self, guess: Answer, reference: Measured) -> bool:
        """Whether a guess equals the reference, or a number within the tolerance."""
        if isinstance(reference, Order):
            return isinstance(guess, tuple) and reference.allows(guess)
        if isinstance(guess, float) and isinstance(reference, float | int):
            return abs(guess - reference) <= self.tolerance * abs(reference)
        return guess == reference

    def oversight(self, guess: Answer) -> str:
        """Return what a typical wrong guess overlooks; empty for any other guess."""
        return next((why for wrong, why in self.wrong.items() if self.is_close(guess, wrong)), "")

    def invitation(self) -> str:
        """Return the question and the form of its answer."""
        return f"{self.question} Replace `...` with {self._form()}, and run this cell."

    def _form(self) -> str:
        """Return what a learner may write."""
        if isinstance(self.answer, tuple):
            return f"a list of these names in order: {', '.join(map(repr, self.choices))}"
        if self.choices:
            return f"one of {', '.join(map(repr, self.choices))}"
        number = "a whole number" if self._is_whole() else "a number"
        limits = " from {:g} to {:g}".format(*self.between) if self.between else ""
        return f"{number}{limits}{f' in {self.unit}' if self.unit in _PHYSICAL else ''}"

    def _is_whole(self) -> bool:
        """Whether the answer is a rank, a slot or a count, of which there is no fraction."""
        return isinstance(self.answer, int) and self.unit != "times"

    def format(self, answer: Measured) -> str:
        """Return an answer with its unit."""
        if isinstance(answer, str | Order):
            return str(answer)
        if isinstance(answer, float | int):
            return f"{answer:,.4g}" + (f" {self.unit}" if self.unit else "")
        return " < ".join(answer)

    def verdict(self, guess: Answer, measured: Measured) -> str:
        """Compare a guess with the measured value: "exact", or how far it is off.

        Empty for a wrong answer that has no size: a name, an order, or a number without a unit.
        """
        if isinstance(measured, Order):
            return measured.verdict(guess) if isinstance(guess, tuple) else ""
        if guess == measured:
            return "exact"
        if not (self.unit and isinstance(guess, float) and isinstance(measured, float)):
            return ""
        if self.is_close(guess, measured):
            off = abs(guess / measured - 1)
            return "exact" if off < _EXACT else f"close enough, {off:.0%} off"
        return f"{self._distance(guess, measured)} too {'high' if guess > measured else 'low'}"

    def _distance(self, guess: float, measured: float) -> str:
        """Return how far a wrong guess is off: a difference of counts, percent, or a factor."""
        if self._is_whole() or guess * measured <= 0:
            unit = f" {self.unit}" if self.unit in _PHYSICAL else ""
            return f"{abs(guess - measured):,.4g}{unit}"
        times = max(guess / measured, measured / guess)
        if times < _PERCENT_BELOW:
            return f"{abs(guess / measured - 1):.0%}"
        return f"{times:,.2g} times"


def _names_in_order(guess: object) -> tuple[str, ...]:
    """Return the names of a list, or of a text such as "a < b < c", as reveals write an order."""
    if isinstance(guess, str):
        return tuple(name.strip() for name in guess.split("<"))
    return tuple(map(str, guess)) if isinstance(guess, list | tuple) else ()
