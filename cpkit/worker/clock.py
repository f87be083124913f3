"""Raw samples: when each rank began and ended each call, all on one clock (`Clock`).

    one iteration of one call, on two ranks; rank r comes r · late_us after the meeting

    rank 0   meet ─────────────────│barrier│ begin ══ call ══ end
    rank 1   meet ─── late_us ─────│barrier│ begin ══ call ══ end

Warm-up and the barrier before the clock can be left out, which is how times go wrong: a notebook
shows what each omission does. What is timed stays right: every gather is compared bit by bit,
before the clock starts, or after it stopped where the cold start is what is looked at.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count

import msgspec
import torch
import torch.distributed as dist

from cpkit.algorithms import ALGORITHMS
from cpkit.control.messages import Array, Clock, ClockResult, Message, Progress, ReplyBody
from cpkit.devices import finish
from cpkit.group import CPGroup
from cpkit.sync.collective import ordinary_all_gather
from cpkit.worker.operation import Operation, RankState, Steps
from cpkit.worker.workload import Run, longest_s, prepare

_CHUNK_S = 0.05  # work between two looks at who else waits

Call = Callable[[], object]


class ClockReport(Message, frozen=True):
    """One rank's progress; at the end its samples: (begin, end) in ns, call by call."""

    done: int
    samples_ns: tuple[tuple[int, int], ...] = ()


class ClockOperation(Operation[Clock, ClockReport]):
    """All calls of one iteration in turn: noise meets all of them."""

    report = ClockReport

    def steps(self, group: CPGroup, state: RankState) -> Steps[ClockReport]:
        """As many iterations a step as fit a chunk of time; the ranks agree on how many."""
        body = self.body
        bench = _Bench(prepare(body.workload, group, state.round), group)
        calls = [bench.call(name) for name in body.calls]
        if body.warmup:
            bench.verify(body.calls)
        samples: list[list[tuple[int, int]]] = [[] for _ in calls]
        started_s = time.monotonic()
        for iteration in count(-body.warmup):
            for call, kept in zip(calls, samples, strict=True):
                sample = _sample(call, group, body)
                if iteration >= 0:
                    kept.append(sample)
            if iteration + 1 == body.iterations:
                break
            if longest_s(time.monotonic() - started_s, group) > _CHUNK_S:
                yield ClockReport(max(0, iteration + 1))
                started_s = time.monotonic()
                if body.warmup:  # after a rest, the first one is slow
                    for call in calls:
                        _sample(call, group, body)
        if not body.warmup:
            bench.verify(body.calls)
        return ClockReport(body.iterations, tuple(pair for kept in samples for pair in kept))

    def collect(self, reports: list[ClockReport], *, over: bool) -> Iterator[ReplyBody]:
        """Progress, or all samples on one clock that begins with the first of them."""
        body = self.body
        if not over:
            yield Progress(reports[0].done, body.iterations, "iterations")
            return
        ns = torch.tensor([report.samples_ns for report in reports], dtype=torch.int64)
        by_call = ns.view(len(reports), len(body.calls), body.iterations, 2).permute(1, 2, 0, 3)
        us = (by_call - ns.min()).to(torch.float64) / 1e3
        yield ClockResult(body.workload, body.calls, Array.of(us.numpy()))


def _sample(call: Call, group: CPGroup, body: Clock) -> tuple[int, int]:
    group.barrier()
    if body.late_us:
        time.sleep(group.rank * body.late_us / 1e6)
    if body.barrier:
        group.barrier()
    begin_ns = time.perf_counter_ns()
    result = call()
    end_ns = time.perf_counter_ns()
    if isinstance(result, dist.Work):
        result.wait()  # outside the clock: the mistake that `launch` shows
    finish()
    return begin_ns, end_ns


@dataclass
class _Bench:
    """What can be timed of one workload on this rank."""

    run: Run
    group: CPGroup

    def call(self, name: str) -> Call:
        """The call of this name, complete on return; `launch` returns what is still to be done."""
        if name in ALGORITHMS:
            gather = self._variant(name).gather
            return lambda: self._waited(gather())
        if name == "barrier":
            return self.group.barrier
        source, target = self._buffers
        match name:
            case "copy":
                return lambda: self._waited(target.copy_(source))
            case "copy_fresh":
                return lambda: self._waited(_untouched(source).copy_(source))
            case "collective":
                shard = source[: len(source) // self.group.size]
                whole = target[: len(shard) * self.group.size]
                return lambda: self._waited(self._collective(whole, shard))
        return self._launch(source, target)

    def verify(self, names: tuple[str, ...]) -> None:
        """Compare every gather that is timed bit by bit. Raises ProvenanceError. Collective."""
        for name in names:
            if name in ALGORITHMS:
                self._variant(name).verified_gather()

    def _variant(self, algorithm: str) -> Run:
        workload = msgspec.structs.replace(self.run.workload, algorithm=algorithm)
        return replace(self.run, workload=workload)

    def _collective(self, whole: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
        ordinary_all_gather(whole, shard, self.group)
        return whole

    def _launch(self, source: torch.Tensor, target: torch.Tensor) -> Call:
        """Start a gather, and do not wait for it: on the GPU a kernel, else the collective."""
        if source.is_cuda:
            return self.run.gather
        shard = source[: len(source) // self.group.size]
        whole = target[: len(shard) * self.group.size]
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return lambda: gather(whole, shard, group=self.group.process_group, async_op=True)

    @cached_property
    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Twice as many bytes as the gathered result has, written once: their pages are there."""
        shape, device = (self.run.workload.total_bytes,), self.run.tensors[0].device
        source, target = (torch.full(shape, n, dtype=torch.uint8, device=device) for n in (1, 2))
        return source, target

    def _waited(self, result: object) -> object:
        finish()
        return result


def _untouched(like: torch.Tensor) -> torch.Tensor:
    """As much memory that nobody has written yet: each of its pages still has to be made."""
    if like.is_cuda:
        return torch.empty_like(like)
    return torch.frombuffer(mmap.mmap(-1, len(like)), dtype=torch.uint8)
