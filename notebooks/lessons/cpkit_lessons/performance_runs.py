"""Notebook 3, exercise 6: as few copies as possible, each to its final place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from cpkit.layout import ContextParallelMetadata
from cpkit.provenance import poison_, shard_rows
from cpkit_lessons import rows
from cpkit_lessons.feedback import Score, Wrong
from cpkit_lessons.performance_questions import LESSON

Copy = tuple[int, int, int]  # first row of the shard, first token, length
Copies = Callable[[list[int]], Sequence[Copy]]


@LESSON.exercise("e6", "few copies, final places")
def check_copies(copies: Copies) -> Score:
    """All ranks push stamped rows into poisoned results, for small and random layouts."""
    cases, mine, fewest = 0, 0, 0
    for round_, layout in rows.rounds(rows.layouts()):
        result = poison_(torch.empty_like(rows.token_order(layout, round_)))
        for rank in range(layout.cp_size):
            tokens = layout.rank_rows(rank).tolist()
            plan = _checked(copies(list(tokens)), tokens, layout, rank)
            shard = shard_rows(layout, rank, rows.ROW_SHAPE, rows.DTYPE, round=round_)
            for row, token, length in plan:
                result[token : token + length] = shard[row : row + length]
            least = _fewest(tokens)
            if len(plan) > least:
                raise Wrong(
                    f"rank {rank} holds tokens {tokens}: your plan has {len(plan)} copies; {least} "
                    f"would do, since neighbours can go in one"
                )
            mine, fewest = mine + len(plan), fewest + least
        rows.must_equal("copies", result, rows.token_order(layout, round_), layout)
        cases += 1
    per_token = sum(layout.total_tokens for _, layout in rows.rounds(rows.layouts()))
    note = f"a copy for each row would be {per_token:,}"
    return Score(cases, {"copies": (mine, fewest)}, note=note)


def _fewest(tokens: list[int]) -> int:
    """How many runs of consecutive numbers there are."""
    gaps = itertools.pairwise(tokens)
    return bool(tokens) + sum(after != before + 1 for before, after in gaps)


def _checked(
    plan: object, tokens: list[int], layout: ContextParallelMetadata, rank: int
) -> list[Copy]:
    """The plan, once every copy lies inside the shard and inside the result."""
    if not isinstance(plan, list | tuple) or not all(len(copy) == 3 for copy in plan):
        raise Wrong(
            f"copies({tokens}) returned {plan!r:.60}; wanted a list of (row, token, length)"
        )
    for row, token, length in plan:
        inside = 0 <= row <= row + length <= len(tokens)
        if not (inside and length > 0 and 0 <= token <= token + length <= layout.total_tokens):
            raise Wrong(
                f"rank {rank} of {layout.cp_size} holds {len(tokens)} rows of "
                f"{layout.total_tokens} tokens; the copy ({row}, {token}, {length}) leaves them"
            )
    return list(plan)
