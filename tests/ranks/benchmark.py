"""The benchmark's own negative controls: a wrong result, and a deliberately slower `direct`."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gather import Config, measure
from benchmarks.rows import summarize
from cpkit.memory.posix import PosixBackend
from cpkit.provenance import ProvenanceError
from tests.ranks.device import world_group
from tests.ranks.mutants import planted

SMALL = Config(tokens=512, block_s=0.01)
SLOW_S = 0.02


def measured() -> dict[str, float]:
    """The time of every variant, in µs."""
    variants = measure(SMALL, world_group())["variants"]
    return {name: summarize([timed["samples_us"]])["time_us"] for name, timed in variants.items()}


def check_a_wrong_gather_is_not_timed() -> None:
    kept: list[torch.Tensor] = []  # the copies read their memory

    def shifted(real: Any, backend: Any, peers: Any, rows: torch.Tensor, *args: Any) -> Any:
        kept.append(rows.roll(1, 0))
        return real(backend, peers, kept[-1], *args)

    with planted(PosixBackend, "_copies", shifted):  # of direct, and of the plan as well
        try:
            measured()
        except ProvenanceError as error:
            assert "wanted round 1" in str(error)  # noqa: PT017
        else:
            raise AssertionError("a wrong gather was timed")


def check_a_slow_one_is_seen() -> None:
    """Only the last rank is slow: the slowest rank is what counts."""

    def slow(real: Any, *args: Any) -> Any:
        copies = real(*args)
        if dist.get_rank() == dist.get_world_size() - 1:
            copies.append(lambda: time.sleep(SLOW_S))
        return copies

    with planted(PosixBackend, "_copies", slow):
        slowed = measured()
    assert slowed["direct"] > SLOW_S * 1e6
    assert slowed["plan"] > SLOW_S * 1e6
    assert slowed["memcpy"] < SLOW_S * 1e6


def check_every_rank_is_in_the_samples() -> None:
    group = world_group()
    variants = measure(SMALL, group)["variants"]
    assert {len(timed["samples_us"]) for timed in variants.values()} == {group.size}
    assert {"direct", "plan", "padded", "gloo alone", "memcpy"} <= variants.keys()
