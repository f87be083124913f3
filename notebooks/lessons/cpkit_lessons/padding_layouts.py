"""Notebook 1, exercises 1 to 3: who owns a token, what it costs, how long the padded shard is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch

from cpkit.layout import STRATEGIES, ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit_lessons import rows
from cpkit_lessons.feedback import Score, Wrong
from cpkit_lessons.padding_questions import LESSON


@LESSON.exercise("e1", "who owns token t?")
def check_owner(owner: Callable[[int, int, int], int]) -> Score:
    """Every token of every length up to 40, over 1 to 5 ranks."""
    cases = 0
    for cp_size in range(1, 6):
        for length in range(2 * cp_size, 41):
            layout = prepare_context_parallel_metadata([length], cp_size)
            for token, wanted in enumerate(layout.owners().tolist()):
                got = owner(token, length, cp_size)
                if got != wanted:
                    raise Wrong(
                        f"owner(token={token}, length={length}, cp_size={cp_size}) is {got}; with "
                        f"blocks of {list(layout.split_list)} tokens, "
                        f"{token} belongs to rank {wanted}"
                    )
                cases += 1
    return Score(cases)


@LESSON.exercise("e2", "count the keys")
def check_keys_seen(keys_seen: Callable[[torch.Tensor, list[int]], int]) -> Score:
    """Every rank of small and random batches, all strategies; then how even the work is."""
    cases = 0
    for layout in rows.layouts():
        for rank in range(layout.cp_size):
            tokens, lengths = layout.rank_rows(rank), list(layout.lengths)
            got, wanted = keys_seen(tokens.clone(), list(lengths)), _keys_seen(layout, rank)
            if got != wanted:
                raise Wrong(
                    f"keys_seen(tokens={tokens.tolist()}, lengths={lengths}) is {got}; each token "
                    f"looks at itself and what comes before it in its own sequence: {wanted} keys"
                )
            cases += 1
    shares = (f"{name} {_slowest_by_mean(keys_seen, name):.2f}" for name in STRATEGIES)
    return Score(cases, note=f"slowest rank by mean over 4 ranks, 4096 tokens: {', '.join(shares)}")


@LESSON.exercise("e3", "the padded length")
def check_padded_len(padded_len: Callable[[list[int], int], int]) -> Score:
    """Never too short for any rank, never longer than needed."""
    cases = slots = needed = 0
    for lengths, cp_size in _batches():
        held = prepare_context_parallel_metadata(lengths, cp_size).per_rank_actual_token
        got = padded_len(list(lengths), cp_size)
        if not isinstance(got, int) or got != max(held):
            raise Wrong(_length_fault(got, lengths, cp_size, held))
        cases, slots, needed = cases + 1, slots + got * cp_size, needed + max(held) * cp_size
    return Score(cases, {"slots": (slots, needed)})


def _keys_seen(layout: ContextParallelMetadata, rank: int) -> int:
    tokens = layout.rank_rows(rank)
    starts = torch.tensor(layout.starts)[layout.sequence_of(tokens)]
    return int((tokens - starts + 1).sum())


def _slowest_by_mean(keys_seen: Callable[[torch.Tensor, list[int]], int], strategy: str) -> float:
    layout = prepare_context_parallel_metadata([4096], 4, strategy)
    work = [keys_seen(layout.rank_rows(rank), [4096]) for rank in range(4)]
    return max(work) / (sum(work) / len(work))


def _batches() -> Iterator[tuple[Sequence[int], int]]:
    for cp_size in range(1, 7):
        yield from (((length,), cp_size) for length in range(2 * cp_size, 4 * cp_size + 2))
    yield (4097,) * 16, 4
    draw = random.Random(3)
    for _ in range(300):
        cp_size = draw.randint(1, 8)
        count = draw.randint(1, 6)
        yield tuple(draw.randint(2 * cp_size, 60) for _ in range(count)), cp_size


def _length_fault(got: object, lengths: Sequence[int], cp_size: int, held: Sequence[int]) -> str:
    shown = f"[{lengths[0]}] * {len(lengths)}" if len(lengths) > 8 else str(list(lengths))
    call = f"padded_len({shown}, {cp_size}) is {got}; the ranks hold {list(held)} rows"
    if not isinstance(got, int):
        return f"{call}, and a length is an int"
    if got > max(held):
        return f"{call}: {max(held)} slots are enough, any more are padding on all ranks"
    rank = held.index(max(held))
    return f"{call}: of rank {rank} the last {max(held) - got} would be cut off"
