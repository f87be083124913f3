"""The device that rank checks use: `CPKIT_TEST_DEVICE`, "cpu" or "cuda"."""

from __future__ import annotations

import os
from typing import Any

import torch

from cpkit import provenance
from cpkit.group import CPGroup
from cpkit.pool import SymmetricPool
from cpkit.symm import symmetric_pool

DEVICE = os.environ.get("CPKIT_TEST_DEVICE", "cpu")


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
