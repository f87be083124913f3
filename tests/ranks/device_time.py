"""Device time orders gathers as their captures do. With a GPU per rank, so that NCCL gathers.

The captured times come from replays of a CUDA graph of each gather, measured here without
cpkit.bench. They are written to `CPKIT_TEST_CAPTURED`, for a comparison with `lab.sweep`.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping
from itertools import permutations
from pathlib import Path

import torch

from cpkit import bench, settings
from cpkit.gather import ALGORITHMS, all_gather_kv
from cpkit.group import CPGroup
from tests.ranks.device import batch_of

SHAPE, DTYPE = (8, 128), torch.bfloat16
TOKENS = (128, 1021, 2045, 32765)  # 0.26, 2.1, 4.2, 67 MB
REPLAYS, SAMPLES = 10, 9
CLEARLY = 1.15

Times = Mapping[str, float]


def contradictions(times_us: Times, captured_us: Times) -> list[str]:
    """Return the pairs that are clearly in one order when captured, and in the other here."""
    return [
        f"{fast}, {slow}: captured {captured_us[fast]:.1f} and {captured_us[slow]:.1f} us, "
        f"here {times_us[fast]:.1f} and {times_us[slow]:.1f} us"
        for fast, slow in permutations(captured_us, 2)
        if captured_us[slow] > CLEARLY * captured_us[fast] and times_us[slow] <= times_us[fast]
    ]


def captured_us(call: Callable[[], object], group: CPGroup) -> float:
    """Return the median time of a replay on the slowest rank."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    samples = []
    for _ in range(SAMPLES):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        group.barrier()
        torch.cuda._sleep(2_000_000)  # the host queues the replays meanwhile
        graph.replay()
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        samples.append(float(start.elapsed_time(stop)) * 1e3 / REPLAYS)
    return bench.longest_s(statistics.median(samples), group)


def check_device_time_orders_gathers_as_their_captures_do() -> None:
    settings.pass_on(settings.DEVICE, "cuda")
    found, report = {}, []
    for tokens in TOKENS:
        group, metadata, rows = batch_of(tokens, trailing=SHAPE, dtype=DTYPE)

        def gather(name: str, rows=rows, metadata=metadata, group=group) -> list[torch.Tensor]:
            return all_gather_kv([rows], metadata, group, algorithm=name)

        calls = {name: (lambda name=name: gather(name)) for name in ALGORITHMS}
        timings = bench.time_calls(calls, group, 20)
        device_us, call_us = (
            {name: bench.longest_s(median, group) for name, median in medians.items()}
            for medians in (
                {name: timing.median_us for name, timing in timings.items()},
                {name: timing.median_call_us for name, timing in timings.items()},
            )
        )
        found[tokens] = {name: captured_us(call, group) for name, call in calls.items()}
        report += [
            f"{tokens:6} tokens, {name:17} device {device_us[name]:7.1f} us, captured "
            f"{found[tokens][name]:7.1f} us, call {call_us[name]:7.1f} us"
            for name in calls
        ]
        assert timings["direct"].clock == "device time"
        assert not contradictions(device_us, found[tokens]), (device_us, found[tokens])
        if group.rank == 0:
            print(contradictions(call_us, found[tokens]), flush=True)
    if group.rank == 0:
        print("\n".join(report), flush=True)
        if path := os.environ.get("CPKIT_TEST_CAPTURED"):
            Path(path).write_text(json.dumps(found))


def check_a_call_that_waits_for_the_gpu_has_no_device_time() -> None:
    """Such a call cannot be queued ahead."""
    group, metadata, rows = batch_of(1021, trailing=SHAPE, dtype=DTYPE)

    def waits() -> None:
        all_gather_kv([rows], metadata, group)
        torch.cuda.synchronize()

    timing = bench.Timing(call_us=[100.0])
    bench.add_device_times({"": waits}, group, 3, {"": timing})
    assert (timing.clock, timing.device_us) == ("call time", [])
    assert timing.stages_us
