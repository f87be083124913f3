"""What a gather did when: stages with their times, and the arrays they made.

Off by default and then free: a stage is a null context. All ranks of one machine read the same
monotonic clock, so the spans of several ranks can be laid beside each other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch


class Span(NamedTuple):
    """One stage, in nanoseconds of `time.perf_counter_ns`."""

    name: str
    start_ns: int
    stop_ns: int


class Recorder:
    """The stages of the gathers that ran inside `record()`."""

    def __init__(self, keep_arrays: bool) -> None:
        self.keep_arrays = keep_arrays
        self.spans: list[Span] = []
        self.arrays: dict[str, torch.Tensor] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        start_ns = time.perf_counter_ns()
        yield
        self.spans.append(Span(name, start_ns, time.perf_counter_ns()))

    def total_us(self) -> dict[str, float]:
        """Microseconds spent in each stage, in the order of their first appearance."""
        totals: dict[str, float] = {}
        for name, start_ns, stop_ns in self.spans:
            totals[name] = totals.get(name, 0.0) + (stop_ns - start_ns) / 1e3
        return totals


_recorder: Recorder | None = None
_NOTHING: AbstractContextManager[None] = nullcontext()


@contextmanager
def record(keep_arrays: bool = False) -> Iterator[Recorder]:
    """Record every stage inside; with `keep_arrays`, also a copy of what each stage made."""
    global _recorder
    previous, _recorder = _recorder, Recorder(keep_arrays)
    try:
        yield _recorder
    finally:
        _recorder = previous


def stage(name: str) -> AbstractContextManager[None]:
    """Time a stage, when somebody records."""
    return _recorder.stage(name) if _recorder else _NOTHING


def keep(name: str, array: torch.Tensor) -> None:
    """Keep a copy of what a stage made, when somebody asked for it."""
    if _recorder and _recorder.keep_arrays:
        _recorder.arrays.setdefault(name, array.detach().clone())
