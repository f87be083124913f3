"""Inputs of figures: a small layout, its stages, and a sample."""

from __future__ import annotations

import numpy as np

from cpkit.control.messages import Sample, Workload
from cpkit.layout import prepare_context_parallel_metadata
from cpkit.timing import CALL_TIME
from cpkit_lessons import figures

LAYOUT = prepare_context_parallel_metadata([13, 9], 4)


class Padded:
    """The stages of a padded gather, computed from the layout only."""

    metadata = LAYOUT
    stages = ("pad", "wire", "strip", "reorder")

    def stage(self, name: str, rank: int) -> np.ndarray:
        shards = [figures.rows_of(LAYOUT, r) for r in range(4)]
        padded = [figures.pad_rows(rows, LAYOUT.max_rank_len[0]) for rows in shards]
        wire = np.concatenate(padded)
        strip = wire[wire[:, 1] >= 0]
        return {
            "pad": padded[rank],
            "wire": wire,
            "strip": strip,
            "reorder": strip[LAYOUT.token_order.numpy()],
        }[name]


def sample(cp_size: int = 4, algorithm: str = "padded", first_us: float = 10.0) -> Sample:
    times = tuple(first_us + rank for rank in range(cp_size))
    work = Workload(cp_size=cp_size, lengths=(13, 9), algorithm=algorithm)
    stages = {"pad": times, "wire": times}
    return Sample(
        *(work, 0, 5, CALL_TIME, times, times, times, times, stages),
        *("symmetric", "in the pool", (max(times),) * 5),
    )
