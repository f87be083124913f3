"""Cut the rows of a rank into tiles, the units of work of the CUDA gather kernel. Pure.

A *run* (`layout.Runs`) is a range of a rank's rows whose tokens lie `step` apart. A tile is a range
of one run, counted in *units*: the widest integers whose size divides every row.

    run      rows 4..8 of the shard, tokens 12..16, 3 units per row
    units    0 1 2 | 3 4 5 | 6 7 8 | 9 10 11
    tiles    └──── 0 ────┘ └─── 1 ────┘ └ 2 ┘         5 units per tile

Where tokens are adjacent and row t goes to position t, a tile is one dense copy (*flat*). Otherwise
its units go to `position(token) · pitch + column` (*mapped*): this is so for tokens of the
interleave strategy, and for rows that a slot mapping stores in a paged cache. The *pitch* is the
distance between two rows of the target. It exceeds the row where the target is a column slice:

    cache    a a a a b b │ a a a a b b │ …      columns a of a cache: row of 4 units, pitch of 6
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cpkit.layout import Integers, Runs

WIDE_BYTES = 16
COLUMNS = ("kind", "tensor", "source", "first", "count", "token", "step", "row_units", "pitch")
FLAT, MAPPED, FLAT_NARROW, MAPPED_NARROW = range(4)
MAX_RUN_UNITS = 1 << 31
_NO_TILES = np.empty((0, len(COLUMNS)), dtype=np.int64)


def unit_bytes(row_bytes: int, positions: int) -> int:
    """Return the unit for rows of this size: 16 bytes (two words), 4 or 1.

    `positions` is the bitwise or of all that must be a multiple of the unit too: the addresses of
    source and target, and the pitch of the target.

    >>> unit_bytes(2048, 0), unit_bytes(132, 0), unit_bytes(2048, 4)
    (16, 4, 4)
    """
    return next(n for n in (WIDE_BYTES, 4, 1) if row_bytes % n == 0 and positions % n == 0)


def tile_table(
    runs: Runs,
    row_bytes: Sequence[int],
    wide: Sequence[bool],
    narrow_bytes: int,
    tile_units: int,
    pitch_bytes: Sequence[int] = (),
) -> torch.Tensor:
    """Return all tiles of a rank for several tensors: int64 `[tiles, len(COLUMNS)]`.

    A `wide` tensor is counted in words of 8 bytes, an even number per tile; the others in units of
    `narrow_bytes`. With `pitch_bytes`, rows are stored by a slot mapping into caches of these
    pitches, so no tile is flat. Runs of 2³¹ units or more are cut into shorter ones, because the
    kernel counts the units of a run in 32 bits. Raises ValueError for a row of that many units.
    """
    sizes = zip(row_bytes, pitch_bytes or row_bytes, wide, strict=True)
    parts = [_NO_TILES]
    for number, (row, pitch, is_wide) in enumerate(sizes):
        unit = 8 if is_wide else narrow_bytes
        if row:
            parts.append(
                _tiles_of(
                    runs,
                    number,
                    row // unit,
                    pitch // unit,
                    tile_units,
                    wide=is_wide,
                    mapped=bool(pitch_bytes),
                )
            )
    return torch.from_numpy(np.concatenate(parts))


def _tiles_of(
    runs: Runs,
    tensor: int,
    row_units: int,
    pitch: int,
    tile_units: int,
    *,
    wide: bool,
    mapped: bool,
) -> Integers:
    if row_units >= MAX_RUN_UNITS:
        raise ValueError(f"a row has {row_units} units; the kernel counts up to {MAX_RUN_UNITS}")
    runs = runs.cut((MAX_RUN_UNITS - 1) // row_units)
    units = runs.length * row_units
    tiles = -(-units // tile_units)
    run = np.repeat(np.arange(len(tiles)), tiles)
    first = tile_units * (np.arange(len(run)) - (np.cumsum(tiles) - tiles)[run])
    flat = (runs.step[run] == 1) & (not mapped)
    columns = {
        "kind": np.where(flat, FLAT, MAPPED) + (0 if wide else FLAT_NARROW),
        "tensor": np.full_like(run, tensor),
        "source": runs.row[run] * row_units,
        "first": first,
        "count": np.minimum(units[run] - first, tile_units),
        "token": runs.token[run],
        "step": runs.step[run],
        "row_units": np.full_like(run, row_units),
        "pitch": np.full_like(run, pitch),
    }
    return np.stack([columns[name] for name in COLUMNS], axis=1)
