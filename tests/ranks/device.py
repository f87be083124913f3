"""Where rank checks run: the device `CPKIT_TEST_DEVICE`, "cpu" or "cuda", and all ranks of it."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from cpkit import provenance
from cpkit.group import CPGroup, init_context_parallel
from cpkit.pool import SymmetricPool
from cpkit.symm import symmetric_pool

DEVICE = os.environ.get("CPKIT_TEST_DEVICE", "cpu")


def world_group() -> CPGroup:
    """All ranks as one group."""
    return init_context_parallel(dist.get_world_size())


def shard_rows(*args: Any, **kwargs: Any) -> torch.Tensor:
    """`provenance.shard_rows` on the device."""
    return provenance.shard_rows(*args, **kwargs).to(DEVICE)


def pool_of(group: CPGroup) -> SymmetricPool:
    """The group's pool on the device."""
    return symmetric_pool(group, DEVICE)


def finish() -> None:
    """All that was asked of the device is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
