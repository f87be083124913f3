"""The rank side of `make bench-gpu`: `torchrun … -m benchmarks.gpu_ranks OUTPUT.json TOKENS…`.

First, every variant gathers stamped rows into poisoned memory, and every bit is checked. A sample
is the time between two CUDA events around several calls, divided by their number, as in nccl-tests.
It begins with a barrier of all ranks. The variants alternate sample by sample.

    direct           one call of all_gather_kv
    plan             the same gather as a prepared call (cpkit.plan), which replays its own graph
    graph            the plan's call in a caller's CUDA graph; small sizes only
    seed             the seed's pipeline on symmetric buffers: pad, wire, strip, reorder
    low-contention   torch's _low_contention_all_gather from a symmetric shard, then strip, reorder
    … graph          a competitor captured in a CUDA graph, as in a serving engine
    copy             every rank copies the whole result once
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

from cpkit import bench, gather, provenance
from cpkit.devices import use_local_gpu
from cpkit.gather import all_gather_kv
from cpkit.group import CPGroup, init_context_parallel
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.plan import plan_gather_kv

Call = Callable[[], object]
SHAPE = (8, 128)
DTYPE = torch.bfloat16
GRAPH_UP_TO_BYTES = 4 << 20
CEILING_BYTES = 1 << 30
SAMPLES = 20


@dataclass(frozen=True)
class Size:
    """One size on this rank."""

    metadata: ContextParallelMetadata
    group: CPGroup
    mine: torch.Tensor
    want: torch.Tensor

    @property
    def total_bytes(self) -> int:
        """Bytes of the gathered tensor."""
        return self.metadata.total_tokens * SHAPE[0] * SHAPE[1] * DTYPE.itemsize

    @property
    def calls_per_sample(self) -> int:
        """Small gathers are too short for one pair of events."""
        return 20 if self.total_bytes <= GRAPH_UP_TO_BYTES else 5


def main() -> None:
    """Benchmark all sizes on the group of all ranks."""
    output, *tokens = sys.argv[1:]
    use_local_gpu()
    dist.init_process_group("gloo")
    group = init_context_parallel(dist.get_world_size())
    ceiling_bytes_per_us = copy_ceiling(group)
    sizes = [measure(prepare(int(count), group)) for count in tokens]
    if group.rank == 0:
        report = {"ceiling_gbps": ceiling_bytes_per_us / 1e3, "sizes": sizes}
        Path(output).write_text(json.dumps(report))
    dist.destroy_process_group()


def prepare(tokens: int, group: CPGroup) -> Size:
    """Create stamped rows on this rank's device."""
    metadata = prepare_context_parallel_metadata([tokens], group.size)
    rows = provenance.shard_rows(metadata, group.rank, SHAPE, DTYPE, round=1)
    want = provenance.expected_rows(metadata, SHAPE, DTYPE, round=1)
    return Size(metadata, group, rows.cuda(), want.cuda())


