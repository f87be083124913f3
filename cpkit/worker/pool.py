"""Show, resize, warm up or fill a pool (`Pool`)."""

from __future__ import annotations

import torch

from cpkit.control.messages import Pool, PoolResult
from cpkit.devices import finish
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
        samples = list(pool.history.samples)[-_MAX_SAMPLES:] if group.rank == 0 else []
        return PoolResult(self.body.cp_size, (pool.stats(),), note, tuple(samples))

    def _act(self, pool: SymmetricPool, state: RankState) -> str:
        """Run the action, and return a note on what it did."""
        match self.body.action:
            case "configure":
                return self._configure(pool, state, self.body.prealloc_bytes)
            case "warm_up":
                return self._warm_up(pool, state)
            case "allocate":
                return self._allocate(pool, state)
            case "release" | "leave":
                blocks = len(state.held.pop((state.client, self.body.cp_size), []))
                if self.body.action == "leave":
                    self._trim(pool, state)
                return f"released {blocks} block(s)"
        return ""

    def _configure(self, pool: SymmetricPool, state: RankState, prealloc: int | None) -> str:
        cp_size = self.body.cp_size
        state.held = {key: blocks for key, blocks in state.held.items() if key[1] != cp_size}
        state.arenas.pop(cp_size, None)
        arena_bytes = pool.configure(prealloc).stats().arena_bytes
        if prealloc is not None:
            state.arenas[cp_size] = [state.client], cp_size * arena_bytes
        return f"a new arena of {arena_bytes} bytes"

    def _trim(self, pool: SymmetricPool, state: RankState) -> None:
        """Return what no client needs to the system: spills, and an arena whose clients left."""
        finish()
        pool.trim()
        clients, nbytes = state.arenas.get(self.body.cp_size, ([], 0))
        if state.client in clients:
            clients.remove(state.client)
        if nbytes and not clients and not pool.stats().live_blocks:
            self._configure(pool, state, None)

    def _warm_up(self, pool: SymmetricPool, state: RankState) -> str:
        body, before_bytes = self.body, pool.stats().arena_bytes
        shape, dtype = (body.heads, body.head_dim), DTYPES[body.dtype]
        pool.warm_up(body.max_tokens or 0, shape, dtype, body.tensors)
        arena_bytes = pool.stats().arena_bytes
        clients, _ = state.arenas.get(body.cp_size, ([], 0))
        if arena_bytes == before_bytes:
            if clients and state.client not in clients:
                clients.append(state.client)
            return "the arena was large enough already"
        clients = [state.client, *(client for client in clients if client != state.client)]
        state.arenas[body.cp_size] = clients, body.cp_size * arena_bytes
        return f"the arena has {arena_bytes} bytes now"

    def _allocate(self, pool: SymmetricPool, state: RankState) -> str:
        spills_before = pool.stats().spills
        with use_symmetric_memory(pool.group):
            block = torch.empty(self.body.nbytes or 0, dtype=torch.uint8, device=pool.device)
        state.held.setdefault((state.client, self.body.cp_size), []).append(block)
        spilled = pool.stats().spills > spills_before
        return "spilled into a new segment" if spilled else "fit the pool"
