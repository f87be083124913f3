"""Record the stages of a gather: their times, and the arrays they produce.

Recording is off by default; a stage is then a null context. All ranks of one machine read the same
monotonic clock, so the spans of several ranks can be compared. On a GPU a stage is the time between
two events on the stream, converted to the host's clock by a pair of readings taken at GPU idle.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import profiler

from cpkit.devices import finish, is_capturing
from cpkit.settings import worker_device
from cpkit.timing import Span


class Recorder:
    """The stages of the gathers that ran inside `record()`."""

    def __init__(self, keep_arrays: bool) -> None:
        self.keep_arrays = keep_arrays
        self.arrays: dict[str, torch.Tensor] = {}
        self._spans: list[Span] = []
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._zero: torch.cuda.Event | None = None
        if worker_device() == "cuda" and not is_capturing("cuda"):
            finish()
            self._zero_ns, self._zero = time.perf_counter_ns(), _event()

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Time what runs inside."""
        return self._on_gpu(name) if self._zero else _HostStage(name, self._spans)

    @contextmanager
    def _on_gpu(self, name: str) -> Iterator[None]:
        start = _event()
        yield
        self._events.append((name, start, _event()))

    @property
    def spans(self) -> list[Span]:
        """All stages so far; waits for the GPU."""
        if self._events and self._zero:
            finish()
            for name, *edges in self._events:
                start, stop = (self._zero.elapsed_time(edge) * 1e6 for edge in edges)
                span = Span(name, self._zero_ns + round(start), self._zero_ns + round(stop))
                self._spans.append(span)
            self._events.clear()
        return self._spans

    def total_us(self) -> dict[str, float]:
        """Microseconds spent in each stage, in the order of their first appearance."""
        totals: dict[str, float] = {}
        for span in self.spans:
            totals[span.stage] = totals.get(span.stage, 0.0) + span.took_ns / 1e3
        return totals


class _HostStage(AbstractContextManager[None]):
    """Append a span when the block has ended. A generator would add microseconds to every stage."""

    def __init__(self, name: str, spans: list[Span]) -> None:
        self._name, self._spans = name, spans

    def __enter__(self) -> None:
        self._start_ns = time.perf_counter_ns()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._spans.append(Span(self._name, self._start_ns, time.perf_counter_ns()))


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


_recorder: Recorder | None = None
_NO_STAGE: AbstractContextManager[None] = nullcontext()


@contextmanager
def record(keep_arrays: bool = False) -> Iterator[Recorder]:
    """Record every stage inside; with `keep_arrays`, also a copy of each stage's output."""
    global _recorder
    previous, _recorder = _recorder, Recorder(keep_arrays)
    try:
        yield _recorder
    finally:
        _recorder = previous


def is_observed() -> bool:
    """Return True while `record()` or a profiler is active."""
    return _recorder is not None or bool(profiler._is_profiler_enabled)


def stage(name: str) -> AbstractContextManager[None]:
    """Time a stage while `record()` is active; otherwise name it for a profiler that is active.

    The range "cpkit.NAME" appears in traces of torch.profiler, and in those of Nsight Systems
    inside `torch.autograd.profiler.emit_nvtx()`.
    """
    if _recorder:
        return _recorder.stage(name)
    # Without a profiler nothing is entered. The public record_function costs several µs per range.
    return _RecordFunctionFast(f"cpkit.{name}") if profiler._is_profiler_enabled else _NO_STAGE


def keep(name: str, array: torch.Tensor) -> None:
    """Keep a copy of a stage's output while `record(keep_arrays=True)` is active."""
    if _recorder and _recorder.keep_arrays:
        _recorder.arrays.setdefault(name, array.detach().clone())
