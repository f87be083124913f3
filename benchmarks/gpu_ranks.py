"""The rank side of `make bench-gpu`: `torchrun … -m benchmarks.gpu_ranks OUTPUT.json CASES`.

Every variant first gathers stamped rows into poisoned memory, and every bit is checked. Then it is
timed by two clocks. *Device time* is that of a CUDA graph of several calls, divided by their
number, as in a serving engine. *Call time* is what a caller waits who calls it without a graph.

    graph      event ─ A A A A A ─ event        variants alternate sample by sample
    eager      barrier ─ A ─ the GPU has finished

    direct, padded, …   one call of all_gather_kv
    plan                the gather of `direct` as a prepared call (cpkit.plan)
    copy                every rank copies the whole result once: the floor of the memory
    matmul              a matrix product, beside which the variants run again (`beside_us`)

The opponents are in benchmarks.gpu_opponents.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import gpu_opponents
from benchmarks.gpu_opponents import Batch
from cpkit import bench, provenance
from cpkit.devices import use_local_gpu
from cpkit.gather import ALGORITHMS, all_gather_kv
from cpkit.group import CPGroup, init_context_parallel
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.plan import plan_gather_kv
from cpkit.symm import symmetric_pool
from cpkit.timing import Timing

Call = Callable[[], torch.Tensor]
Replay = Callable[[], object]
ByRank = dict[str, list[list[float]]]  # µs by variant: [rank][sample]
CEILING_BYTES = 1 << 30
WARMUP, SAMPLES, BLOCK = 2, 20, 5
SMALL_BYTES = 5_000_000
MATRIX = 4096  # a product of this order occupies every multiprocessor


@dataclass(frozen=True)
class Case:
    """One batch of one sequence: its tokens, and the shape and dtype of their rows."""

    tokens: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    beside_matmul: bool = False

    @classmethod
    def parse(cls, text: str) -> Case:
        """Parse "tokens:8x128:bfloat16", or the same with ":matmul"."""
        tokens, shape, dtype, *rest = text.split(":")
        dims = tuple(int(n) for n in shape.split("x"))
        return cls(int(tokens), dims, getattr(torch, dtype), rest == ["matmul"])


@dataclass(frozen=True)
class Size:
    """One case on this rank."""

    case: Case
    metadata: ContextParallelMetadata
    group: CPGroup
    mine: torch.Tensor
    want: torch.Tensor

    @property
    def total_bytes(self) -> int:
        """Bytes of the gathered tensor."""
        return self.want.nbytes

    @property
    def padded_bytes(self) -> int:
        """Bytes of all padded shards."""
        padded_rows = self.metadata.max_rank_len[0] * self.group.size
        return padded_rows * self.total_bytes // self.metadata.total_tokens

    @property
    def calls_per_graph(self) -> int:
        """Calls in a graph, enough to hide its start; few where many ranks share the memory."""
        large = 5 if self.group.ranks_on_gpu < 4 else 2
        return 20 if self.total_bytes < SMALL_BYTES else large

    @cached_property
    def batch(self) -> Batch:
        """The rows, and a pool with room for the opponents' buffers."""
        pool = symmetric_pool(self.group, "cuda")
        pool.warm_up(self.metadata.total_tokens, self.case.shape, self.case.dtype, tensors=8)
        return Batch(self.mine, self.metadata, self.group, pool)


def main() -> None:
    """Benchmark all cases on the group of all ranks."""
    output, *cases = sys.argv[1:]
    use_local_gpu()
    dist.init_process_group("gloo")
    group = init_context_parallel(dist.get_world_size())
    ceiling_gbps = copy_ceiling_gbps(group)
    sizes = [measure(prepare(Case.parse(text), group)) for text in cases]
    if group.rank == 0:
        Path(output).write_text(json.dumps({"ceiling_gbps": ceiling_gbps, "sizes": sizes}))
    dist.destroy_process_group()


def prepare(case: Case, group: CPGroup) -> Size:
    """Create stamped rows on this rank's device."""
    metadata = prepare_context_parallel_metadata([case.tokens], group.size)
    rows = provenance.shard_rows(metadata, group.rank, case.shape, case.dtype, round=1)
    want = provenance.expected_rows(metadata, case.shape, case.dtype, round=1)
    return Size(case, metadata, group, rows.cuda(), want.cuda())


