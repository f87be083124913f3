"""What a learner sees of a prediction or a check: one line in words, and the same as a small card.

✓ is right, ✗ is wrong (the only red), ≠ is a prediction that was off, ○ is open. The words never
depend on colour, and the cards take their colours from the page: they read in light and dark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from IPython.display import display

from cpkit.notebook import style
from cpkit_lessons.prediction import Answer, Prediction

Number = float | int
_MARKS = {True: "✓", False: "✗", None: "○"}
_LEFT = "text-align: left"
_CARD = "border-left: 4px solid {}; padding: 4px 12px; margin: 4px 0; max-width: 56em"


class Wrong(Exception):
    """A check's message: which row is wrong first, what it holds, what belongs there."""


@dataclass(frozen=True)
class Score:
    """What a right solution costs: `costs` as unit to (yours, reference), over `cases` checked."""

    cases: int
    costs: Mapping[str, tuple[Number, Number]] = field(default_factory=dict)
    note: str = ""

    def line(self) -> str:
        """All of it in one line."""
        costs = [f"{unit} {mine:,} (reference {ref:,})" for unit, (mine, ref) in self.costs.items()]
        cases = f"{self.cases:,} case{'s' * (self.cases != 1)}"
        return "; ".join([cases, *costs, *([self.note] if self.note else [])])


def show_open(words: str) -> None:
    """Something is still to be done."""
    _show(None, words)


def show_noted(words: str) -> None:
    """A prediction was written down."""
    _card("✎ " + words, f"<b>✎</b> {_code(words)}", "currentColor")


def show_reveal(asked: Prediction, guess: Answer, measured: Answer, *, passed: bool) -> None:
    """Yours, measured, ratio; then what was overlooked, and why it is so."""
    ratio = asked.ratio(guess, measured)
    oversight = "" if passed else asked.oversight(guess)
    head = f"you said {asked.words(guess)}; it is {asked.words(measured)}"
    head += f" ({ratio})" if ratio else ""
    parts = [part for part in (oversight, asked.why) if part]
    mark = "✓" if passed else "≠"
    page = f"{mark} <b>{_code(head)}</b>" + "".join(f"<br>{_code(part)}" for part in parts)
    _card("\n".join([f"{mark} {head}", *parts]), page, "currentColor")


def show_passed(name: str, title: str, score: Score) -> None:
    """An exercise is solved: its score beside that of the reference."""
    _show(True, f"{label(name)}, {title}: solved", [score.line()])


def show_wrong(name: str, title: str, fault: str) -> None:
    """An exercise is not solved: the first fault."""
    _show(False, f"{label(name)}, {title}: not solved yet", [fault])


def show_progress(
    predictions: Sequence[tuple[str, str, str, bool | None]],
    exercises: Sequence[tuple[str, bool | None, str]],
) -> None:
    """Two tables: predictions (question, yours, measured) and exercises (title, score)."""
    rows = [
        ["≠" if ok is False else _MARKS[ok], q, yours or "open", found or "open"]
        for q, yours, found, ok in predictions
    ]
    tasks = [
        [_MARKS[ok], title, score or ("not yet" if ok is False else "open")]
        for title, ok, score in exercises
    ]
    guessed = sum(bool(yours) for _, yours, _, _ in predictions)
    solved = sum(ok is True for _, ok, _ in exercises)
    head = f"{guessed} of {len(rows)} predicted, {solved} of {len(tasks)} solved"
    text = "\n".join([head, *(" | ".join(row) for row in rows + tasks)])
    page = f"<p><b>{head}</b></p>" + _table(["", "prediction", "yours", "measured"], rows)
    _display(text, page + _table(["", "exercise", "score"], tasks))


def label(name: str) -> str:
    """An exercise's name in words: `e2` is Exercise 2."""
    return f"Exercise {name.removeprefix('e')}"


def _show(passed: bool | None, head: str, parts: Sequence[str] = ()) -> None:
    mark = _MARKS[passed]
    color = style.WRONG if passed is False else "currentColor"
    badge = f'<span style="background: {color}; color: #fff; padding: 0 5px">✗</span>'
    page = f"{badge if passed is False else mark} <b>{_code(head)}</b>"
    page += "".join(f"<br>{_code(part)}" for part in parts)
    _card("\n".join([f"{mark} {head}", *parts]), page, color)


def _card(text: str, page: str, color: str) -> None:
    _display(text, f'<div style="{_CARD.format(color)}">{page}</div>')


def _display(text: str, page: str) -> None:
    display({"text/plain": text, "text/html": page}, raw=True)  # type: ignore[no-untyped-call]


def _code(words: str) -> str:
    """Escaped for HTML; what stands between backticks is code, line breaks stay."""
    parts = escape(words).replace("\n", "<br>").split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col" style="{_LEFT}">{escape(name)}</th>' for name in head)
    lines = ["".join(f'<td style="{_LEFT}">{_code(cell)}</td>' for cell in row) for row in rows]
    return f"<table><tr>{top}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
