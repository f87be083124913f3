"""The rank side of the gather benchmark: `torchrun … -m benchmarks.gather OUTPUT.json TOKENS…`.

Correctness first: every variant gathers stamped rows into poisoned memory and is checked bit by
bit. Then all variants are timed interleaved, so that noise meets all of them. Rank 0 writes the
rows.

Opponents: `padded` is the seed's pipeline over gloo, as its users have it; `gloo alone` is its
collective without pad, strip and reorder; `memcpy` is every rank copying the whole result once, the
least that any gather into ordinary memory can do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from cpkit import bench, provenance
from cpkit.gather import ALGORITHMS, all_gather_kv
from cpkit.group import CPGroup, init_context_parallel
from cpkit.layout import prepare_context_parallel_metadata
from cpkit.plain import plain_all_gather
from cpkit.symm import symmetric_pool

OPPONENTS = ("gloo alone", "memcpy")


@dataclass(frozen=True)
class Config:
    """One size: a single tensor of one sequence."""

    tokens: int
    heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    strategy: str = "zigzag"
    target_s: float = 4.0

    @property
    def total_bytes(self) -> int:
        """Bytes of the gathered tensor."""
        return self.tokens * self.heads * self.head_dim * self.dtype.itemsize


def main() -> None:
    """Benchmark all sizes on the group of all ranks."""
    output, *tokens = sys.argv[1:]
    dist.init_process_group("gloo")
    group = init_context_parallel(dist.get_world_size())
    rows = [row for count in tokens for row in measure(Config(int(count)), group)]
    if group.rank == 0:
        Path(output).write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure(config: Config, group: CPGroup) -> list[dict[str, object]]:
    """One row a variant, the slowest rank's figures."""
    calls = variants(config, group)
    iterations = iterations_for(calls["padded"], config, group)
    timings = bench.time_calls(calls, group, iterations)
    return [row(name, bench.slowest(timings[name], group), config, group) for name in calls]


def variants(config: Config, group: CPGroup) -> dict[str, Callable[[], object]]:
    """What is compared. Raises ProvenanceError when one of them gathers wrongly."""
    metadata = prepare_context_parallel_metadata([config.tokens], group.size, config.strategy)
    shape = (config.heads, config.head_dim)
    pool = symmetric_pool(group)
    pool.warm_up(config.tokens, shape, config.dtype, tensors=1)
    mine = provenance.shard_rows(metadata, group.rank, shape, config.dtype, round=1)

    def gather(algorithm: str) -> list[torch.Tensor]:
        return all_gather_kv([mine], metadata, group, algorithm=algorithm)

    for algorithm in ALGORITHMS:
        pool.poison_free()
        group.barrier()
        provenance.check(gather(algorithm)[0], metadata, round=1)
    whole = torch.empty(config.tokens, *shape, dtype=config.dtype)
    shard = torch.empty(metadata.max_rank_len[0], *shape, dtype=config.dtype)
    padded = shard.new_empty(len(shard) * group.size, *shape)
    calls: dict[str, Callable[[], object]] = {
        name: (lambda name=name: gather(name)) for name in ALGORITHMS
    }
    calls["gloo alone"] = lambda: plain_all_gather(padded, shard, group)
    calls["memcpy"] = lambda: whole.copy_(padded[: config.tokens])
    return calls


def iterations_for(call: Callable[[], object], config: Config, group: CPGroup) -> int:
    """As many as fit the time for the slowest variant; the same number on all ranks."""
    trial = bench.time_calls({"trial": call}, group, iterations=1, warmup=1)["trial"]
    slowest_us = bench.slowest(trial, group).median_us
    return max(5, min(50, round(config.target_s * 1e6 / slowest_us)))


def row(name: str, timing: bench.Timing, config: Config, group: CPGroup) -> dict[str, object]:
    """A line of the table, with units in every name."""
    time_us = timing.median_us
    return {
        "variant": name,
        "cp_size": group.size,
        "size_bytes": config.total_bytes,
        "tokens": config.tokens,
        "time_us": time_us,
        "min_us": timing.min_us,
        "p95_us": timing.p95_us,
        "algbw_gbps": bench.algbw_gbps(config.total_bytes, time_us),
        "busbw_gbps": bench.busbw_gbps(config.total_bytes, time_us, group.size),
        "iterations": len(timing.times_us),
        "stage_us": timing.stage_medians_us(),
    }


if __name__ == "__main__":
    main()