def copy_ceiling_gbps(group: CPGroup) -> float:
    """Return the bytes read plus written by one large copy while other ranks are idle."""
    rate = 0.0
    if group.rank == 0:
        source = torch.ones(CEILING_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        times_us = [elapsed_us(partial(target.copy_, source)) for _ in range(SAMPLES)]
        rate = 2 * CEILING_BYTES / statistics.median(times_us[2:]) / 1e3
    rates = torch.tensor([rate], dtype=torch.float64)
    dist.broadcast(rates, 0)
    torch.cuda.empty_cache()
    return float(rates)


def measure(size: Size) -> dict[str, Any]:
    """Return each variant's samples in µs, by clock, rank and sample."""
    checked, missing = checked_variants(size)
    calls = checked | unchecked_variants(size)
    host_us, call_us = eager_times(calls, size)
    graphs = {name: capture(call, size) for name, call in calls.items()}
    for name in checked:
        check_replay(name, *graphs[name], size)
    replays = {name: replay for name, (replay, _) in graphs.items()}
    device_us = device_times(replays, size)
    report: dict[str, Any] = {
        "tokens": size.metadata.total_tokens,
        "row_bytes": size.total_bytes // size.metadata.total_tokens,
        "padded_bytes": size.padded_bytes,
        "variants": {
            name: {
                "samples_us": device_us[name],
                "call_us": call_us[name],
                "host_us": host_us[name],
            }
            for name in calls
        },
        "missing": missing,
    }
    if size.case.beside_matmul:
        report["beside"] = beside_matmul(replays, device_us, size)
    return report


def checked_variants(size: Size) -> tuple[dict[str, Call], dict[str, str]]:
    """Return the variants, and why others are missing. Wrong rows raise ProvenanceError."""
    arguments = [size.mine], size.metadata, size.group
    calls: dict[str, Call] = {
        name: partial(_only, partial(all_gather_kv, *arguments, algorithm=name))
        for name in ALGORITHMS
    }
    calls["plan"] = partial(_only, plan_gather_kv(*arguments))
    calls |= gpu_opponents.pipelines(size.batch)
    missing: dict[str, str] = {}
    for name in [*calls]:
        try:
            check(calls[name], size)
            check(calls[name], size)  # a repeated call takes another way
        except RuntimeError as error:  # torch has it in some versions only
            missing[name] = str(error)[:200]
            del calls[name]
    return calls, missing


def unchecked_variants(size: Size) -> dict[str, Call]:
    """Return the collectives alone, and the copies that are floors."""
    whole = size.want.clone()
    return {
        **gpu_opponents.collectives(size.batch),
        "peer copies": gpu_opponents.peer_copies(size.batch),
        "copy": partial(whole.copy_, size.want),
    }


def _only(call: Callable[[], list[torch.Tensor]]) -> torch.Tensor:
    (result,) = call()
    return result


# ------------------------------------------------------------------------------- checks


def check(call: Call, size: Size) -> None:
    """Check two calls into poisoned memory, because a plan alternates between two outputs.

    Other variants allocate the memory that the poisoned results have just freed.
    """
    for result in [call(), call()]:
        provenance.poison_(result)
    del result
    for _ in range(2):
        _together(size)
        got = call()
        torch.cuda.synchronize()
        _compare(got, size)


def check_replay(name: str, replay: Replay, result: torch.Tensor, size: Size) -> None:
    """Check the last result of a graph, replayed into poisoned memory."""
    provenance.poison_(result)
    _together(size)
    replay()
    torch.cuda.synchronize()
    try:
        _compare(result, size)
    except provenance.ProvenanceError as error:
        error.add_note(f"in a CUDA graph of {name}, {size.total_bytes} bytes")
        raise


def _compare(got: torch.Tensor, size: Size) -> None:
    """Compare every bit on the GPU. Copy only a wrong result to the host, to explain it."""
    if not torch.equal(got.view(torch.uint8), size.want.view(torch.uint8)):
        provenance.check(got, size.metadata, round=1)


def _together(size: Size) -> None:
    """Wait until all ranks and their GPUs have arrived."""
    torch.cuda.synchronize()
    size.group.barrier()


# ---------------------------------------------------------------------------- the clocks


def eager_times(calls: Mapping[str, Call], size: Size) -> tuple[ByRank, ByRank]:
    """Return (host, call) µs: until a call returns, and until the GPU has finished too.

    Variants alternate in blocks of calls, because a model repeats the same gather in every layer.
    """
    host: dict[str, list[float]] = {name: [] for name in calls}
    until_done: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(SAMPLES // BLOCK):
        for name, call in calls.items():
            for number in range(WARMUP + BLOCK):
                _together(size)
                start_ns = time.perf_counter_ns()
                result = call()
                returned_ns = time.perf_counter_ns()
                torch.cuda.synchronize()
                stop_ns = time.perf_counter_ns()
                del result
                if number >= WARMUP:
                    host[name].append((returned_ns - start_ns) / 1e3)
                    until_done[name].append((stop_ns - start_ns) / 1e3)
    return _of_all_ranks(host, size.group), _of_all_ranks(until_done, size.group)


def capture(call: Call, size: Size) -> tuple[Replay, torch.Tensor]:
    """Capture several calls in one graph; return its replay and the last result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    _together(size)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(size.calls_per_graph):
            result = call()
    return graph.replay, result


def device_times(replays: Mapping[str, Replay], size: Size) -> ByRank:
    """Return the device µs per call."""
    mine: dict[str, list[float]] = {name: [] for name in replays}
    for number in range(WARMUP + SAMPLES):
        for name, replay in replays.items():
            _together(size)
            us = elapsed_us(replay) / size.calls_per_graph
            if number >= WARMUP:
                mine[name].append(us)
    return _of_all_ranks(mine, size.group)


def elapsed_us(run: Replay) -> float:
    """Return the µs between two events around a run."""
    start, stop = _events(2)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) * 1e3


def beside_matmul(
    replays: Mapping[str, Replay], alone_us: ByRank, size: Size
) -> dict[str, dict[str, float]]:
    """Return what gathers and matrix products cost each other when they run at the same time.

    stream 1   event ─ gather ─ gather ─ … ─ event
    stream 2   event ─ product ─ product ─ product ─ … ─ event     longer than the gathers

    `beside_us` is the time of a gather; `delay_us` is by how much one gather delays the products.
    """
    a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    multiply = partial(torch.mm, a, b, out=torch.empty_like(a))
    product_us = statistics.median(_products_us(multiply, 16) for _ in range(SAMPLES)) / 16
    gathers = size.calls_per_graph
    beside: dict[str, list[float]] = {name: [] for name in replays}
    delay: dict[str, list[float]] = {name: [] for name in replays}
    side = torch.cuda.Stream()
    for name, replay in replays.items():
        longest_us = max(statistics.median(rank) for rank in alone_us[name]) * gathers
        products = 4 + int(2 * longest_us / product_us)
        for _ in range(SAMPLES):
            _together(size)
            with torch.cuda.stream(side):
                start, stop = _events(2)
                start.record()
                for _ in range(products):
                    multiply()
                stop.record()
            beside[name].append(elapsed_us(replay) / gathers)
            stop.synchronize()
            both_us = float(start.elapsed_time(stop)) * 1e3
            delay[name].append((both_us - products * product_us) / gathers)
    beside_us, delay_us = (_of_all_ranks(each, size.group) for each in (beside, delay))
    return {
        name: {
            "beside_us": max(map(statistics.median, beside_us[name])),
            "delay_us": max(map(statistics.median, delay_us[name])),
        }
        for name in replays
    }


def _products_us(multiply: Replay, count: int) -> float:
    def run() -> None:
        for _ in range(count):
            multiply()

    return elapsed_us(run)


def _events(count: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]


def _of_all_ranks(mine: Mapping[str, list[float]], group: CPGroup) -> ByRank:
    return {
        name: [each.call_us for each in bench.all_ranks(Timing(samples), group)]
        for name, samples in mine.items()
    }


if __name__ == "__main__":
    main()
