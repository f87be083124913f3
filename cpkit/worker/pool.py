"""Looking at a pool, sizing it, warming it up, and filling it on purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from cpkit.control.messages import Message, Pool, PoolMoment, PoolResult, PoolStats, ReplyBody
from cpkit.devices import default_device
from cpkit.group import CPGroup
from cpkit.memory.pool import SymmetricPool
from cpkit.symm import symmetric_pool, use_symmetric_memory
from cpkit.worker.operation import Operation, RankState
from cpkit.worker.workload import DTYPES

_MAX_SAMPLES = 512  # of the pool's history that travel: some 30 kB


class PoolReport(Message, frozen=True):
    """One rank's pool after the action."""

    stats: PoolStats
    note: str
    history: tuple[PoolMoment, ...] = ()


class PoolOperation(Operation[Pool, PoolReport]):
    """One action, then the statistics."""

    report = PoolReport

    def only_step(self, group: CPGroup, state: RankState) -> PoolReport:
        """The action, and the pool afterwards."""
        note = self._act(symmetric_pool(group, default_device()), state)
        pool = symmetric_pool(group, default_device())
        pool.settle("look at the pool")  # blocks that all ranks have dropped return here
        stats = dataclasses.asdict(pool.stats())
        samples = list(pool.samples)[-_MAX_SAMPLES:] if group.rank == 0 else []
        history = tuple(PoolMoment(*sample) for sample in samples)
        return PoolReport(PoolStats(rank=group.rank, **stats), note, history)

    def collect(self, reports: list[PoolReport], *, over: bool) -> Iterator[ReplyBody]:
        """One row a rank."""
        ranks = tuple(report.stats for report in reports)
        yield PoolResult(self.body.cp_size, ranks, reports[0].note, reports[0].history)

    def _act(self, pool: SymmetricPool, state: RankState) -> str:
        """Do what is asked; what happened, in words."""
        match self.body.action:
            case "configure":
                state.held.pop(self.body.cp_size, None)
                pool = pool.configure(self.body.prealloc_bytes)
                return f"a new arena of {pool.stats().arena_bytes} bytes"
            case "warm_up":
                return self._warm_up(pool)
            case "allocate":
                return self._allocate(pool, state)
            case "release":
                blocks = state.held.pop(self.body.cp_size, [])
                return f"released {len(blocks)} block(s)"
        return ""

    def _warm_up(self, pool: SymmetricPool) -> str:
        body, before = self.body, pool.stats().arena_bytes
        shape, dtype = (body.heads, body.head_dim), DTYPES[body.dtype]
        pool.warm_up(body.max_tokens or 0, shape, dtype, body.tensors)
        arena_bytes = pool.stats().arena_bytes
        if arena_bytes == before:
            return "there was room already"
        return f"the arena has {arena_bytes} bytes now"

    def _allocate(self, pool: SymmetricPool, state: RankState) -> str:
        before = pool.stats().spills
        with use_symmetric_memory(pool.group):
            block = torch.empty(self.body.nbytes or 0, dtype=torch.uint8, device=pool.device)
        state.held.setdefault(self.body.cp_size, []).append(block)
        return "spilled into a new segment" if pool.stats().spills > before else "fit the pool"
