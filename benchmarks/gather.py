"""The rank side of the gather benchmark.

    torchrun … -m benchmarks.gather OUTPUT.json BLOCK_SECONDS TOKENS…

First, every variant gathers stamped rows into poisoned memory, and every bit is checked. Then each
variant is timed in its own block. A sample is a barrier and then one call on every rank. A block
has as many samples as fit into BLOCK_SECONDS. The benchmark alternates between launches of cpkit
and of Open MPI. Rank 0 writes every rank's samples.

    direct       one call of all_gather_kv
    plan         the same gather as a prepared call (cpkit.plan)
    padded …     the seed's pipeline over gloo, and with symmetric buffers, as its users call it
    gloo alone   its collective, all_gather_single, without pad, strip and reorder
    memcpy       every rank copies the whole result once, in memory that was touched before
    barrier      a second barrier directly after the one that begins a sample
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cpkit import bench, provenance
from cpkit.gather import ALGORITHMS, all_gather_kv
from cpkit.group import CPGroup, init_context_parallel
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.plan import plan_gather_kv
from cpkit.symm import symmetric_pool
from cpkit.sync.collective import torch_all_gather

Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Config:
    """One size: a single tensor of one sequence."""

    tokens: int
    heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    strategy: str = "zigzag"
    block_s: float = 0.2

    @property
    def total_bytes(self) -> int:
        """Bytes of the gathered tensor."""
        return self.tokens * self.heads * self.head_dim * self.dtype.itemsize


def main() -> None:
    """Benchmark all sizes on the group of all ranks."""
    output, block_s, *tokens = sys.argv[1:]
    dist.init_process_group("gloo")
    group = init_context_parallel(dist.get_world_size())
    sizes = [measure(Config(int(count), block_s=float(block_s)), group) for count in tokens]
    barrier = {"samples_us": barrier_samples_us(group, 0.3, at_most=2000)}
    sizes.append({"tokens": 0, "variants": {"barrier": barrier}})
    if group.rank == 0:
        Path(output).write_text(json.dumps(sizes))
    dist.destroy_process_group()


def measure(config: Config, group: CPGroup) -> dict[str, Any]:
    """Return the samples of every variant in µs, by rank."""
    metadata = prepare_context_parallel_metadata([config.tokens], group.size, config.strategy)
    timed = {
        name: time_block(call, config.block_s, group)
        for name, call in variants(config, metadata, group).items()
    }
    padded = metadata.max_rank_len[0] * group.size * config.total_bytes // config.tokens
    return {"tokens": config.tokens, "padded_bytes": padded, "variants": timed}


def variants(config: Config, metadata: ContextParallelMetadata, group: CPGroup) -> Calls:
    """Return the variants. Raises ProvenanceError if one of them gathers wrong rows."""
    shape = (config.heads, config.head_dim)
    pool = symmetric_pool(group)
    pool.warm_up(config.tokens, shape, config.dtype, tensors=1)
    mine = provenance.shard_rows(metadata, group.rank, shape, config.dtype, round=1)

    def gather(algorithm: str) -> list[torch.Tensor]:
        return all_gather_kv([mine], metadata, group, algorithm=algorithm)

    calls: Calls = {name: (lambda name=name: gather(name)) for name in ALGORITHMS}
    pool.poison_free()
    group.barrier()
    calls["plan"] = plan = plan_gather_kv([mine], metadata, group)
    for _ in range(2):  # a plan has two outputs
        provenance.check(plan()[0], metadata, round=1)
    for name in (*ALGORITHMS, *ALGORITHMS):  # a repeated call takes another way
        pool.poison_free()
        group.barrier()
        provenance.check(gather(name)[0], metadata, round=1)
    return calls | opponents(config, metadata, group)


def opponents(config: Config, metadata: ContextParallelMetadata, group: CPGroup) -> Calls:
    """Return the competitors; their buffers are allocated once and touched before."""
    row_bytes = config.total_bytes // config.tokens
    shard = torch.zeros(metadata.max_rank_len[0], row_bytes, dtype=torch.uint8)
    padded = shard.new_zeros(len(shard) * group.size, row_bytes)
    whole, copy = (np.ones(config.total_bytes, dtype=np.uint8) for _ in range(2))
    return {
        "gloo alone": lambda: torch_all_gather(padded, shard, group),
        "memcpy": lambda: np.copyto(copy, whole),
    }


def time_block(
    call: Callable[[], object], block_s: float, group: CPGroup, at_most: int = 200
) -> dict[str, Any]:
    """Return the samples of one variant by rank: as many as fit into `block_s`, at least 3."""
    trial = bench.time_calls({"": call}, group, 1, warmup=1)[""]
    trial_us = max(max(each.call_us) for each in bench.all_ranks(trial, group))
    iterations = max(3, min(at_most, int(block_s * 1e6 / max(trial_us, 1.0))))
    timing = bench.time_calls({"": call}, group, iterations, warmup=0)[""]
    return {"samples_us": [each.call_us for each in bench.all_ranks(timing, group)]}


def barrier_samples_us(group: CPGroup, block_s: float, at_most: int) -> list[list[float]]:
    """Return samples by rank with only the clock between barriers, as for Open MPI.

    Ranks that share a core also wait for the work of the others between two barriers. The
    bookkeeping of `time_block`, a few µs per rank, would double the time of a barrier of 8 ranks.
    """

    def once() -> float:
        group.barrier()
        start_ns = time.perf_counter_ns()
        group.barrier()
        return (time.perf_counter_ns() - start_ns) / 1e3

    once()
    trial = bench.Timing([once()])
    trial_us = max(max(each.call_us) for each in bench.all_ranks(trial, group))
    iterations = max(3, min(at_most, int(block_s * 1e6 / max(trial_us, 1.0))))
    timing = bench.Timing([once() for _ in range(iterations)])
    return [each.call_us for each in bench.all_ranks(timing, group)]


if __name__ == "__main__":
    main()
