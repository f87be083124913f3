"""Measured times as results: a sample, a sweep, and the raw samples of `Lab.clock`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from cpkit.control.results import Array, ShownResult, WorkloadResult, rank_table
from cpkit.memory.path import PathName
from cpkit.timing import (
    CALL_TIME,
    DEVICE_TIME,
    FEWEST_FOR_P95,
    ClockName,
    algbw_gbps,
    busbw_gbps,
    percentile,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Self

    import numpy as np
    import pandas as pd


class Sample(WorkloadResult, frozen=True, tag="sample", tag_field="is"):
    """One measurement: statistics per rank over `iterations` gathers, in microseconds.

    `clock` says what the times are: device time on a GPU, unless rows go through the host, and
    otherwise call time. The call time is there in both cases (see cpkit.bench).

    The samples of one interval of `Lab.measure` have the same `sequence`. Their gathers are
    interleaved, so equal indices of `gathers_us` are gathers that ran one after the other.
    """

    sequence: int
    iterations: int
    clock: ClockName
    per_rank_us: tuple[float, ...]  # medians
    per_rank_min_us: tuple[float, ...]
    per_rank_p95_us: tuple[float, ...]
    per_rank_call_us: tuple[float, ...]  # medians
    stage_us: dict[str, tuple[float, ...]]  # medians per rank, of gathers that took every step
    path: PathName
    path_reason: str
    gathers_us: tuple[float, ...] = ()  # each gather on its slowest rank; () in a sweep

    joined = ("per_rank_us", "per_rank_min_us", "per_rank_p95_us", "per_rank_call_us")

    @classmethod
    def of_all_ranks(cls, parts: Sequence[Self]) -> Self:
        """Join the parts, and the times of equal stages. A gather takes as long as its slowest."""
        stage_us = {
            name: tuple(us for part in parts for us in part.stage_us.get(name, (0.0,)))
            for name in dict.fromkeys(name for part in parts for name in part.stage_us)
        }
        gathers_us = tuple(map(max, zip(*(part.gathers_us for part in parts), strict=True)))
        return msgspec.structs.replace(
            super().of_all_ranks(parts), stage_us=stage_us, gathers_us=gathers_us
        )

    @property
    def time_us(self) -> float:
        """Median time of the gather on its slowest rank."""
        return max(self.per_rank_us)

    @property
    def min_us(self) -> float:
        """Shortest time of the gather on each rank; the maximum over ranks."""
        return max(self.per_rank_min_us)

    @property
    def p95_us(self) -> float:
        """95th percentile of the gather's time on each rank; the maximum over ranks."""
        return max(self.per_rank_p95_us)

    @property
    def call_us(self) -> float:
        """Median time that a caller waits for the gather, on the slowest rank."""
        return max(self.per_rank_call_us)

    @property
    def host_bound(self) -> bool:
        """True if a caller waits for the host more than for the GPU: then capture the call."""
        return self.clock == DEVICE_TIME and self.call_us > 2 * self.time_us

    @property
    def algbw_gbps(self) -> float:
        """Gathered bytes per second, in 1e9 bytes/s (nccl-tests' algbw)."""
        return algbw_gbps(self.total_bytes, self.time_us)

    @property
    def busbw_gbps(self) -> float:
        """Bandwidth that each link must carry, in 1e9 bytes/s: algbw·(cp−1)/cp."""
        return busbw_gbps(self.total_bytes, self.time_us, self.cp_size)

    def row(self) -> dict[str, object]:
        """Return the sample as a table row with nccl-tests' columns."""
        work = self.workload
        return {
            "size_bytes": self.total_bytes,
            "count": sum(work.lengths) * work.heads * work.head_dim * work.tensors,
            "type": work.dtype,
            "algorithm": work.algorithm,
            "cp_size": work.cp_size,
            "strategy": work.strategy,
            "symmetric": work.symmetric,
            "lengths": list(work.lengths),
            "clock": self.clock,
            "time_us": self.time_us,
            "min_us": self.min_us,
            "p95_us": self.p95_us,
            "call_us": self.call_us,
            "host_bound": self.host_bound,
            "algbw_gbps": self.algbw_gbps,
            "busbw_gbps": self.busbw_gbps,
            "path": self.path,
            "path_reason": self.path_reason,
            "iterations": self.iterations,
        }

    @property
    def table(self) -> pd.DataFrame:
        """One row per rank: rank, time_us, min_us, p95_us (by `clock`), call_us."""
        return rank_table(
            self.cp_size,
            time_us=self.per_rank_us,
            min_us=self.per_rank_min_us,
            p95_us=self.per_rank_p95_us,
            call_us=self.per_rank_call_us,
        ).round(1)

    def summary(self) -> str:
        """Return the times with their clocks, bandwidths and path in one line."""
        has_p95 = self.iterations >= FEWEST_FOR_P95
        spread = f", p95 {self.p95_us:.0f} µs" if has_p95 else ""
        call = ""
        if self.clock == DEVICE_TIME:
            bound = ", most of it on the host" if self.host_bound else ""
            call = f", {CALL_TIME} {self.call_us:.0f} µs{bound}"
        return (
            f"{self.algorithm}, cp_size {self.cp_size}, {self.total_bytes} bytes: {self.clock} "
            f"{self.time_us:.0f} µs{spread}, algbw {self.algbw_gbps:.2f} GB/s, "
            f"busbw {self.busbw_gbps:.2f} GB/s, path {self.path}{call}"
        )

    def __repr__(self) -> str:
        return self.summary()


