"""The benchmark's own negative controls: a wrong result, and a deliberately slower `direct`."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gather import Config, measure
from cpkit import steps
from cpkit.group import init_context_parallel
from cpkit.provenance import ProvenanceError
from tests.ranks.mutants import planted

SMALL = Config(tokens=512, target_s=0.05)


def check_a_wrong_gather_is_not_timed() -> None:
    def shifted(real: Any, rows: torch.Tensor, *args: Any) -> None:
        real(rows.roll(1, 0), *args)

    group = init_context_parallel(dist.get_world_size())
    with planted(steps, "push_rows", shifted):
        try:
            measure(SMALL, group)
        except ProvenanceError as error:
            assert "wanted round 1" in str(error)  # noqa: PT017
        else:
            raise AssertionError("a wrong gather was timed")


def check_a_slow_one_is_seen() -> None:
    """Only the last rank is slow: the slowest rank is what counts."""

    def slow(real: Any, *args: Any) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            time.sleep(0.02)
        real(*args)

    group = init_context_parallel(dist.get_world_size())
    with planted(steps, "push_rows", slow):
        rows = {str(row["variant"]): row for row in measure(SMALL, group)}
    assert float(str(rows["direct"]["time_us"])) > 20_000
