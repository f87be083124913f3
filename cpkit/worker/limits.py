"""The limits of requests, which rank 0 checks before it sends them to the other ranks.

Every check raises ValueError, and none allocates memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import get_args

import torch

from cpkit import settings
from cpkit.algorithms import all_choices
from cpkit.control.messages import (
    MAX_SEQUENCES,
    Body,
    Clock,
    Explain,
    Gather,
    Measure,
    Pool,
    Put,
    Sweep,
    Trace,
    Workload,
)
from cpkit.control.requests import DTYPE_BYTES, OtherCall
from cpkit.memory.sizing import warm_up_bytes
from cpkit.settings import worker_device
from cpkit.sync.free_memory import tightest
from cpkit.worker.operation import Held

_MAX_WORKLOADS = 1024
_MAX_INTERLEAVED = 16  # workloads of one measurement
_MAX_ROUND = 1023  # the range of a row's stamp (cpkit.provenance)
_MAX_ROUNDS = 100_000
_MAX_CALLS = 16
_CLOCK_COPIES = 3  # source, target and fresh memory of the calls that copy
_MAX_SAMPLES = 100_000  # over all ranks: 1.6 MB
_MAX_LATE_US = 100_000.0
_MAX_TOKENS = 1 << 20
# What clients may hold between their requests, as a fraction of the limit, so that others can work.
_CLIENT_SHARE, _TOTAL_SHARE = 0.5, 0.75
# Copies of the gathered result that a rank holds at the same time, at most, including its shard and
# the expected rows. A plan has two outputs.
_COPIES = {"direct": 4}
_DEFAULT_COPIES = 5
_PLAN_OUTPUTS = 2


class MemoryInUse(RuntimeError):
    """Other clients and requests use the memory that this one needs."""


@cache
def memory_limit_bytes() -> int:
    """Return how many bytes requests may use on all ranks together.

    This is `CPKIT_MEMORY_LIMIT_BYTES`, or half of the memory (on the GPU if the ranks run there)
    that is free when the workers start, within the limits of their container.
    """
    chosen = settings.memory_limit_bytes()
    if chosen:
        return chosen
    if worker_device() == "cuda":
        return int(torch.cuda.mem_get_info()[0]) // 2
    return tightest().free_bytes // 2


def check(body: Body, world_size: int) -> None:
    """Raise ValueError if `world_size` ranks cannot run this request."""
    match body:
        case Gather(workload, round_number):
            _check_called(workload, world_size)
            _in_range("round", round_number, 0, _MAX_ROUND)
        case Trace(workload) | Explain(workload):
            _check_called(workload, world_size)
        case Measure(workloads, samples, interval_s):
            _check_interleaved(workloads, world_size)
            if samples is not None:
                _in_range("samples", samples, 1, 1_000_000)
            _in_range("interval_s", interval_s, 0.01, 60.0)
        case Sweep(workloads, iterations):
            _in_range("the number of workloads", len(workloads), 1, _MAX_WORKLOADS)
            _in_range("iterations", iterations, 1, 10_000)
            for workload in workloads:
                check_workload(workload, world_size)
        case Clock(workload):
            _check_called(workload, world_size)
            _check_clock(body)
        case Pool():
            _check_pool(body, world_size)
        case Put(cp_size, rounds):
            check_cp_size(cp_size, world_size)
            _in_range("rounds", rounds, 1, _MAX_ROUNDS)


def needed(body: Body) -> int:
    """Return an upper bound of the bytes that a request needs on all ranks while it is open."""
    match body:
        case Gather(workload) | Trace(workload) | Explain(workload):
            return needed_bytes(workload)
        case Clock(workload):
            plans = max(0, body.calls.count("plan") - 1)
            copies = _CLOCK_COPIES + _PLAN_OUTPUTS * plans
            return needed_bytes(workload) + workload.cp_size * copies * workload.total_bytes
        case Measure(workloads) | Sweep(workloads):
            return max(map(needed_bytes, workloads)) + _kept_by_further_ones(workloads)
    return 0


def _kept_by_further_ones(workloads: Sequence[Workload]) -> int:
    """Return the bytes that all plans and captures but the first keep while the request is open.

    Workloads that are measured in turn use the same memory, one after another, except for these.
    """
    kept = [
        needed_bytes(each) if each.captured else each.cp_size * _PLAN_OUTPUTS * each.total_bytes
        for each in workloads
        if each.captured or each.algorithm == "plan"
    ]
    return sum(kept[1:])


def check_share(body: Pool, client: bytes, held: Held) -> None:
    """Check what the pools would hold after a request, for its client and for all clients.

    `held` is what they hold now. Raises ValueError for the client's share, and MemoryInUse for all.
    """
    wanted = _kept_bytes(body)
    if not wanted:
        return
    replaced = body.action == "configure"  # by the new pool
    kept = {key: n for key, n in held.items() if not (replaced and key[1] == body.cp_size)}
    limit, mine = memory_limit_bytes(), sum(n for key, n in kept.items() if key[0] == client)
    most, total = int(_CLIENT_SHARE * limit), int(_TOTAL_SHARE * limit)
    what = f"this request keeps {_bytes(wanted)} of shared memory on {body.cp_size} ranks"
    if mine + wanted > most:
        raise ValueError(
            f"{what}, and this client holds {_bytes(mine)}; a client may hold {_bytes(most)}: call "
            f"lab.pool.release() or lab.pool.configure() first, or start the workers with a larger "
            f"CPKIT_MEMORY_LIMIT_BYTES"
        )
    if sum(kept.values()) + wanted > total:
        raise MemoryInUse(
            f"{what}, and all clients hold {_bytes(sum(kept.values()))} of at most {_bytes(total)}"
            f": wait until another client releases its blocks or closes its connection, or start "
            f"the workers with a larger CPKIT_MEMORY_LIMIT_BYTES"
        )


def check_room(needed_bytes: int, held_bytes: int) -> None:
    """Raise MemoryInUse if a request does not fit beside what clients hold in the pools."""
    limit = memory_limit_bytes()
    if needed_bytes + held_bytes > limit:
        raise MemoryInUse(
            f"this request needs about {_bytes(needed_bytes)}, and clients hold "
            f"{_bytes(held_bytes)} in pools, of at most {_bytes(limit)} together: call "
            f"lab.pool.release() in the notebooks that allocated it, or use fewer tokens"
        )


def _kept_bytes(body: Pool) -> int:
    """Return how many bytes of the pools stay in use on all ranks after a request."""
    match body.action:
        case "allocate":
            return body.cp_size * (body.nbytes or 0)
        case "configure":
            return body.cp_size * (body.prealloc_bytes or 0)
        case "warm_up":
            row_bytes = body.heads * body.head_dim * DTYPE_BYTES[body.dtype]
            tokens = body.max_tokens or 0
            return body.cp_size * body.tensors * warm_up_bytes(tokens, row_bytes, body.cp_size, 1)
    return 0


def check_cp_size(cp_size: int, world_size: int) -> None:
    """Raise ValueError unless cp_size divides the world size."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    if cp_size not in divisors:
        raise ValueError(
            f"cp_size is {cp_size}; it must divide the {world_size} ranks of these workers: use "
            f"one of {', '.join(map(str, divisors))}, or start the workers with another nproc"
        )


