"""Times of calls and of their stages, and the statistics over them. Imports no torch.

Every median, percentile and bandwidth that cpkit shows is computed here.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

ClockName = Literal["device time", "call time"]
DEVICE_TIME: Final = "device time"
CALL_TIME: Final = "call time"


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


def algbw_gbps(total_bytes: int, time_us: float) -> float:
    """Return nccl-tests' algbw in GB/s (1e9): S / t, where S is the size of the gathered result."""
    return total_bytes / time_us / 1e3


def busbw_gbps(total_bytes: int, time_us: float, cp_size: int) -> float:
    """Return nccl-tests' busbw in GB/s (1e9): algbw·(cp−1)/cp, what each link carries."""
    return algbw_gbps(total_bytes, time_us) * (cp_size - 1) / cp_size
