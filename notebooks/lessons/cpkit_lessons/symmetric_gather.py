"""Notebook 2, exercise 8: a pull gather, checked over random schedules at level 4."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

import torch

from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.provenance import poison_, shard_rows
from cpkit_lessons import guard, rows
from cpkit_lessons import simulate as schedules
from cpkit_lessons.feedback import Score, Wrong
from cpkit_lessons.programs import BadProgram, Program, Rank, Run, Step
from cpkit_lessons.symmetric_questions import LESSON

Steps = Generator[Step, Any, None]
PullGather = Callable[[Rank, torch.Tensor, torch.Tensor, list[torch.Tensor]], Steps]
_ORDERS, _ROUNDS = 64, 3


@LESSON.exercise("e8", "a pull gather")
def check_pull_gather(pull_gather: PullGather) -> Score:
    """64 random orders of 2 to 5 ranks, uneven shards, three rounds in the same buffers."""
    gather = guard.guarded_steps(pull_gather)
    for seed in range(_ORDERS):
        draw = random.Random(seed)
        size = draw.randint(2, 5)
        lengths = [draw.randint(2 * size, 3 * size + 4) for _ in range(draw.randint(1, 2))]
        layout = prepare_context_parallel_metadata(lengths, size)
        _play(gather, layout, seed)
    layout = prepare_context_parallel_metadata([19], 4)
    mine, reference = (_bill(attempt, layout) for attempt in (gather, _reference))
    return Score(_ORDERS, {unit: (mine[unit], reference[unit]) for unit in reference})


def _reference(
    me: Rank, shard: torch.Tensor, out: torch.Tensor, tokens: list[torch.Tensor]
) -> Steps:
    yield me.store(shard)
    yield me.barrier()
    for step in range(me.size):
        peer = (me.rank + step) % me.size
        out[tokens[peer]] = yield me.load(peer, len(tokens[peer]))
    yield me.barrier()


def _program(gather: PullGather, layout: ContextParallelMetadata) -> Program:
    """All rounds of one rank: fresh stamps in, poisoned output, every bit compared."""
    tokens = [layout.rank_rows(rank) for rank in range(layout.cp_size)]

    def program(me: Rank) -> Steps:
        for number in me.rounds:
            shard = shard_rows(layout, me.rank, rows.ROW_SHAPE, rows.DTYPE, round=number)
            out = poison_(torch.empty(layout.total_tokens, *rows.ROW_SHAPE, dtype=rows.DTYPE))
            yield from gather(me, shard, out, [rows_.clone() for rows_ in tokens])
            where = f"round {number}, rank {me.rank} of pull_gather"
            rows.must_equal(where, out, rows.token_order(layout, number), layout)

    return program


def _play(gather: PullGather, layout: ContextParallelMetadata, seed: int) -> Run:
    try:
        run = Run(_program(gather, layout), layout.cp_size, _ROUNDS)
        for _ in schedules.random_order(run, random.Random(seed)):
            pass
    except BadProgram as fault:
        raise Wrong(str(fault)) from None
    if run.waiting():
        raise Wrong(f"order {seed} of {layout.cp_size} ranks: {schedules.deadlock(run)}")
    return run


def _bill(gather: PullGather, layout: ContextParallelMetadata) -> dict[str, int]:
    """Barriers of one rank a round, rows loaded, and how many load from one rank at once."""
    run = Run(_program(gather, layout), layout.cp_size, 1)
    while ready := run.ready():  # in lockstep: always the one that is furthest behind
        run.advance(min(ready, key=lambda rank: run.taken[rank]))
    steps = [event.step for event in run.events]
    loads: list[list[int]] = [[] for _ in range(layout.cp_size)]
    for event in run.events:
        if event.step.kind == "load":
            loads[event.rank].append(event.step.peer)
    crowds = [Counter(peers).most_common(1)[0][1] for peers in zip(*loads, strict=False)]
    return {
        "barriers": sum(step.kind == "barrier" for step in steps) // layout.cp_size,
        "rows loaded": sum(step.data for step in steps if step.kind == "load"),
        "loads from one rank at a time": max(crowds, default=0),
    }