def check_workload(workload: Workload, world_size: int) -> None:
    """Raise ValueError for a workload that `world_size` ranks cannot run."""
    check_cp_size(workload.cp_size, world_size)
    _check_name("algorithm is", workload.algorithm, all_choices())
    if workload.captured and worker_device() == "cpu":
        raise ValueError(
            "captured is True, and these workers run on the CPU, which has no CUDA graphs: leave "
            'it out, or start the workers with device="cuda"'
        )
    _check_shape(workload.heads, workload.head_dim, workload.dtype, workload.tensors)
    _in_range("the number of sequences", len(workload.lengths), 1, MAX_SEQUENCES)
    if min(workload.lengths) > 0:  # otherwise the layout raises
        _check_memory(workload)
        _in_range("the longest sequence", max(workload.lengths), 1, _MAX_TOKENS)
    workload.layout()


def _check_called(workload: Workload, world_size: int) -> None:
    """Raise ValueError for a workload whose call itself is looked at, and that is captured."""
    if workload.captured:
        raise ValueError("captured is True; only measure and sweep replay captures: leave it out")
    check_workload(workload, world_size)


def _check_interleaved(workloads: tuple[Workload, ...], world_size: int) -> None:
    """Raise ValueError unless these workloads differ only in algorithm, memory and launch."""
    _in_range("the number of workloads", len(workloads), 1, _MAX_INTERLEAVED)
    for workload in workloads:
        if workload.without_variant() != workloads[0].without_variant():
            raise ValueError(
                f"the workloads {workloads[0]} and {workload} differ in more than algorithm, "
                f"symmetric and captured: measure them one after the other, or use a sweep"
            )
        check_workload(workload, world_size)


