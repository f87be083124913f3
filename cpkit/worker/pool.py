"""Show, resize, warm up or fill a pool (`Pool`)."""

from __future__ import annotations

import torch

from cpkit.control.messages import Pool, PoolResult
from cpkit.group import CPGroup
from cpkit.memory.pool import SymmetricPool
from cpkit.settings import worker_device
from cpkit.symm import symmetric_pool, use_symmetric_memory
from cpkit.worker.operation import Operation, RankState
from cpkit.worker.workload import DTYPES

_MAX_SAMPLES = 512  # of the history, about 30 kB


class PoolOperation(Operation[Pool]):
    """Run one action, then report the statistics."""

    def only_step(self, group: CPGroup, state: RankState) -> PoolResult:
        """Run the action, and return the statistics of this rank's pool."""
        note = self._act(symmetric_pool(group, worker_device()), state)
        pool = symmetric_pool(group, worker_device())
        pool.free_dropped("look at the pool")  # returns the blocks that all ranks have dropped
        samples = list(pool.samples)[-_MAX_SAMPLES:] if group.rank == 0 else []
        return PoolResult(self.body.cp_size, (pool.stats(),), note, tuple(samples))

    def _act(self, pool: SymmetricPool, state: RankState) -> str:
        """Run the action, and return a note on what it did."""
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
        body, before_bytes = self.body, pool.stats().arena_bytes
        shape, dtype = (body.heads, body.head_dim), DTYPES[body.dtype]
        pool.warm_up(body.max_tokens or 0, shape, dtype, body.tensors)
        arena_bytes = pool.stats().arena_bytes
        if arena_bytes == before_bytes:
            return "the arena was large enough already"
        return f"the arena has {arena_bytes} bytes now"

    def _allocate(self, pool: SymmetricPool, state: RankState) -> str:
        spills_before = pool.stats().spills
        with use_symmetric_memory(pool.group):
            block = torch.empty(self.body.nbytes or 0, dtype=torch.uint8, device=pool.device)
        state.held.setdefault(self.body.cp_size, []).append(block)
        spilled = pool.stats().spills > spills_before
        return "spilled into a new segment" if spilled else "fit the pool"