class SweepResult(ShownResult, frozen=True, tag="sweep_result", tag_field="is"):
    """One sample per workload: all of a sweep, or those of one interval of a measurement."""

    rows: tuple[Sample, ...]

    @classmethod
    def of_all_ranks(cls, parts: Sequence[Self]) -> Self:
        """Join the samples of each workload."""
        workloads = zip(*(part.rows for part in parts), strict=True)
        return cls(tuple(map(Sample.of_all_ranks, workloads)))

    @property
    def table(self) -> pd.DataFrame:
        """nccl-tests' columns, one row per workload. Times are those of the slowest rank.

        `time_us` is by `clock`: device time on a GPU. `call_us` is what an eager caller waits;
        where `host_bound` is true, most of that is the host's work.
        """
        import pandas as pd

        return pd.DataFrame([sample.row() for sample in self.rows])


class ClockResult(WorkloadResult, frozen=True, tag="clock_result", tag_field="is"):
    """Start and end of every call on every rank. A repeated call gets a number, as in `direct#2`.

    Times are call times in microseconds, on one clock. The time of a gather is that of its slowest
    rank. Workers on a GPU add the device time of every call but `barrier`.
    """

    calls: tuple[str, ...]
    samples_us: Array  # float64 [calls, iterations, ranks, 2]: start and end
    device_samples_us: Array  # float64 [calls, iterations, ranks]; no iterations without them

    @staticmethod
    def numbered(calls: Iterable[str]) -> tuple[str, ...]:
        """Return the names of the calls; the second call of a name ends in #2, and so on."""
        names: list[str] = []
        for call in calls:
            count = sum(name.partition("#")[0] == call for name in names) + 1
            names.append(call if count == 1 else f"{call}#{count}")
        return tuple(names)

    @classmethod
    def of_all_ranks(cls, parts: Sequence[Self]) -> Self:
        """Join the samples, in microseconds since the first start."""
        import numpy as np

        samples = np.concatenate([part.samples_us.numpy() for part in parts], axis=2)
        device = np.concatenate([part.device_samples_us.numpy() for part in parts], axis=2)
        return msgspec.structs.replace(
            parts[0],
            samples_us=Array.of(samples - samples.min()),
            device_samples_us=Array.of(device),
        )

    def begin_us(self, call: str) -> np.ndarray:
        """Return when each rank started, as `times_us` does."""
        return self._samples(call)[..., 0]

    def times_us(self, call: str) -> np.ndarray:
        """Return how long each rank took: float64 `[iterations, ranks]`.

        Raises ValueError for a call that was not timed.
        """
        samples = self._samples(call)
        times: np.ndarray = samples[..., 1] - samples[..., 0]
        return times

    def slowest_us(self, call: str) -> np.ndarray:
        """Return the time of the slowest rank of each iteration: float64 `[iterations]`."""
        slowest: np.ndarray = self.times_us(call).max(axis=1)
        return slowest

    def median_us(self, call: str) -> float:
        """Return the median over iterations of the slowest rank's time, in µs."""
        import numpy as np

        return float(np.median(self.slowest_us(call)))

    def device_us(self, call: str) -> np.ndarray:
        """Return the device time of each rank: float64 `[iterations, ranks]`.

        There are no iterations on the CPU, and when a call waits for the GPU (see cpkit.bench). The
        barrier, which runs on the host, has no numbers.
        """
        self._samples(call)
        times: np.ndarray = self.device_samples_us.numpy()[self.calls.index(call)]
        return times

    @property
    def table(self) -> pd.DataFrame:
        """One row per call, of the slowest rank: call, time_us, min_us, p95_us, iterations.

        These are call times. Workers on a GPU add `device_us`, the median device time.
        """
        import numpy as np
        import pandas as pd

        rows = [
            {
                "call": call,
                "time_us": self.median_us(call),
                "min_us": float(self.slowest_us(call).min()),
                "p95_us": percentile(self.slowest_us(call).tolist(), 95),
                "iterations": len(self.slowest_us(call)),
            }
            for call in self.calls
        ]
        table = pd.DataFrame(rows)
        if self.device_samples_us.numpy().size:
            medians = [np.median(self.device_us(call).max(axis=1)) for call in self.calls]
            table.insert(2, "device_us", medians)
        return table

    def summary(self) -> str:
        """Return what was gathered in one line."""
        return f"{self.total_bytes} bytes over cp_size {self.cp_size}"

    def _samples(self, call: str) -> np.ndarray:
        if call not in self.calls:
            raise ValueError(f"{call!r} was not timed; use one of {', '.join(self.calls)}")
        samples: np.ndarray = self.samples_us.numpy()[self.calls.index(call)]
        return samples
