"""How the rows of a rank are cut into tiles, the pieces of work of the CUDA gather kernel. Pure.

A *run* (`layout.Run`) is a range of a rank's rows whose tokens lie `step` apart. A tile is a range
of one run, counted in *units*: the widest integers that every row is a whole number of.

    run      rows 4..8 of the shard, tokens 12..16, 3 units a row
    units    0 1 2 | 3 4 5 | 6 7 8 | 9 10 11
    tiles    └──── 0 ────┘ └─── 1 ────┘ └ 2 ┘         5 units a tile

Where tokens lie side by side and rows go to their token's place, a tile is one dense copy (*flat*).
Otherwise its units go to `place(token) · row_units + column` (*mapped*): tokens of the interleave
strategy, and rows that a slot mapping sends into a paged cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cpkit.layout import Run

WIDE_BYTES = 16
COLUMNS = ("kind", "tensor", "source", "first", "count", "token", "step", "row_units")
FLAT, MAPPED, FLAT_NARROW, MAPPED_NARROW = range(4)
MAX_RUN_UNITS = 1 << 31


def unit_bytes(row_bytes: int, address: int) -> int:
    """The unit for rows of this size at this address: 16 bytes (moved as two words), 4 or 1.

    >>> unit_bytes(2048, 0), unit_bytes(132, 0), unit_bytes(2048, 4)
    (16, 4, 4)
    """
    return next(n for n in (WIDE_BYTES, 4, 1) if row_bytes % n == 0 and address % n == 0)


def tile_table(
    runs: Sequence[Run],
    row_bytes: Sequence[int],
    wide: Sequence[bool],
    narrow_bytes: int,
    tile_units: int,
    *,
    mapped: bool,
) -> torch.Tensor:
    """All tiles of a rank for several tensors: int64 `[tiles, len(COLUMNS)]`.

    A tensor that is `wide` is counted in words of 8 bytes of which each tile has an even number;
    the others in units of `narrow_bytes`. `mapped` says that a slot mapping follows, so that no
    tile is flat. A run of 2³¹ units or more is cut into shorter ones, since the kernel counts the
    units of a run in 32 bits. Raises ValueError for a row of as many.
    """
    parts = [
        _tiles_of_run(run, number, row, is_wide, narrow_bytes, tile_units, mapped)
        for number, (row, is_wide) in enumerate(zip(row_bytes, wide, strict=True))
        if row
        for run in _cut(runs, row // (8 if is_wide else narrow_bytes))
    ]
    return (
        torch.cat(parts) if parts else torch.empty(0, len(COLUMNS), dtype=torch.int64, device="cpu")
    )


def _cut(runs: Sequence[Run], row_units: int) -> Iterator[Run]:
    """The same rows in runs of fewer than MAX_RUN_UNITS units."""
    most = (MAX_RUN_UNITS - 1) // row_units
    if not most:
        raise ValueError(f"a row has {row_units} units; the kernel counts up to {MAX_RUN_UNITS}")
    for run in runs:
        for done in range(0, run.length, most):
            length = min(most, run.length - done)
            yield Run(run.row + done, run.token + done * run.step, run.step, length)


def _tiles_of_run(
    run: Run, tensor: int, row: int, wide: bool, narrow_bytes: int, tile_units: int, mapped: bool
) -> torch.Tensor:
    row_units = row // (8 if wide else narrow_bytes)
    units = run.length * row_units
    first = torch.arange(0, units, tile_units, device="cpu")
    flat = run.step == 1 and not mapped
    kind = (FLAT if flat else MAPPED) if wide else (FLAT_NARROW if flat else MAPPED_NARROW)
    table = torch.empty(len(first), len(COLUMNS), dtype=torch.int64, device="cpu")
    constants = (kind, tensor, run.row * row_units, 0, 0, run.token, run.step, row_units)
    table[:] = torch.tensor(constants, device="cpu")
    table[:, 3] = first
    table[:, 4] = (units - first).clamp(max=tile_units)
    return table
