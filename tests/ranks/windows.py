"""NCCL with a GPU per rank: rows are right for buffers anywhere in symmetric memory.

NCCL selects its kernel from the windows that contain a rank's buffers. Shards of 64 KiB go through
its LL kernel, which stages; those of 2 and 32 MiB use its ST kernel, which stores into every
peer's window at this rank's own receive offset.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from cpkit import provenance
from cpkit.gather import all_gather_kv, last_path
from cpkit.group import CPGroup, init_context_parallel
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.memory import path as path_module
from cpkit.memory.nccl_log import count_file
from cpkit.symm import explain_path, symmetric_pool, use_symmetric_memory
from tests.ranks.device import path_by_table, world_group
from tests.ranks.errors import raised
from tests.ranks.mutants import planted

SHAPE, DTYPE = (8, 128), torch.bfloat16
ROW_BYTES = 2048
SHIFT_ROWS = 8  # from one rank's offset to the next one's
SHARD_ROWS = tuple(nbytes // ROW_BYTES for nbytes in (64 << 10, 2 << 20, 32 << 20))


def layout(group: CPGroup, rows: int) -> ContextParallelMetadata:
    """Return a layout whose rank order is token order, as in a plain collective of equal shards."""
    return prepare_context_parallel_metadata([rows * group.size], group.size, "contiguous")


def stamp(send: torch.Tensor, group: CPGroup, round: int) -> torch.Tensor:
    rows = layout(group, len(send))
    send.copy_(provenance.shard_rows(rows, group.rank, SHAPE, DTYPE, round=round))
    return send


def ordinary(rows: int) -> torch.Tensor:
    return torch.empty(rows, *SHAPE, dtype=DTYPE, device="cuda")


def in_pool(group: CPGroup, rows: int, *, shifted: bool = False) -> torch.Tensor:
    """Return rows in the group's pool; if `shifted`, at a different offset on each rank."""
    first = SHIFT_ROWS * group.rank if shifted else 0
    with use_symmetric_memory(group):
        return ordinary(rows + SHIFT_ROWS * group.size)[first : first + rows]


def gather(group: CPGroup, send: torch.Tensor, recv: torch.Tensor, round: int) -> None:
    """Gather into poisoned memory, and compare every bit."""
    mine = send.clone()  # a shard that is sent in place lies in recv
    provenance.poison_(recv)
    send.copy_(mine)
    torch.cuda.synchronize()
    group.barrier()
    group.cp_all_gather_into_tensor_async(recv, send)
    torch.cuda.synchronize()
    provenance.check(recv, layout(group, len(send)), round=round)


def placements(group: CPGroup, rows: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, str]]:
    """Yield (name, send, recv, path) of every kind of placement."""
    size, first = group.size, group.rank == 0
    both, recv_only = path_by_table("padded_symm"), path_by_table("padded_symm_recv")
    symm_send, symm_recv = in_pool(group, rows), in_pool(group, rows * size)
    shifted_send = in_pool(group, rows, shifted=True)
    shifted_recv = in_pool(group, rows * size, shifted=True)
    mine = slice(group.rank * rows, (group.rank + 1) * rows)
    plain_send, plain_recv = ordinary(rows), ordinary(rows * size)
    yield "both registered", symm_send, symm_recv, both
    yield "send shifted", shifted_send, symm_recv, both
    yield "send in place", symm_recv[mine], symm_recv, both
    yield "recv only", plain_send, symm_recv, recv_only
    yield "send only", symm_send, plain_recv, "fallback"
    yield "shifted send only", shifted_send, plain_recv, "fallback"
    yield "recv shifted", symm_send, shifted_recv, "fallback"
    yield "recv shifted, send in place", shifted_recv[mine], shifted_recv, "fallback"
    yield "recv only, shifted", plain_send, shifted_recv, "fallback"
    yield "recv of rank 0 only", symm_send, symm_recv if first else plain_recv, "fallback"
    yield "send of rank 0 only", symm_send if first else plain_send, symm_recv, recv_only


def check_rows_are_right_wherever_the_buffers_are() -> None:
    group = world_group()
    for rows in SHARD_ROWS:
        for round, (name, send, recv, path) in enumerate(placements(group, rows), start=1):
            stamp(send, group, round)
            report = explain_path(send, recv, group)
            try:
                gather(group, send, recv, round)
            except provenance.ProvenanceError as error:
                raise AssertionError(
                    f"{name}, {rows * ROW_BYTES} bytes per rank: {error}"
                ) from error
            assert report.path == path, (name, report)
            assert last_path(group) == report, name


