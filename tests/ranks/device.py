"""Where rank checks run: the device `CPKIT_TEST_DEVICE`, "cpu" or "cuda", and all ranks of it.

On CUDA, `CPKIT_TEST_SHARING` is "own" where each rank has a GPU, else the ranks share one.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from cpkit import provenance
from cpkit.devices import loaded_nccl_version
from cpkit.group import CPGroup, init_context_parallel
from cpkit.memory.path import nccl_rule
from cpkit.memory.pool import SymmetricPool
from cpkit.symm import symmetric_pool

DEVICE = os.environ.get("CPKIT_TEST_DEVICE", "cpu")
OWN_GPU = os.environ.get("CPKIT_TEST_SHARING") == "own"


def world_group() -> CPGroup:
    """All ranks as one group."""
    return init_context_parallel(dist.get_world_size())


def shard_rows(*args: Any, **kwargs: Any) -> torch.Tensor:
    """`provenance.shard_rows` on the device."""
    return provenance.shard_rows(*args, **kwargs).to(DEVICE)


def pool_of(group: CPGroup) -> SymmetricPool:
    """The group's pool on the device."""
    return symmetric_pool(group, DEVICE)


def path_by_table(algorithm: str) -> str:
    """The path of a gather, from who moves its rows: our stores, or NCCL with a GPU per rank."""
    if algorithm == "direct":
        return "symmetric"
    if algorithm == "padded":
        return "staged" if DEVICE == "cuda" and not OWN_GPU else "fallback"
    if not OWN_GPU:
        return "symmetric"
    enough = ("recv",) if algorithm == "padded_symm_recv" else ("recv", "both")
    return "symmetric" if nccl_rule(loaded_nccl_version()) in enough else "fallback"


def finish() -> None:
    """All that was asked of the device is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
