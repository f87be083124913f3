"""Times of calls and of their stages, and the statistics over them. Imports no torch.

Every median, percentile and bandwidth that cpkit shows is computed here.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import msgspec

if TYPE_CHECKING:
    from typing import Self

ClockName = Literal["device time", "call time"]
DEVICE_TIME: Final = "device time"
CALL_TIME: Final = "call time"
_OUTSIDE = 0.01  # probability that an interval misses the median
FEWEST_FOR_P95 = 5  # of fewer, the p95 would be the slowest one
FEWEST_VALUES = 8  # of fewer, the smallest and the largest are not far enough apart


class Span(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stage of one rank, in nanoseconds of a monotonic clock."""

    stage: str
    start_ns: int
    stop_ns: int

    @property
    def took_ns(self) -> int:
        """Duration in nanoseconds."""
        return self.stop_ns - self.start_ns


@dataclass
class Timing:
    """Samples of one call on this rank, in µs: by both clocks, and of each stage.

    `call_us` is what a caller waits; `device_us` is the work on the GPU alone, and empty on the CPU
    (see cpkit.bench).
    """

    call_us: list[float] = field(default_factory=list)
    device_us: list[float] = field(default_factory=list)
    stages_us: dict[str, list[float]] = field(default_factory=dict)

    @property
    def clock(self) -> ClockName:
        """The clock of `times_us`."""
        return DEVICE_TIME if self.device_us else CALL_TIME

    @property
    def times_us(self) -> list[float]:
        """The samples that are compared: device time where there is a GPU, otherwise call time."""
        return self.device_us or self.call_us

    @property
    def median_us(self) -> float:
        """The median of `times_us`."""
        return statistics.median(self.times_us)

    @property
    def median_call_us(self) -> float:
        """The median of the call time."""
        return statistics.median(self.call_us)

    def add_stages(self, stages_us: Mapping[str, float]) -> None:
        """Append one sample of each stage."""
        for name, stage_us in stages_us.items():
            self.stages_us.setdefault(name, []).append(stage_us)

    def stage_medians_us(self) -> dict[str, float]:
        """Return the median of each stage; they need not add up to the median of the call."""
        return {name: statistics.median(values) for name, values in self.stages_us.items()}


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that `percent` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return float(ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))])


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the interval of two of the values that has the median inside with 99 % probability.

    The interval of the sign test. It assumes no distribution, only that values are independent.
    Returns None for fewer than 8 values, whose smallest and largest are not enough.
    """
    cut = _cut(len(values))
    ordered = sorted(values)
    return (ordered[cut - 1], ordered[-cut]) if cut else None


@cache
def _cut(count: int) -> int:
    """Return the largest k for which the k-th and the k-th last value are far enough apart.

    The median is below the k-th of n values with the probability of fewer than k heads in n tosses.
    """
    outside = itertools.accumulate(math.comb(count, heads) / 2**count for heads in range(count + 1))
    return sum(1 for _ in itertools.takewhile(lambda tail: tail <= _OUTSIDE / 2, outside))


class Ratio(NamedTuple):
    """A ratio of two times, and an interval that contains it with 99 % probability."""

    value: float
    low: float
    high: float

    @classmethod
    def of_pairs(cls, times_us: Sequence[float], references_us: Sequence[float]) -> Self | None:
        """Return the median ratio of paired times, which were measured one beside the other.

        What slows both times of a pair cancels. Returns None for fewer than 8 pairs.
        """
        ratios = [us / of_us for us, of_us in zip(times_us, references_us, strict=True)]
        interval = median_interval(ratios)
        return cls(statistics.median(ratios), *interval) if interval else None

    @classmethod
    def of_separate(cls, times_us: Sequence[float], references_us: Sequence[float]) -> Self | None:
        """Return the ratio of two medians that were measured at different times.

        Its interval covers all ratios of the two medians' intervals. Returns None for fewer than 8
        values on either side. Load that changed in between is not cancelled.
        """
        of_times, of_references = median_interval(times_us), median_interval(references_us)
        if not of_times or not of_references:
            return None
        value = statistics.median(times_us) / statistics.median(references_us)
        return cls(value, of_times[0] / of_references[1], of_times[1] / of_references[0])

    @property
    def differs(self) -> bool:
        """True unless the interval contains 1."""
        return not self.low <= 1 <= self.high

    def __str__(self) -> str:
        noise = max(self.value - self.low, self.high - self.value)
        digits = 2 if self.value >= 0.1 else 1 - math.floor(math.log10(self.value))
        shown = f"{self.value:.{digits}f} × ± {noise:.{digits}f}"
        if noise > self.value / 4:  # an interval this wide is lopsided
            shown = f"{self.value:.{digits}f} × ({self.low:.{digits}f} to {self.high:.{digits}f})"
        return shown if self.differs else f"no difference seen: {shown}"


def algbw_gbps(total_bytes: int, time_us: float) -> float:
    """Return nccl-tests' algbw in GB/s (1e9): S / t, where S is the size of the gathered result."""
    return total_bytes / time_us / 1e3


def busbw_gbps(total_bytes: int, time_us: float, cp_size: int) -> float:
    """Return nccl-tests' busbw in GB/s (1e9): algbw·(cp−1)/cp, what each link carries."""
    return algbw_gbps(total_bytes, time_us) * (cp_size - 1) / cp_size