def copy_ceiling(group: CPGroup) -> float:
    """Return the bytes read plus written per µs by one large copy while other ranks are idle."""
    rate = 0.0
    if group.rank == 0:
        source = torch.ones(CEILING_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        times = [events_us(lambda: target.copy_(source), 1) for _ in range(SAMPLES)]
        rate = 2 * CEILING_BYTES / statistics.median(times[2:])
    rates = torch.tensor([rate], dtype=torch.float64)
    dist.broadcast(rates, 0)
    torch.cuda.empty_cache()
    return float(rates)


def measure(size: Size) -> dict[str, Any]:
    """Return the samples of every variant in µs, by rank, or why it was not measured."""
    calls, missing = checked_variants(size)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(SAMPLES + 2):
        for name, call in calls.items():
            size.group.barrier()
            samples[name].append(events_us(call, size.calls_per_sample))
    timings = {name: bench.Timing(us[2:]) for name, us in samples.items()}
    timed = {
        name: [each.times_us for each in bench.all_ranks(timing, size.group)]
        for name, timing in timings.items()
    }
    return {
        "tokens": size.metadata.total_tokens,
        "padded_bytes": size.metadata.max_rank_len[0] * size.group.size * SHAPE[0] * SHAPE[1] * 2,
        "variants": {name: {"samples_us": us} for name, us in timed.items()},
        "missing": missing,
    }


def checked_variants(size: Size) -> tuple[dict[str, Call], dict[str, str]]:
    """Return the variants, and why others are missing. Wrong rows raise ProvenanceError."""
    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    whole = torch.ones(size.total_bytes, dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(whole)
    calls["direct"] = lambda: _gather(size, "direct")
    calls["plan"] = plan_gather_kv([size.mine], size.metadata, size.group)
    calls["seed"] = lambda: _gather(size, "padded_symm_recv")
    calls["low-contention"] = low_contention(size)
    for call in calls.values():
        _check(call, size)
    graphs: dict[str, Call] = {}
    if (
        size.total_bytes <= GRAPH_UP_TO_BYTES
    ):  # a separate plan, because a captured one waits at entry
        graphs["graph"] = plan_gather_kv([size.mine], size.metadata, size.group)
    graphs |= {f"{name} graph": calls[name] for name in ("seed", "low-contention")}
    for name, call in graphs.items():
        try:
            calls[name] = captured(call, size)
        except RuntimeError as error:
            missing[name] = f"not captured: {error}"[:200]
    calls["copy"] = lambda: copy.copy_(whole)
    return calls, missing


def low_contention(size: Size) -> Call:
    """Return torch's copy-engine all-gather with the two passes that restore token order."""
    metadata, group = size.metadata, size.group
    rows = gather.as_rows(size.mine)
    shard = symm_mem.empty(metadata.max_rank_len[0], rows.shape[1], dtype=rows.dtype, device="cuda")
    symm_mem.rendezvous(shard, group.process_group.group_name)
    shard[: len(rows)].copy_(rows)
    torch.cuda.synchronize()
    group.barrier()

    def call() -> list[torch.Tensor]:
        gathered = torch.ops.symm_mem._low_contention_all_gather(
            shard, group.process_group.group_name
        )
        gathered = torch.ops._c10d_functional.wait_tensor(gathered)
        rank_order = gather.strip_padding(gathered, metadata.per_rank_actual_token)
        return [gather.from_rows(gather.reorder_tokens(rank_order, metadata), size.mine)]

    return call


def captured(call: Callable[[], Any], size: Size) -> Call:
    """Capture the call in a CUDA graph, and check a replay into poisoned memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    size.group.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for result in results:
        provenance.poison_(result)
    torch.cuda.synchronize()
    size.group.barrier()
    graph.replay()
    torch.cuda.synchronize()
    _compare(results[0], size)
    size.group.barrier()
    return graph.replay


def _gather(size: Size, algorithm: str) -> list[torch.Tensor]:
    return all_gather_kv([size.mine], size.metadata, size.group, algorithm=algorithm)


def _check(call: Callable[[], Any], size: Size) -> None:
    """Check two calls into poisoned memory, because a plan alternates between two outputs.

    Other variants allocate the memory that the poisoned results have just freed.
    """
    for result in [result for _ in range(2) for result in call()]:
        provenance.poison_(result)
    del result
    for _ in range(2):
        torch.cuda.synchronize()
        size.group.barrier()
        (got,) = call()
        torch.cuda.synchronize()
        _compare(got, size)


def _compare(got: torch.Tensor, size: Size) -> None:
    """Compare every bit on the GPU. Copy only a wrong result to the host, to explain it."""
    if not torch.equal(got.view(torch.int16), size.want.view(torch.int16)):
        provenance.check(got, size.metadata, round=1)


def events_us(call: Call, calls: int) -> float:
    """Return the µs per call between two CUDA events around several calls."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) * 1e3 / calls


if __name__ == "__main__":
    main()
