"""Show the result of a prediction or a check: as text, and the same as a small HTML card.

✓ is right, ✗ is wrong (the only red), ≠ is a prediction that was off, ○ is open. The text does not
depend on colour, and the cards inherit the colours of the page, so they work in light and dark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from IPython.display import display

from cpkit.notebook import style
from cpkit_lessons.prediction import Answer, Measured, Prediction

_MARKS = {True: "✓", False: "✗", None: "○"}
_LEFT = "text-align: left"
_CARD = "border-left: 4px solid {}; padding: 4px 12px; margin: 4px 0; max-width: 56em"


class WrongAnswer(Exception):
    """Raised by a check; the message says what is wrong first, and what is expected."""


@dataclass(frozen=True)
class Score:
    """The cost of a right solution: `costs` as unit to (yours, reference), over `cases` cases."""

    cases: int
    costs: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        costs = [
            f"{unit}: {mine:,} (reference {ref:,})" for unit, (mine, ref) in self.costs.items()
        ]
        cases = f"{self.cases:,} case{'s' * (self.cases != 1)}"
        return "; ".join([cases, *costs, *([self.note] if self.note else [])])


def show_open(text: str) -> None:
    """Show that something is still open."""
    _show_card("○", text)


def show_noted(text: str) -> None:
    """Show that a prediction was recorded."""
    _show_card("✎", text, bold_head=False)


def show_reveal(asked: Prediction, guess: Answer, measured: Measured, *, passed: bool) -> None:
    """Show the guess, the measured value and how far apart they are, and explain the answer."""
    verdict = asked.verdict(guess, measured)
    head = f"You said {asked.format(guess)}, it is {asked.format(measured)}"
    head += f": {verdict}." if verdict else "."
    oversight = "" if passed else asked.oversight(guess)
    _show_card("✓" if passed else "≠", head, *filter(None, (oversight, asked.why)))


def show_passed(name: str, title: str, score: Score) -> None:
    """Show that an exercise is solved, with its score beside that of the reference."""
    _show_card("✓", f"{label(name)}, {title}: solved", str(score))


def show_wrong(name: str, title: str, fault: str, *, solved_before: bool = False) -> None:
    """Show that an attempt does not solve an exercise, with the first fault."""
    how = "not solved by this code; your earlier solution counts" if solved_before else ""
    _show_card("✗", f"{label(name)}, {title}: {how or 'not solved yet'}", fault)


def show_progress(
    predictions: Sequence[tuple[str, str, str, bool | None]],
    exercises: Sequence[tuple[str, bool | None, str]],
) -> None:
    """Show two tables: predictions (question, yours, actual) and exercises (title, score)."""
    rows = [
        ["≠" if ok is False else _MARKS[ok], q, yours or "open", found or "open"]
        for q, yours, found, ok in predictions
    ]
    tasks = [
        [_MARKS[ok], title, score or ("not yet" if ok is False else "open")]
        for title, ok, score in exercises
    ]
    guessed = sum(bool(yours) for _, yours, _, _ in predictions)
    right = sum(ok is True for *_, ok in predictions)
    solved = sum(ok is True for _, ok, _ in exercises)
    head = f"{guessed} of {len(rows)} predicted, {right} right; {solved} of {len(tasks)} solved"
    text = "\n".join([head, *(" | ".join(row) for row in rows + tasks)])
    page = f"<p><b>{head}</b></p>" + html_table(["", "prediction", "yours", "actual"], rows)
    _display(text, page + html_table(["", "exercise", "score"], tasks))


def label(name: str) -> str:
    """Return an exercise's name as text: `e2` is Exercise 2."""
    return f"Exercise {name.removeprefix('e')}"


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of escaped text; text between backticks is shown as code."""
    top = "".join(f'<th scope="col" style="{_LEFT}">{escape(name)}</th>' for name in head)
    lines = ["".join(f'<td style="{_LEFT}">{_html(cell)}</td>' for cell in row) for row in rows]
    return f"<table><tr>{top}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _show_card(mark: str, head: str, *parts: str, bold_head: bool = True) -> None:
    color, badge = "currentColor", mark
    if mark == "✗":
        color = style.WRONG
        badge = f'<span style="background: {color}; color: #fff; padding: 0 5px">✗</span>'
    first = f"{badge} <b>{_html(head)}</b>" if bold_head else f"<b>{badge}</b> {_html(head)}"
    page = "<br>".join([first, *map(_html, parts)])
    text = "\n".join([f"{mark} {head}", *parts])
    _display(text, f'<div style="{_CARD.format(color)}">{page}</div>')


def _display(text: str, page: str) -> None:
    display({"text/plain": text, "text/html": page}, raw=True)  # type: ignore[no-untyped-call]


def _html(text: str) -> str:
    """Escape text for HTML; text between backticks becomes code, line breaks are kept."""
    parts = escape(text).replace("\n", "<br>").split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))
