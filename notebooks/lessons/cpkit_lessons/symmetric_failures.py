"""Notebook 2, exercise 7: from what the ranks saw to what went wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from cpkit_lessons.fault_report import RankReport
from cpkit_lessons.feedback import Score, Wrong
from cpkit_lessons.symmetric_questions import LESSON
from cpkit_lessons.throwaway import CASES, PostMortem

Cause = Callable[[list[RankReport]], str]


@LESSON.exercise("e7", "post-mortem to cause")
def check_cause(cause: Cause, cards: Mapping[str, PostMortem]) -> Score:
    """Your own post-mortems, in both orders of their ranks."""
    missing = [case for case in CASES if case not in cards]
    if missing:
        raise Wrong(f"run the labs above first; {', '.join(missing)} has no post-mortem yet")
    cases = 0
    for case, card in cards.items():
        for ranks in (list(card.ranks), list(reversed(card.ranks))):
            got = cause(ranks)
            if got != case:
                shown = str(dataclasses.replace(card, case="this card")).replace("\n", "\n  ")
                raise Wrong(f"you say {got!r}; the cause was {case!r}. {shown}")
            cases += 1
    return Score(cases)
