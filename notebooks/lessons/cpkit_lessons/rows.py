"""Test data for the checks: rows stamped with their origin, and a description of the first error.

Every row contains its round, rank, sequence and token. Padding is poisoned, and results are
compared bit for bit with the expected rows of `cpkit.provenance`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from cpkit.layout import STRATEGIES, ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.provenance import decode_rows, expected_rows, poison_, shard_rows
from cpkit_lessons.feedback import WrongAnswer

ROW_SHAPE = (2, 8)  # heads, head_dim: 32 bytes of bfloat16, which hold the four stamps
DTYPE = torch.bfloat16
ROW_BYTES = torch.empty(ROW_SHAPE, dtype=DTYPE).nbytes
_ROUNDS = 1024  # the rounds that a stamp can hold


def ragged(cp_size: int) -> list[int]:
    """Return two sequences whose rows zigzag cannot spread evenly over the ranks."""
    return [max(13, 3 * cp_size + 1), max(9, 2 * cp_size + 1)]


def layouts() -> Iterator[ContextParallelMetadata]:
    """Yield small layouts of every strategy, some with empty ranks, then random layouts."""
    yield from (
        prepare_context_parallel_metadata(lengths, cp_size, strategy)
        for strategy in STRATEGIES
        for cp_size in (2, 3, 4, 1)
        for lengths in ([8], [9], [13, 9], [8, 8, 11])
    )
    yield prepare_context_parallel_metadata([3], 4, "interleave")
    yield prepare_context_parallel_metadata([2, 5], 4, "contiguous")
    draw = random.Random(7)
    for _ in range(60):
        cp_size = draw.randint(2, 6)
        lengths = [draw.randint(2 * cp_size, 40) for _ in range(draw.randint(1, 4))]
        yield prepare_context_parallel_metadata(lengths, cp_size, draw.choice(STRATEGIES))


def rounds(
    layouts: Iterator[ContextParallelMetadata],
) -> Iterator[tuple[int, ContextParallelMetadata]]:
    """Yield (round, layout): each layout in two rounds, so that stale rows are detected."""
    number = 0
    for layout in layouts:
        for _ in range(2):
            number = (number + 1) % _ROUNDS
            yield number, layout


def shard(layout: ContextParallelMetadata, rank: int, round_: int) -> torch.Tensor:
    """Return the rows that a rank holds: `[rows, *ROW_SHAPE]`."""
    return shard_rows(layout, rank, ROW_SHAPE, DTYPE, round=round_)


def wire_buffer(layout: ContextParallelMetadata, round_: int) -> torch.Tensor:
    """Return the padded result of the collective: `[slots, *ROW_SHAPE]`, the padding poisoned."""
    longest = layout.max_rank_len[0]
    wire = poison_(torch.empty(layout.cp_size * longest, *ROW_SHAPE, dtype=DTYPE))
    for rank, held in enumerate(layout.per_rank_actual_token):
        wire[rank * longest :][:held] = shard(layout, rank, round_)
    return wire


def token_order(layout: ContextParallelMetadata, round_: int) -> torch.Tensor:
    """Return the rows that attention must read: `[total_tokens, *ROW_SHAPE]`."""
    return expected_rows(layout, ROW_SHAPE, DTYPE, round=round_)


def describe_layout(layout: ContextParallelMetadata) -> str:
    """Return the layout's arguments: `cp_size 4, zigzag, lengths [13, 9]`."""
    return f"cp_size {layout.cp_size}, {layout.strategy}, lengths {list(layout.lengths)}"


def describe_row(row: torch.Tensor) -> str:
    """Return a decoded row as text: `round 7, rank 1, sequence 0, token 3`, or padding."""
    if int(row[1]) < 0:
        return "padding or poison (no rank wrote this slot)"
    names = ("round", "rank", "sequence", "token")
    return ", ".join(f"{name} {int(value)}" for name, value in zip(names, row, strict=True))


def check_rows(call: str, got: object, want: torch.Tensor, layout: ContextParallelMetadata) -> None:
    """Raise WrongAnswer for the first row of `got` that is not bit for bit that of `want`."""
    where = f"{call}, {describe_layout(layout)}"
    if not isinstance(got, torch.Tensor):
        raise WrongAnswer(
            f"{where} returned {type(got).__name__}; expected a tensor {list(want.shape)}"
        )
    if got.dtype != want.dtype or got.shape[1:] != want.shape[1:]:
        raise WrongAnswer(
            f"{where} returned rows {got.dtype}, {list(got.shape[1:])}; expected rows "
            f"{want.dtype}, {list(want.shape[1:])}, as they were passed in"
        )
    held, wanted = decode_rows(got), decode_rows(want)
    for slot in range(max(len(got), len(want))):
        if slot < min(len(got), len(want)) and _same_bits(got[slot], want[slot]):
            continue
        found, expected = (
            describe_row(rows[slot]) if slot < len(rows) else "nothing" for rows in (held, wanted)
        )
        count = f" (expected {len(want)} rows, got {len(got)})" if len(got) != len(want) else ""
        age = _age(held, wanted, slot)
        raise WrongAnswer(f"{where}: slot {slot} holds {found}; expected {expected}{age}{count}")


def _age(held: torch.Tensor, wanted: torch.Tensor, slot: int) -> str:
    """Return `: stale` or `: ahead` if only the round of a row is wrong."""
    if slot >= len(held) or slot >= len(wanted) or held[slot][1] < 0:
        return ""
    if held[slot][1:].tolist() != wanted[slot][1:].tolist():
        return ""
    return ": stale" if held[slot][0] < wanted[slot][0] else ": ahead"


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
