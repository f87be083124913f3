"""How a CPU rank stores its rows at their final place in every peer's memory: tile by tile.

    for each tile of my rows        loaded from memory once ...
        for each peer, me first     ... and stored to all of them while this core's cache holds it

The tile is 1 MiB, the second-level cache of a server core. Whole blocks instead of tiles load the
rows from memory once for every peer; small tiles keep jumping from page to page. Both cost up to 30
percent at 134 MB. Dense tiles go through C's memmove, whose string instructions need no vector
registers and beat a loop of vector stores by a tenth; rows that lie apart in token order
(interleave) go through torch's strided copy.

Everything that depends on the layout alone is computed once and kept, so a gather does no work per
row, and little per tile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch

from cpkit.layout import ContextParallelMetadata, Runs

TILE_BYTES = 1 << 20
Copy = Callable[[], object]


@lru_cache(maxsize=256)
def tiles(
    metadata: ContextParallelMetadata, rank: int, row_bytes: int, tile_bytes: int = TILE_BYTES
) -> Runs:
    """The rows of a rank in pieces of at most `tile_bytes`, and of at least one row.

    lengths [8], cp_size 2, rows of 1 byte, tiles of 3 bytes: rank 1 holds tokens 2 3 4 5 as
    (row 0, token 2, length 3), (row 3, token 5, length 1)
    """
    return metadata.runs(rank).cut(max(1, tile_bytes // max(1, row_bytes)))


def dense_copies(source: int, targets: Sequence[int], row_bytes: int, pieces: Runs) -> list[Copy]:
    """The copies of rows whose tokens lie side by side, from the address of a rank's rows to that
    of every target. Each is a call without arguments.

    They stay valid as long as the memory does, whatever it holds by then; the caller keeps it.
    """
    in_target, in_source, nbytes = (
        (field * row_bytes).tolist() for field in (pieces.token, pieces.row, pieces.length)
    )
    return [
        partial(ctypes.memmove, target + to, source + start, count)
        for to, start, count in zip(in_target, in_source, nbytes, strict=True)
        for target in targets
    ]


def spread_copies(rows: torch.Tensor, targets: Sequence[torch.Tensor], pieces: Runs) -> list[Copy]:
    """The same for any tokens: from `[rows, lanes]` to every `[tokens, lanes]`."""
    return [
        partial(
            target[token : token + (length - 1) * step + 1 : step].copy_,
            rows[row : row + length],
        )
        for row, token, step, length in zip(*(field.tolist() for field in pieces), strict=True)
        for target in targets
    ]
