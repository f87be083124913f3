"""Notebook 1: what it asks and how it checks."""

from __future__ import annotations

from collections.abc import Callable

from cpkit.layout import prepare_context_parallel_metadata
from cpkit.notebook.lesson import Lesson
from cpkit.notebook.verdict import Score, Wrong

LESSON = Lesson("01_padding_and_reorg")
predict, reveal, progress = LESSON.predict, LESSON.reveal, LESSON.progress

LESSON.ask(
    "waste",
    "13 and 9 tokens over 4 ranks, zigzag: which share of the gathered slots is padding?",
    answer=2 / 24,
    unit="of all slots",
    close=0.05,
    wrong={
        0.0: "22 tokens over 4 ranks do not divide evenly: somebody has a row less.",
        2 / 22: "That is padding by tokens. Slots are what is sent: 4 ranks of 6 rows.",
    },
    why="Every rank pads to the longest, 6 rows: 4 · 6 = 24 slots for 22 tokens.",
)


@LESSON.exercise("e1", "who owns token t?")
def check_owner(owner: Callable[[int, int, int], int]) -> Score:
    """Every token of every length up to 40, over 1 to 5 ranks."""
    cases = 0
    for cp_size in range(1, 6):
        for length in range(2 * cp_size, 41):
            owners = prepare_context_parallel_metadata([length], cp_size).owners().tolist()
            for token, wanted in enumerate(owners):
                got = owner(token, length, cp_size)
                if got != wanted:
                    raise Wrong(
                        f"owner(token={token}, length={length}, cp_size={cp_size}) is {got}; token "
                        f"{token} belongs to rank {wanted}"
                    )
                cases += 1
    return Score(cases)