def check_captured_gathers_are_right_wherever_the_buffers_are() -> None:
    group = world_group()
    rows = SHARD_ROWS[1]
    for name, send, recv, _ in placements(group, rows):
        stamp(send, group, 1)
        gather(group, send, recv, 1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            group.cp_all_gather_into_tensor_async(recv, send)
        for round in (2, 3):
            provenance.poison_(recv)
            stamp(send, group, round)
            torch.cuda.synchronize()
            group.barrier()
            graph.replay()
            torch.cuda.synchronize()
            problem = provenance.explain_mismatch(recv, layout(group, rows), round=round)
            assert not problem, f"{name}: {problem}"
            group.barrier()


def check_memory_of_another_pool_is_copied() -> None:
    """The memory belongs to a replaced pool that NCCL still knows, or to another group."""
    group = world_group()
    rows = SHARD_ROWS[1]
    symmetric_pool(group, "cuda").configure(64 << 20)
    send, recv = (in_pool(group, n, shifted=True) for n in (rows, rows * group.size))
    symmetric_pool(group, "cuda").configure(256 << 20)
    stamp(send, group, 1)
    gather(group, send, recv, 1)
    report = last_path(group)
    assert report.path == "fallback"
    assert "SGLang #19329" in report.reason, report
    for cp_size in (n for n in range(1, group.size) if group.size % n == 0):
        other = init_context_parallel(cp_size)
        send, recv = (in_pool(other, n, shifted=True) for n in (rows, rows * group.size))
        init_context_parallel(group.size)
        stamp(send, group, 2)
        gather(group, send, recv, 2)


def check_a_shard_without_padding_may_lie_in_the_pool_of_one_rank() -> None:
    """`padded` and `padded_symm_recv` pass such a shard on unchanged."""
    group = world_group()
    for rows in SHARD_ROWS[:2]:
        metadata = layout(group, rows)
        for first_rank_only in (True, False):
            for round, algorithm in enumerate(("padded", "padded_symm_recv", "padded_symm"), 1):
                shard = in_pool(group, rows, shifted=True)
                if first_rank_only and group.rank:
                    shard = ordinary(rows)
                stamp(shard, group, round)
                (got,) = all_gather_kv([shard], metadata, group, algorithm=algorithm)
                provenance.check(got, metadata, round=round)
                assert last_path(group).path == path_by_table(algorithm), algorithm


def kernels(path: str, rows: int, group: CPGroup) -> tuple[str, ...]:
    """Return the names that NCCL's kernel may have. Only more than two ranks use multicast."""
    if path == "symmetric":
        name = "AllGather_LL" if rows == SHARD_ROWS[0] else "AllGather_ST"
        return (name,) if group.size == 2 else (name, f"{name}MC", "AllGather_ST", "AllGather_STMC")
    algorithms = ("RING",) if group.size == 2 else ("RING", "NVLS", "PAT")
    return tuple(
        f"{name} {protocol}" for name in algorithms for protocol in ("LL", "LL128", "SIMPLE")
    )


def check_nccls_log_agrees_with_the_path() -> None:
    """Compare the path that NCCL logged with the predicted one."""
    group = world_group()
    log = Path(os.environ["NCCL_DEBUG_FILE"].removesuffix(".%p"))
    for rows in SHARD_ROWS[:2]:
        for name, send, recv, path in placements(group, rows):
            stamp(send, group, 1)
            before = count_file(log)
            gather(group, send, recv, 1)
            group.barrier()
            if group.rank == 0:  # the only rank whose NCCL writes these lines
                new = Counter(count_file(log).calls) - Counter(before.calls)
                (selected,) = new.elements()
                paths = {path}
                report = last_path(group)
                if rows == SHARD_ROWS[0] and report and "AllGather_LL" in report.reason:
                    paths |= {"symmetric"}  # a registered send buffer alone: see NCCL_RULES
                assert selected.kind in paths, (name, selected)
                assert selected.nbytes == rows * ROW_BYTES, (name, selected)
                assert selected.kernel in kernels(selected.kind, rows, group), (name, selected)
                assert selected.channels > 0, (name, selected)


def check_without_the_copy_the_rows_are_wrong() -> None:
    """Negative control: NCCL receives into a buffer at a different offset on each rank."""
    group = world_group()
    rows = SHARD_ROWS[1]
    send = stamp(in_pool(group, rows), group, 1)
    recv = in_pool(group, rows * group.size, shifted=True)
    path_module.decide_from.cache_clear()
    with planted(path_module, "unsafe_for_nccl", lambda _original, _places: (False, False)):
        # If this raises nothing, NCCL has become safe: see cpkit.memory.path.unsafe_for_nccl.
        raised(provenance.ProvenanceError, gather, group, send, recv, 1)
    path_module.decide_from.cache_clear()
