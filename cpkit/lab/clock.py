"""`Lab.clock`: raw samples of every rank, for those who want to look behind a median."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

from cpkit.control.client import Client
from cpkit.control.errors import BadRequest
from cpkit.control.messages import Clock, ClockCall, ClockResult, Workload

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


class Clocked:
    """When each rank began and ended each call. Calls that were named twice are told apart by #2.

    Times are microseconds; a gather's time is that of its slowest rank.
    """

    def __init__(self, result: ClockResult) -> None:
        self.workload = result.workload
        self.cp_size = result.workload.cp_size
        self.total_bytes = result.workload.total_bytes
        self.calls = _told_apart(result.calls)
        self._spans = result.samples_us.numpy()

    def begin_us(self, call: str) -> np.ndarray:
        """When each rank began: float64 `[iterations, ranks]`, one clock for all. As `times_us`."""
        return self._of(call)[..., 0]

    def times_us(self, call: str) -> np.ndarray:
        """How long each rank took: float64 `[iterations, ranks]`. Raises ValueError for a call that
        was not timed.
        """
        spans = self._of(call)
        times: np.ndarray = spans[..., 1] - spans[..., 0]
        return times

    def slowest_us(self, call: str) -> np.ndarray:
        """The slowest rank of each iteration: float64 `[iterations]`."""
        slowest: np.ndarray = self.times_us(call).max(axis=1)
        return slowest

    def median_us(self, call: str) -> float:
        """Half of the iterations had their slowest rank done by then."""
        import numpy as np

        return float(np.median(self.slowest_us(call)))

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a call: call, time_us, min_us, p95_us, iterations; of the slowest rank."""
        import numpy as np
        import pandas as pd

        rows = [
            {
                "call": call,
                "time_us": self.median_us(call),
                "min_us": float(self.slowest_us(call).min()),
                "p95_us": float(np.percentile(self.slowest_us(call), 95)),
                "iterations": len(self.slowest_us(call)),
            }
            for call in self.calls
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        return (
            f"{self.total_bytes} bytes over cp_size {self.cp_size}\n"
            f"{self.table.to_string(index=False)}"
        )

    def _repr_html_(self) -> str:
        table: str = self.table.round(1).to_html(index=False, border=0)
        return f"<p>{self.total_bytes} bytes over cp_size {self.cp_size}</p>{table}"

    def _of(self, call: str) -> np.ndarray:
        if call not in self.calls:
            raise ValueError(f"{call!r} was not timed; what was: {', '.join(self.calls)}")
        spans: np.ndarray = self._spans[self.calls.index(call)]
        return spans


class ClockLab:
    """Times calls on the workers and brings back every sample of every rank."""

    def __init__(self, client: Client, workload: Callable[..., Workload]) -> None:
        self._client, self._workload = client, workload

    def __call__(
        self,
        calls: Sequence[ClockCall],
        lengths: int | Sequence[int],
        cp_size: int | None = None,
        *,
        iterations: int = 20,
        warmup: int = 2,
        barrier: bool = True,
        late_us: float = 0.0,
        **options: Any,
    ) -> Clocked:
        """Time the calls in turn: A B C, A B C, …

        Calls are algorithms, and what else `Clock` names (`barrier`, `copy`, `copy_fresh`,
        `collective`, `launch`). `warmup=0` and `barrier=False` leave out what a fair clock needs;
        rank r comes `r · late_us` late. Raises BadRequest for bad input.
        """
        unknown = [call for call in calls if call not in get_args(ClockCall)]
        if unknown:
            raise BadRequest(
                f"calls has {unknown}; what can be timed is {', '.join(get_args(ClockCall))}"
            )
        workload = self._workload(lengths, cp_size, **options)
        body = Clock(workload, tuple(calls), iterations, warmup, barrier, float(late_us))
        return Clocked(self._client.call(body, ClockResult))


def _told_apart(names: Sequence[str]) -> tuple[str, ...]:
    """Names, the second of a kind with #2 and so on."""
    seen: list[str] = []
    for name in names:
        times = sum(other.partition("#")[0] == name for other in seen) + 1
        seen.append(name if times == 1 else f"{name}#{times}")
    return tuple(seen)
