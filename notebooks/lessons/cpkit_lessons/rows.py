"""Level-4 data for checks: rows that say who wrote them, and words for the first one that is wrong.

Round, rank, sequence and token are in every row, padding is poisoned, and results are compared bit
for bit with what the formula says. See `cpkit.provenance`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from cpkit.layout import STRATEGIES, ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.provenance import decode_rows, expected_rows, poison_, shard_rows
from cpkit_lessons.feedback import Wrong

ROW_SHAPE = (2, 8)  # heads, head_dim: 32 bytes of bfloat16, enough for four stamps
DTYPE = torch.bfloat16
_ROUNDS = 1024  # what a stamp can count


def layouts() -> Iterator[ContextParallelMetadata]:
    """Small layouts of every strategy first, with ranks that hold nothing; then random ones."""
    yield from (
        prepare_context_parallel_metadata(lengths, cp_size, strategy)
        for strategy in STRATEGIES
        for cp_size in (1, 2, 3, 4)
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
    metadatas: Iterator[ContextParallelMetadata],
) -> Iterator[tuple[int, ContextParallelMetadata]]:
    """Each layout in two rounds one after the other, so that what is kept from the first shows."""
    number = 0
    for metadata in metadatas:
        for _ in range(2):
            number = (number + 1) % _ROUNDS
            yield number, metadata


def wire_buffer(metadata: ContextParallelMetadata, round_: int) -> torch.Tensor:
    """What a rank holds after the wire: `[slots, *ROW_SHAPE]`, the padding poisoned."""
    longest = metadata.max_rank_len[0]
    wire = poison_(torch.empty(metadata.cp_size * longest, *ROW_SHAPE, dtype=DTYPE))
    for rank in range(metadata.cp_size):
        rows = shard_rows(metadata, rank, ROW_SHAPE, DTYPE, round=round_)
        wire[rank * longest : rank * longest + len(rows)] = rows
    return wire


def token_order(metadata: ContextParallelMetadata, round_: int) -> torch.Tensor:
    """What attention must read, by the formula: `[total_tokens, *ROW_SHAPE]`."""
    return expected_rows(metadata, ROW_SHAPE, DTYPE, round=round_)


def must_equal(
    call: str, got: object, want: torch.Tensor, metadata: ContextParallelMetadata
) -> None:
    """Raise Wrong, decoding the first wrong row, unless `got` has the bits of `want`."""
    layout = f"cp_size {metadata.cp_size}, {metadata.strategy}, lengths {list(metadata.lengths)}"
    where = f"{call}, {layout}"
    if not isinstance(got, torch.Tensor):
        raise Wrong(f"{where} returned {type(got).__name__}; wanted a tensor {list(want.shape)}")
    if got.dtype != want.dtype or got.shape[1:] != want.shape[1:]:
        raise Wrong(
            f"{where} returned rows {got.dtype}, {list(got.shape[1:])}; leave them as they are"
        )
    held, wanted = decode_rows(got), decode_rows(want)
    for slot in range(max(len(got), len(want))):
        if slot >= len(got) or slot >= len(want) or not _same(got[slot], want[slot]):
            first = [
                words(rows[slot]) if slot < len(rows) else "nothing" for rows in (held, wanted)
            ]
            count = f" ({len(got)} rows, wanted {len(want)})" if len(got) != len(want) else ""
            raise Wrong(
                f"{where}: slot {slot} holds {first[0]}; wanted {first[1]}"
                f"{_kind(held, wanted, slot)}{count}"
            )


def words(row: torch.Tensor) -> str:
    """A decoded row in words: `round 7, rank 1, sequence 0, token 3`, or padding."""
    if int(row[1]) < 0:
        return "padding (poison: nobody wrote here)"
    names = ("round", "rank", "sequence", "token")
    return ", ".join(f"{name} {int(value)}" for name, value in zip(names, row, strict=True))


def _kind(held: torch.Tensor, wanted: torch.Tensor, slot: int) -> str:
    if slot >= len(held) or slot >= len(wanted) or held[slot][1] < 0:
        return ""
    if held[slot][1:].tolist() != wanted[slot][1:].tolist():
        return ""
    return ": stale" if held[slot][0] < wanted[slot][0] else ": ahead"


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