def needed_bytes(workload: Workload) -> int:
    """Return an upper bound of the bytes that all ranks together need for a workload."""
    longest_rank = -(-sum(workload.lengths) // workload.cp_size) + 2 * len(workload.lengths)
    padded = longest_rank * workload.cp_size * workload.row_bytes * workload.tensors
    indices = 64 * sum(workload.lengths)  # int64 indices, and temporaries of stamping
    copies = _COPIES.get(workload.algorithm, _DEFAULT_COPIES)
    return workload.cp_size * (copies * padded + indices)


def _check_memory(workload: Workload, more_copies: int = 0) -> None:
    more_bytes = workload.cp_size * more_copies * workload.total_bytes
    needed, limit = needed_bytes(workload) + more_bytes, memory_limit_bytes()
    if needed > limit:
        raise ValueError(
            f"this gather of {_bytes(workload.total_bytes)} needs about {_bytes(needed)} on "
            f"{workload.cp_size} ranks, and the limit is {_bytes(limit)}: use fewer tokens, heads "
            f"or tensors, a smaller cp_size, or start the workers with a larger "
            f"CPKIT_MEMORY_LIMIT_BYTES"
        )


def _check_clock(body: Clock) -> None:
    _check_memory(body.workload, _CLOCK_COPIES)
    _in_range("the number of calls", len(body.calls), 1, _MAX_CALLS)
    for name in body.calls:
        _check_name("calls has", name, (*all_choices(), *get_args(OtherCall)))
    most = _MAX_SAMPLES // (len(body.calls) * body.workload.cp_size)
    _in_range("iterations", body.iterations, 1, most)
    _in_range("warmup", body.warmup, 0, 1000)
    _in_range("late_us", body.late_us, 0.0, _MAX_LATE_US)


def _check_pool(body: Pool, world_size: int) -> None:
    check_cp_size(body.cp_size, world_size)
    _check_shape(body.heads, body.head_dim, body.dtype, body.tensors)
    rank_limit = memory_limit_bytes() // body.cp_size
    if body.action == "configure" and body.prealloc_bytes is not None:
        _in_range("prealloc_bytes", body.prealloc_bytes, 1, rank_limit)
    if body.action == "allocate":
        _in_range("nbytes", body.nbytes or 0, 1, rank_limit)
    if body.action == "warm_up":
        # Receive buffer and shard of each tensor, twice; see SymmetricPool.warm_up.
        row = body.heads * body.head_dim * DTYPE_BYTES[body.dtype] * 4 * body.tensors
        _in_range("max_tokens", body.max_tokens or 0, 1, max(1, rank_limit // row))


def _check_shape(heads: int, head_dim: int, dtype: str, tensors: int) -> None:
    _in_range("heads", heads, 1, 4096)
    _in_range("head_dim", head_dim, 1, 65536)
    _in_range("tensors", tensors, 1, 16)
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype is {dtype!r:.80}; it must be one of {', '.join(DTYPE_BYTES)}")


def _check_name(what: str, name: str, allowed: Sequence[str]) -> None:
    if name not in allowed:
        raise ValueError(
            f"{what} {name!r:.80}; it must be one of {', '.join(allowed)}. To add one of your own, "
            f"start the workers with --algorithms FILE"
        )


def _bytes(count: int) -> str:
    return f"{count} bytes ({count / 2**30:.3g} GiB)"


def _in_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}; it must be from {least} to {most}")
