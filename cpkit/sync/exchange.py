"""Meeting with a deadline: every rank says something small, and hears what all the others said.

It goes through the job's key-value store, so it needs no collective to be possible yet, and it can
name the ranks that did not come. Used for rare events: making groups, growing a pool.

    rank 0   set 7/0 ── wait 7/0 7/1 7/2 ── read all
    rank 1     set 7/1 ── wait 7/0 7/1 7/2 ── read all
    rank 2       (never comes)                          ranks 0 and 1: "rank 2 did not arrive"
"""

from __future__ import annotations

import os
from collections import Counter
from datetime import timedelta

import torch.distributed as dist

_made: Counter[str] = Counter()
_LONGEST_S = 86400


class ExchangeTimeout(TimeoutError):
    """Somebody did not arrive in time."""


def deadline_s() -> float:
    """Seconds that a rank waits for others anywhere in cpkit: `CPKIT_DEADLINE_S`, default 30.

    Raises ValueError for what is not a time: a wait must end.
    """
    chosen = os.environ.get("CPKIT_DEADLINE_S") or "30"
    try:
        if 0 < float(chosen) <= _LONGEST_S:
            return float(chosen)
    except ValueError:
        pass
    raise ValueError(
        f"CPKIT_DEADLINE_S is {chosen!r}; it must be seconds, above 0 and up to {_LONGEST_S}"
    )


class StoreExchange:
    """Repeated exchanges between the same ranks, in the same order on each of them."""

    def __init__(self, store: dist.Store, name: str, rank: int, size: int) -> None:
        # Every meeting begins with keys that nobody has used: what an earlier one of this name left
        # in the store is not for us. All ranks make the meetings of a name equally often.
        _made[name] += 1
        self._store = dist.PrefixStore(f"cpkit/{name}/{_made[name]}", store)
        self.name, self.rank, self.size = name, rank, size
        self._turn = 0

    def exchange(self, payload: bytes, purpose: str) -> list[bytes]:
        """Everybody's payload, by rank. Raises ExchangeTimeout naming who did not come."""
        self._turn += 1
        keys = [f"{self._turn}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], payload)  # type: ignore[arg-type] # bytes are fine
        try:
            self._store.wait(keys, timedelta(seconds=deadline_s()))
        except dist.DistStoreError:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            raise ExchangeTimeout(
                f"{self.name}: rank {self.rank} waited {deadline_s():g} s for rank(s) "
                f"{', '.join(map(str, missing))} to {purpose}. Every rank has to make the same "
                f"calls in the same order; CPKIT_DEADLINE_S sets the wait."
            ) from None
        answers = [self._store.get(key) for key in keys]
        # Nobody reads a turn any more once everybody has come to the turn after it.
        self._store.delete_key(f"{self._turn - 2}/{self.rank}")
        return answers
