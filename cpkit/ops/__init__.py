"""What the ranks can do: one operation for each request that concerns all of them."""

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
from cpkit.ops.base import Operation, RankState
from cpkit.ops.clock import ClockOperation
from cpkit.ops.gather import ExplainOperation, GatherOperation, TraceOperation
from cpkit.ops.measure import MeasureOperation, SweepOperation
from cpkit.ops.pool import PoolOperation
from cpkit.ops.put import PutOperation

__all__ = ["Operation", "RankState", "operation"]

_OPERATIONS: dict[type[Body], type[Operation[Any, Any]]] = {
    Gather: GatherOperation,
    Measure: MeasureOperation,
    Sweep: SweepOperation,
    Clock: ClockOperation,
    Trace: TraceOperation,
    Explain: ExplainOperation,
    Pool: PoolOperation,
    Put: PutOperation,
}


def operation(body: Body) -> Operation[Any, Any]:
    """The operation of a request."""
    return _OPERATIONS[type(body)](body)
