"""Negative controls of the benchmark: a wrong result, and an artificially slow `direct`."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gather import Config, measure
from benchmarks.rows import summarize
from cpkit.memory import posix
from cpkit.memory.posix import PosixBackend
from cpkit.provenance import ProvenanceError
from cpkit.symm import symmetric_pool
from tests.ranks.device import world_group
from tests.ranks.errors import raised
from tests.ranks.mutants import planted

SMALL = Config(tokens=512, block_s=0.01)
SLOW_S = 0.02


def measured() -> dict[str, float]:
    """Return the time of every variant in µs."""
    variants = measure(SMALL, world_group())["variants"]
    return {name: summarize([timed["samples_us"]])["time_us"] for name, timed in variants.items()}


def check_a_wrong_gather_is_not_timed() -> None:
    kept: list[torch.Tensor] = []  # the prepared copies read this memory

    def shifted(real: Any, backend: Any, peers: Any, rows: torch.Tensor, *args: Any) -> Any:
        kept.append(rows.roll(1, 0))
        return real(backend, peers, kept[-1], *args)

    with planted(PosixBackend, "_copies", shifted):  # used by direct and by the plan
        assert "expected round 1" in raised(ProvenanceError, measured)


def check_a_wrong_repeated_gather_is_not_timed() -> None:
    def nothing(real: Any, tiles: Any, peers: Any, barrier: Any, *args: Any) -> None:
        barrier.barrier()

    symmetric_pool(world_group()).repeated.clear()
    with planted(posix, "_push_dense", nothing):
        assert "expected round 1" in raised(ProvenanceError, measured)
    symmetric_pool(world_group()).repeated.clear()


def check_a_slow_gather_is_detected() -> None:
    """Only the last rank is slow, because the time is that of the slowest rank."""

    def slow(real: Any, *args: Any) -> Any:
        copies = real(*args)
        if dist.get_rank() == dist.get_world_size() - 1:
            copies.append(lambda: time.sleep(SLOW_S))
        return copies

    def slow_push(real: Any, *args: Any) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            time.sleep(SLOW_S)
        real(*args)

    symmetric_pool(world_group()).repeated.clear()
    with planted(PosixBackend, "_copies", slow), planted(posix, "_push_dense", slow_push):
        slowed = measured()
    symmetric_pool(world_group()).repeated.clear()
    assert slowed["direct"] > SLOW_S * 1e6
    assert slowed["plan"] > SLOW_S * 1e6
    assert slowed["memcpy"] < SLOW_S * 1e6


def check_the_samples_include_every_rank() -> None:
    group = world_group()
    variants = measure(SMALL, group)["variants"]
    assert {len(timed["samples_us"]) for timed in variants.values()} == {group.size}
    assert {"direct", "plan", "padded", "gloo alone", "memcpy"} <= variants.keys()
