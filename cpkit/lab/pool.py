"""`Lab.pool`: a notebook's interface to the symmetric pools of a set of workers."""

# Annotations are evaluated here, so that `help()` and Shift-Tab show the allowed values.

from typing import TYPE_CHECKING

from cpkit.control.client import Client
from cpkit.control.messages import Pool, PoolResult, dtype_name

if TYPE_CHECKING:
    import pandas as pd
    import torch


class LabPool:
    """Inspect and change the symmetric pool of one cp_size (default: all ranks).

    Every method except `history` returns its statistics, one row per rank: rank, segments,
    arena_bytes, spill_bytes, used_bytes, peak_bytes, largest_free_bytes, live_blocks, spills,
    spill_ms, registrations, registering_ms. `table.attrs["note"]` says what the method did.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    def __repr__(self) -> str:
        connection = self._client.connection
        return (
            f"LabPool of workers {connection.name!r}, {connection.world_size} ranks: stats(), "
            f"history(), configure(), warm_up(), allocate(), release()"
        )

    def stats(self, cp_size: int | None = None) -> "pd.DataFrame":
        """Return the statistics."""
        return self._call(Pool(self._size(cp_size))).table

    def history(self, cp_size: int | None = None) -> "pd.DataFrame":
        """Return rank 0's pool over time, one row per allocated or freed block.

        Columns: time_s, used_bytes, peak_bytes, free_bytes, largest_free_bytes, spills. All ranks
        allocate the same blocks, so their pools are equal.
        """
        return self._call(Pool(self._size(cp_size))).history_table

    def configure(
        self, prealloc_bytes: int | None = None, cp_size: int | None = None
    ) -> "pd.DataFrame":
        """Replace the pool by one with an arena of this size; None is the default size."""
        return self._call(
            Pool(self._size(cp_size), "configure", prealloc_bytes=prealloc_bytes)
        ).table

    def warm_up(
        self,
        max_tokens: int,
        cp_size: int | None = None,
        *,
        heads: int = 8,
        head_dim: int = 128,
        dtype: "str | torch.dtype" = "bfloat16",
        tensors: int = 2,
    ) -> "pd.DataFrame":
        """Grow the arena so that no gather of up to this size spills."""
        return self._call(
            Pool(
                self._size(cp_size),
                "warm_up",
                max_tokens=max_tokens,
                heads=heads,
                head_dim=head_dim,
                dtype=dtype_name(dtype),
                tensors=tensors,
            )
        ).table

    def allocate(self, nbytes: int, cp_size: int | None = None) -> "pd.DataFrame":
        """Allocate one more block of this size on every rank; it spills if the arena is full."""
        return self._call(Pool(self._size(cp_size), "allocate", nbytes=nbytes)).table

    def release(self, cp_size: int | None = None) -> "pd.DataFrame":
        """Free all blocks of `allocate`."""
        return self._call(Pool(self._size(cp_size), "release")).table

    def _size(self, cp_size: int | None) -> int:
        return self._client.connection.world_size if cp_size is None else cp_size

    def _call(self, body: Pool) -> PoolResult:
        return self._client.call(body, PoolResult)
