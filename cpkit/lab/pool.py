"""`Lab.pool`: a notebook's view of the symmetric pools of a set of workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpkit.control.client import Client
from cpkit.control.messages import Pool, PoolResult
from cpkit.lab.results import history_table, pool_table

if TYPE_CHECKING:
    import pandas as pd


class PoolLab:
    """The symmetric pool of one cp_size (default: all ranks). Every method returns its statistics.

    One row a rank: rank, segments, arena_bytes, spill_bytes, used_bytes, peak_bytes,
    largest_free_bytes, live_blocks, spills, registrations, registering_ms, spill_ms.
    `table.attrs["note"]` says what happened.
    """

    def __init__(self, client: Client, world_size: int) -> None:
        self._client, self._world_size = client, world_size

    def stats(self, cp_size: int | None = None) -> pd.DataFrame:
        """Look at it."""
        return self._ask(Pool(self._size(cp_size)))

    def history(self, cp_size: int | None = None) -> pd.DataFrame:
        """Rank 0's pool over time, for a plot: one row for each block placed or given back.

        Columns: time_s, used_bytes, peak_bytes, free_bytes, largest_free_bytes, spills. All ranks'
        books are equal, so one rank speaks for all.
        """
        return history_table(self._client.call(Pool(self._size(cp_size)), PoolResult))

    def configure(
        self, prealloc_bytes: int | None = None, cp_size: int | None = None
    ) -> pd.DataFrame:
        """Start over with another arena; None is the default size."""
        body = Pool(self._size(cp_size), "configure", prealloc_bytes=prealloc_bytes)
        return self._ask(body)

    def warm_up(
        self,
        max_tokens: int,
        cp_size: int | None = None,
        *,
        heads: int = 8,
        head_dim: int = 128,
        dtype: str = "bfloat16",
        tensors: int = 2,
    ) -> pd.DataFrame:
        """Make room now for the largest batch, so that no gather up to it spills."""
        body = Pool(
            self._size(cp_size),
            "warm_up",
            max_tokens=max_tokens,
            heads=heads,
            head_dim=head_dim,
            dtype=dtype,
            tensors=tensors,
        )
        return self._ask(body)

    def allocate(self, nbytes: int, cp_size: int | None = None) -> pd.DataFrame:
        """Hold one more block of this size on every rank; spills when the arena is full."""
        return self._ask(Pool(self._size(cp_size), "allocate", nbytes=nbytes))

    def release(self, cp_size: int | None = None) -> pd.DataFrame:
        """Let go of all blocks that `allocate` holds."""
        return self._ask(Pool(self._size(cp_size), "release"))

    def _size(self, cp_size: int | None) -> int:
        return self._world_size if cp_size is None else cp_size

    def _ask(self, body: Pool) -> pd.DataFrame:
        return pool_table(self._client.call(body, PoolResult))
