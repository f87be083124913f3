"""The table of operations: one per request that all ranks run."""

from __future__ import annotations

from typing import Any

from cpkit.control.messages import (
    Body,
    Clock,
    Explain,
    Gather,
    Measure,
    Pool,
    Put,
    Sweep,
    Trace,
)
from cpkit.worker.clock import ClockOperation
from cpkit.worker.gather import ExplainOperation, GatherOperation, TraceOperation
from cpkit.worker.measure import MeasureOperation, SweepOperation
from cpkit.worker.operation import Operation, RankState
from cpkit.worker.pool import PoolOperation
from cpkit.worker.put import PutOperation

__all__ = ["Operation", "RankState", "operation"]

_OPERATIONS: dict[type[Body], type[Operation[Any]]] = {
    Gather: GatherOperation,
    Measure: MeasureOperation,
    Sweep: SweepOperation,
    Clock: ClockOperation,
    Trace: TraceOperation,
    Explain: ExplainOperation,
    Pool: PoolOperation,
    Put: PutOperation,
}


def operation(body: Body) -> Operation[Any]:
    """Return the operation of a request."""
    return _OPERATIONS[type(body)](body)
