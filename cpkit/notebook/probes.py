"""What single views of the explorer need besides the stream of samples: floor, sweep and pool."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cpkit.control.errors import BadRequest, RequestFailed, WorkersBusy
from cpkit.control.messages import ClockCall, Workload
from cpkit.lab import Lab
from cpkit.notebook.panel import Panel
from cpkit.notebook.views import SWEEPS, floor_us, sweep_lengths

if TYPE_CHECKING:
    import pandas as pd

_POOL_EVERY_S = 2.0
_MOST_FLOORS = 5  # per setting
_SWEEP_ITERATIONS = 5  # gathers per size and algorithm; the stream waits meanwhile
_REFUSALS = (BadRequest, RequestFailed, WorkersBusy)
_LONGEST_REASON = 150  # characters of a refusal that a figure shows


class Probes:
    """Measures for a panel what only its shown view needs."""

    def __init__(self, lab: Lab, panel: Panel) -> None:
        self._lab, self._panel = lab, panel
        self._pool_read_s = -math.inf
        self._floors = 0  # measured for this setting

    def measure(self, workloads: Sequence[Workload]) -> None:
        """Measure the floor, and a sweep once per setting; read the pool periodically."""
        view = self._panel.view
        if view == "bandwidth":
            self._measure_floor(workloads[0])
        if view in SWEEPS and view not in self._panel.sweeps:
            self._panel.sweeps[view] = self._sweep(workloads, by_size=view == "sizes")
        if view == "pool" and time.monotonic() - self._pool_read_s >= _POOL_EVERY_S:
            self._pool_read_s = time.monotonic()
            self._panel.pool = self._lab.pool.stats(workloads[0].cp_size)

    def _measure_floor(self, work: Workload) -> None:
        """Measure the floor; again, a few times, while a gather is faster than the floor.

        Other programs had slowed the measurement down then.
        """
        before = self._panel.floor_us
        if before is None:
            self._floors = 0
        elif (
            isinstance(before, str)
            or self._floors >= _MOST_FLOORS
            or all(summary.median_us >= before for summary in self._panel.summaries)
        ):
            return
        self._floors += 1
        now = self._floor_us(work)
        if before is None or (isinstance(now, float) and now < before):
            self._panel.floor_us = now

    def _floor_us(self, work: Workload) -> float | str:
        """Return the least time of a gather; or the reason, if it cannot be measured."""
        shape = work.arguments()
        del shape["algorithm"]
        calls: list[ClockCall] = ["barrier", "copy"]
        try:
            return floor_us(self._lab.clock(calls, **shape, iterations=12))
        except _REFUSALS as error:
            return f"{error!s:.{_LONGEST_REASON}}"

    def _sweep(self, workloads: Sequence[Workload], *, by_size: bool) -> pd.DataFrame | str:
        """Measure other sizes, or other cp sizes; return the reason, if that is refused."""
        shared = workloads[0].arguments()
        lengths, cp_size = shared.pop("lengths"), shared.pop("cp_size")
        del shared["algorithm"]
        try:
            return self._lab.sweep(
                lengths=sweep_lengths(lengths, cp_size) if by_size else [lengths],
                cp_sizes=[cp_size] if by_size else self._lab.cp_sizes,
                algorithms=[work.algorithm for work in workloads],
                iterations=_SWEEP_ITERATIONS,
                **shared,
            )
        except _REFUSALS as error:
            return f"{error!s:.{_LONGEST_REASON}}"
