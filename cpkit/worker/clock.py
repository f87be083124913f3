"""Record when each rank starts and ends each call (`Clock`).

    one iteration of one call on two ranks; rank r starts r · late_us after the first barrier

    rank 0   │barrier│ ─────────────│barrier│ start ══ call ══ end
    rank 1   │barrier│ ── late_us ──│barrier│ start ══ call ══ end

Warm-up and the second barrier are optional: a notebook shows how each omission distorts the times.
Every gather is compared bit by bit, before the timing, or after it if there is no warm-up.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from cpkit.algorithms import all_choices
from cpkit.bench import Call, add_device_times, longest_s
from cpkit.control.messages import Array, Clock, ClockResult, Progress
from cpkit.devices import finish
from cpkit.group import CPGroup
from cpkit.settings import worker_device
from cpkit.sync.collective import torch_all_gather
from cpkit.timing import Timing
from cpkit.worker.operation import CHUNK_S, SHORT_S, Operation, RankState, Steps
from cpkit.worker.workload import Run, prepare


class ClockOperation(Operation[Clock]):
    """Interleave all calls, so that other load affects all of them equally."""

    def steps(self, group: CPGroup, state: RankState) -> Steps:
        """Run as many iterations per step as fit in CHUNK_S on the slowest rank."""
        body = self.body
        bench = _Bench(prepare(body.workload, group, state.round), group)
        calls = [bench.call(name) for name in body.calls]
        if body.warmup:
            yield from bench.verify(body.calls)
        samples: list[list[tuple[float, float]]] = [[] for _ in calls]
        start_s, rounds = time.monotonic(), 0
        for iteration in count(-body.warmup):
            for name, call, recorded in zip(body.calls, calls, samples, strict=True):
                sample = _sample_us(name, call, group, body)
                if iteration >= 0:
                    recorded.append(sample)
            if iteration + 1 == body.iterations:
                break
            rounds += 1
            step_s = longest_s(time.monotonic() - start_s, group)
            if step_s > CHUNK_S:
                yield Progress(max(0, iteration + 1), body.iterations, "iterations")
                is_short = step_s / rounds < SHORT_S
                start_s, rounds = time.monotonic(), 0
                if body.warmup and is_short:
                    for name, call in zip(body.calls, calls, strict=True):
                        _sample_us(name, call, group, body)
        if not body.warmup:
            yield from bench.verify(body.calls)
        mine = np.array(samples, dtype=np.float64)[:, :, np.newaxis]
        return ClockResult(
            body.workload,
            ClockResult.numbered(body.calls),
            Array.of(mine),
            Array.of(_device_us(calls, mine[:, :, 0], group, body)),
        )


def _sample_us(name: str, call: Call, group: CPGroup, body: Clock) -> tuple[float, float]:
    """Return start and end of one call, in µs of this machine's monotonic clock.

    The end is when the GPU has finished too, but not for `launch`, which shows that mistake.
    """
    group.barrier()
    if body.late_us:
        time.sleep(group.rank * body.late_us / 1e6)
    if body.barrier:
        group.barrier()
    start_ns = time.perf_counter_ns()
    result = call()
    if name != "launch":
        finish()
    end_ns = time.perf_counter_ns()
    if isinstance(result, dist.Work):
        result.wait()
    finish()
    return start_ns / 1e3, end_ns / 1e3


def _device_us(calls: list[Call], spans_us: np.ndarray, group: CPGroup, body: Clock) -> np.ndarray:
    """Return the device time of each call, float64 `[calls, iterations, 1]`; nan for `barrier`.

    `spans_us` are the starts and ends of the calls, `[calls, iterations, 2]`.
    """
    if worker_device() != "cuda":
        return np.empty((len(calls), 0, 1))
    device_us = np.full((len(calls), body.iterations, 1), np.nan)
    on_gpu = [number for number, name in enumerate(body.calls) if name != "barrier"]
    timings = {str(n): Timing((spans_us[n, :, 1] - spans_us[n, :, 0]).tolist()) for n in on_gpu}
    if on_gpu:
        add_device_times({str(n): calls[n] for n in on_gpu}, group, body.iterations, timings)
    if any(len(timing.device_us) < body.iterations for timing in timings.values()):
        return np.empty((len(calls), 0, 1))
    for n in on_gpu:
        device_us[n, :, 0] = timings[str(n)].device_us
    return device_us


@dataclass
class _Bench:
    """The calls that can be timed, for one workload on this rank."""

    run: Run
    group: CPGroup

    def call(self, name: str) -> Call:
        """Return a function that makes the call; on a GPU it does not wait for the work."""
        if name in all_choices():
            run = self._variant(name)
            if name == "plan":
                run.prepare_plan()
            return run.gather
        if name == "barrier":
            return self.group.barrier
        source, target = self._buffers
        shard = source[: len(source) // self.group.size]
        whole = target[: len(shard) * self.group.size]
        calls: dict[str, Call] = {
            "copy": lambda: target.copy_(source),
            "copy_fresh": lambda: _fresh_memory(source).copy_(source),
            "collective": lambda: torch_all_gather(whole, shard, self.group),
        }
        return calls[name] if name in calls else self._launch(whole, shard)

    def _launch(self, whole: torch.Tensor, shard: torch.Tensor) -> Call:
        """Return a function that starts a gather: a kernel on the GPU, otherwise the collective."""
        if shard.is_cuda:
            return self.run.gather
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return lambda: gather(whole, shard, group=self.group.process_group, async_op=True)

    def verify(self, names: tuple[str, ...]) -> Iterator[Progress]:
        """Compare every timed gather bit by bit, one per step. Raises ProvenanceError."""
        algorithms = [name for name in dict.fromkeys(names) if name in all_choices()]
        for number, name in enumerate(algorithms, 1):
            self._variant(name).verified_gather()
            yield Progress(number, len(algorithms), "algorithms verified")

    def _variant(self, algorithm: str) -> Run:
        workload = msgspec.structs.replace(self.run.workload, algorithm=algorithm)
        return replace(self.run, workload=workload)

    @cached_property
    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two buffers of the gathered size, written once so that their pages are mapped."""
        shape, device = (self.run.workload.total_bytes,), self.run.tensors[0].device
        source, target = (torch.full(shape, n, dtype=torch.uint8, device=device) for n in (1, 2))
        return source, target


def _fresh_memory(like: torch.Tensor) -> torch.Tensor:
    """Return memory of the same size that was never written, so its pages are not mapped."""
    if like.is_cuda:
        return torch.empty_like(like)
    return torch.frombuffer(mmap.mmap(-1, len(like)), dtype=torch.uint8)
