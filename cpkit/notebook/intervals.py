"""What the newest samples of several algorithms say: times, ratios, stages, ranks.

    interval   1        2        3        …        n
    padded     sample   sample   sample            sample ┐
    direct     sample   sample   sample            sample ┘ one pair of medians per interval
                        └──────── the time window ───────┘

The gathers of one interval are interleaved, so load on the machine changes all their times alike,
and cancels in the ratio of the interval's medians. The medians of different intervals are treated
as independent, but the gathers inside an interval are not: a busy moment makes many of them slow.

Load does not cancel between a state B and the pinned state A, and a busy moment lasts longer than
an interval. Therefore B is compared with A by the medians of blocks of BLOCK_S.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from cpkit.control.messages import Sample, Workload
from cpkit.timing import FEWEST_FOR_P95, Ratio, percentile

KEPT = 600  # intervals; 72 s at 0.12 s each
BLOCK_S = 1.0  # medians of neighbouring intervals are correlated, those of seconds hardly
FEWEST_IN_WINDOW = 10  # intervals, enough for a ratio also when they are a second apart


class Summary(NamedTuple):
    """One algorithm over the time window. Times are in µs, by the clock of the samples."""

    newest: Sample
    gathers: int
    median_us: float  # of all gathers, each on its slowest rank
    p95_us: float | None  # None for fewer than 5 gathers
    per_rank_us: tuple[float, ...]
    stage_us: dict[str, float]  # mean over ranks
    intervals: int
    block_us: tuple[float, ...]  # medians of all kept blocks of BLOCK_S
    ratio: Ratio | None  # to the first algorithm; None for itself, and for too few intervals

    @property
    def algorithm(self) -> str:
        """The algorithm of the samples."""
        return self.newest.algorithm


class Interval(NamedTuple):
    """One sample per algorithm, their medians, and when the last arrived (`time.monotonic`)."""

    at_s: float
    samples: tuple[Sample, ...]
    medians_us: tuple[float, ...]


class Intervals:
    """The samples of one setting. One thread adds them; any thread reads."""

    def __init__(self, workloads: Sequence[Workload], window_s: float) -> None:
        self.workloads, self._window_s = tuple(workloads), window_s
        self.count = 0  # of complete intervals, also of those that are not kept
        self._arriving: list[Sample] = []
        self._kept: deque[Interval] = deque(maxlen=KEPT)
        self._lock = threading.Lock()

    def add(self, sample: Sample, at_s: float | None = None) -> bool:
        """Add a sample. Return True if it completes an interval.

        It gets the interval's number, because a measurement at another rate numbers from 0 again.
        """
        self._arriving.append(msgspec.structs.replace(sample, sequence=self.count))
        if len(self._arriving) < len(self.workloads):
            return False
        with self._lock:
            now_s = time.monotonic() if at_s is None else at_s
            medians_us = tuple(statistics.median(each.gathers_us) for each in self._arriving)
            self._kept.append(Interval(now_s, tuple(self._arriving), medians_us))
            self._arriving = []
            self.count += 1
        return True

    def latest(self) -> tuple[Sample, ...]:
        """Return the newest sample of each algorithm. Raises IndexError before the first."""
        with self._lock:
            return self._kept[-1].samples

    def samples(self) -> list[Sample]:
        """Return the kept samples, oldest first."""
        with self._lock:
            return [sample for interval in self._kept for sample in interval.samples]

    def summaries(self) -> list[Summary]:
        """Return one summary per algorithm; an empty list before the first interval."""
        window = self._window()
        if not window:
            return []
        medians_us = list(zip(*(interval.medians_us for interval in window), strict=True))
        blocks_us = self._blocks_us()
        summaries = []
        for place, _ in enumerate(self.workloads):
            samples = [interval.samples[place] for interval in window]
            ratio = Ratio.of_pairs(medians_us[place], medians_us[0]) if place else None
            summaries.append(_summary(samples, blocks_us[place], ratio))
        return summaries

    def _blocks_us(self) -> list[tuple[float, ...]]:
        """Return the medians of each algorithm's complete blocks."""
        with self._lock:
            kept = list(self._kept)
        by_block = itertools.groupby(kept, key=lambda interval: interval.at_s // BLOCK_S)
        medians_us = [[interval.medians_us for interval in block] for _, block in by_block][:-1]
        places = range(len(self.workloads))
        return [
            tuple(statistics.median(each[place] for each in block) for block in medians_us)
            for place in places
        ]

    def _window(self) -> list[Interval]:
        """Return the intervals of the last `window_s`, but at least FEWEST_IN_WINDOW."""
        with self._lock:
            kept = list(self._kept)
        if not kept:
            return []
        since_s = kept[-1].at_s - self._window_s
        recent = sum(1 for _ in itertools.takewhile(lambda i: i.at_s >= since_s, reversed(kept)))
        return kept[-max(recent, FEWEST_IN_WINDOW) :]


class Measured(NamedTuple):
    """A setting that was measured: its description, and the results of its algorithms."""

    described: str
    summaries: tuple[Summary, ...]


class Comparison(NamedTuple):
    """A state B beside the baseline A, and the ratio of their times, B to A, if there is one."""

    of_b: Summary
    of_a: Summary
    ratio: Ratio | None

    @property
    def medians_us(self) -> tuple[float, float]:
        """The medians of B and A that the ratio compares; without a ratio, those of the window."""
        if self.ratio is None:
            return self.of_b.median_us, self.of_a.median_us
        return statistics.median(self.of_b.block_us), statistics.median(self.of_a.block_us)


def compare(baseline: Measured, present: Sequence[Summary]) -> list[Comparison]:
    """Compare each algorithm with the same one of the baseline, or else with its first one.

    The two were measured at different times, so their ratio is `Ratio.of_separate`.
    """
    by_name = {summary.algorithm: summary for summary in reversed(baseline.summaries)}
    comparisons = []
    for of_b in present:
        of_a = by_name.get(of_b.algorithm, baseline.summaries[0])
        ratio = Ratio.of_separate(of_b.block_us, of_a.block_us)
        comparisons.append(Comparison(of_b, of_a, ratio))
    return comparisons


def _summary(
    samples: Sequence[Sample], block_us: tuple[float, ...], ratio: Ratio | None
) -> Summary:
    gathers_us = [us for sample in samples for us in sample.gathers_us]
    per_rank = np.median([sample.per_rank_us for sample in samples], axis=0)
    stages = dict.fromkeys(stage for sample in samples for stage in sample.stage_us)
    return Summary(
        newest=samples[-1],
        gathers=len(gathers_us),
        median_us=statistics.median(gathers_us),
        p95_us=percentile(gathers_us, 95) if len(gathers_us) >= FEWEST_FOR_P95 else None,
        per_rank_us=tuple(per_rank.tolist()),
        stage_us={stage: _stage_us(samples, stage) for stage in stages},
        intervals=len(samples),
        block_us=block_us,
        ratio=ratio,
    )


def _stage_us(samples: Sequence[Sample], stage: str) -> float:
    means = [statistics.fmean(s.stage_us[stage]) for s in samples if stage in s.stage_us]
    return statistics.median(means)
