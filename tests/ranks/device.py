"""The device of the rank checks, and the group, pool and batch that most of them use.

`CPKIT_TEST_DEVICE` is "cpu" or "cuda". On CUDA, `CPKIT_TEST_SHARING` is "own" if each rank has a
GPU of its own; otherwise the ranks share one GPU.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from cpkit import provenance
from cpkit.devices import loaded_nccl_version
from cpkit.group import CPGroup, init_context_parallel
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.memory.path import nccl_rule
from cpkit.memory.pool import SymmetricPool
from cpkit.symm import symmetric_pool

DEVICE = os.environ.get("CPKIT_TEST_DEVICE", "cpu")
OWN_GPU = os.environ.get("CPKIT_TEST_SHARING") == "own"


def world_group() -> CPGroup:
    """Return the group of all ranks."""
    return init_context_parallel(dist.get_world_size())


def shard_rows(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Return `provenance.shard_rows` on the device."""
    return provenance.shard_rows(*args, **kwargs).to(DEVICE)


def batch_of(
    *lengths: int,
    trailing: tuple[int, ...] = (8,),
    dtype: torch.dtype = torch.float32,
    round: int = 1,
    strategy: str = "zigzag",
) -> tuple[CPGroup, ContextParallelMetadata, torch.Tensor]:
    """Return the group of all ranks, a layout over it, and this rank's stamped rows."""
    group = world_group()
    metadata = prepare_context_parallel_metadata(lengths, group.size, strategy)
    return group, metadata, shard_rows(metadata, group.rank, trailing, dtype, round=round)


def pool_of(group: CPGroup) -> SymmetricPool:
    """Return the group's pool on the device."""
    return symmetric_pool(group, DEVICE)


def path_by_table(algorithm: str) -> str:
    """Return the path of a gather. With a GPU per rank, NCCL moves the rows of padded gathers."""
    if algorithm == "direct":
        return "symmetric"
    if algorithm == "padded":
        return "staged" if DEVICE == "cuda" and not OWN_GPU else "fallback"
    if not OWN_GPU:
        return "symmetric"
    enough = ("recv",) if algorithm == "padded_symm_recv" else ("recv", "both")
    return "symmetric" if nccl_rule(loaded_nccl_version()) in enough else "fallback"


def finish() -> None:
    """Wait until the device has finished all its work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
