"""Exchange small messages through the job's key-value store, with a deadline.

An exchange needs no process group, and its timeout names the ranks that did not arrive. It is used
for rare events, such as making groups and growing a pool.

    rank 0   set 7/0 ── wait for 7/0 7/1 7/2 ── read all
    rank 1     set 7/1 ── wait for 7/0 7/1 7/2 ── read all
    rank 2       (does not arrive)                     ranks 0 and 1: timeout that names rank 2
"""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from functools import cached_property

import msgspec
import torch.distributed as dist

from cpkit.packing import describe_types
from cpkit.settings import deadline_s
from cpkit.sync.free_memory import memory_limits, segment_limits

_made: Counter[str] = Counter()


class ExchangeTimeout(TimeoutError):
    """A rank did not arrive at an exchange in time."""


class StoreExchange:
    """Repeated exchanges between the same ranks, in the same order on each of them."""

    def __init__(self, store: dist.Store, name: str, rank: int, size: int) -> None:
        # Each object has a new prefix, so that it does not read keys that an earlier object of the
        # same name left in the store. All ranks make the same number of objects per name.
        _made[name] += 1
        self._store = dist.PrefixStore(f"cpkit/{name}/{_made[name]}", store)
        self.name, self.rank, self.size = name, rank, size
        self._round = 0

    def exchange(self, message: bytes, purpose: str) -> list[bytes]:
        """Return the messages of all ranks, by rank. Raises ExchangeTimeout naming late ranks."""
        self._round += 1
        keys = [f"{self._round}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], message)  # type: ignore[arg-type] # bytes are fine
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
        # All ranks have arrived at this round, so no rank reads that earlier one any more.
        self._store.delete_key(f"{self._round - 2}/{self.rank}")
        return answers

    @cached_property
    def ranks_by_limit(self) -> Counter[str]:
        """How many of the ranks share each limit of memory, by its key. Collective, once."""
        mine = sorted({limit.key for limit in (*segment_limits(), *memory_limits())})
        answers = self.exchange(msgspec.msgpack.encode(mine), "report its limits of memory")
        return Counter(
            key for answer in answers for key in msgspec.msgpack.decode(answer, type=list[str])
        )


# ------------------------------------------------------------- allocating on all ranks


class SymmetricMemoryError(RuntimeError):
    """Symmetric memory could not be made, or differs between the ranks. Raised on every rank."""


class SegmentOffer(msgspec.Struct):
    """A rank's part of a segment: its name (empty before it is made) and size, or why not."""

    name: str
    nbytes: int
    problem: str = ""


def agree_on_segment(
    exchange: StoreExchange, offer: SegmentOffer, purpose: str
) -> list[SegmentOffer]:
    """Return the offers of all ranks, by rank. Collective, with the exchange's deadline.

        rank 0   allocated 64 MiB ──┐                ┌─▶ equal sizes: continue
        rank 1   allocated 64 MiB ──┼── exchanged ───┤
        rank 2   "out of memory"  ──┘                └─▶ otherwise: raise on every rank

    Raises SymmetricMemoryError on every rank when one has a problem or the sizes differ.
    """
    answers = exchange.exchange(msgspec.msgpack.encode(offer), purpose)
    offers = [msgspec.msgpack.decode(answer, type=SegmentOffer) for answer in answers]
    problems = [f"rank {rank}: {each.problem}" for rank, each in enumerate(offers) if each.problem]
    if problems:
        raise SymmetricMemoryError(f"cannot {purpose}. " + "; ".join(problems))
    if len({each.nbytes for each in offers}) > 1:
        sizes = ", ".join(f"rank {rank}: {each.nbytes}" for rank, each in enumerate(offers))
        raise SymmetricMemoryError(
            f"cannot {purpose}: ranks ask for different sizes ({sizes} bytes). Sizes in symmetric "
            f"memory must come from numbers that are equal on all ranks, such as max_rank_len."
        )
    return offers


describe_types(SegmentOffer)
