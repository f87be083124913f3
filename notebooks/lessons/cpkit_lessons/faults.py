"""One rank of the failure lab: make one mistake on purpose, and write a report.

    python -m cpkit_lessons.faults CASE VICTIM DEADLINE_S DIRECTORY
    (RANK and WORLD_SIZE in the environment)

`cpkit_lessons.failure_lab` starts and kills these ranks. If it cannot kill a rank, the alarm of the
rank does so after `_LIFE_S`.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from cpkit.group import CPGroup, init_context_parallel
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.memory.allocator import FreeList
from cpkit.provenance import explain_mismatch, poison_, shard_rows
from cpkit.settings import shm_dir
from cpkit.symm import SymmetricPool, explain_path, symmetric_pool, use_symmetric_memory
from cpkit.sync.shm import make_segment
from cpkit_lessons.failure_lab import RankReport, ready_file
from cpkit_lessons.one_rank import group_of_all

ROWS, SHAPE, DTYPE = 4, (8, 16), torch.bfloat16  # rows per rank, of 256 bytes each
NCCL_VERSIONS = ("2.28.9", "2.29.7")
_LIFE_S = 40

Case = Callable[[CPGroup, int], RankReport]


def skips_the_rendezvous(group: CPGroup, victim: int) -> RankReport:
    """Create no symmetric memory on the victim."""
    if group.rank == victim:
        return RankReport(group.rank, message="took the other branch and ended")
    symmetric_pool(group)
    return RankReport(group.rank)


def sizes_differ(group: CPGroup, victim: int) -> RankReport:
    """Size a scratch buffer by the rows of the rank instead of by max_rank_len."""
    local_rows = ROWS + (group.rank == victim)
    with use_symmetric_memory(group):
        scratch = torch.empty(local_rows, *SHAPE, dtype=DTYPE)
        output = _output(group)
    del scratch
    return _gather(group, _shard(group), output)


def receive_only(group: CPGroup, _: int) -> RankReport:
    """Register the output only, as sglang#24040 does; the shard is an ordinary tensor."""
    with use_symmetric_memory(group):
        output = _output(group)
    return _gather(group, _shard(group), output)


def wrong_group(group: CPGroup, _: int) -> RankReport:
    """Allocate the buffers in the pool of another group (sglang#19329)."""
    with use_symmetric_memory(init_context_parallel(1)):
        output = _output(group)
        shard = torch.empty(ROWS, *SHAPE, dtype=DTYPE)
    shard.copy_(_shard(group))
    return _gather(group, shard, output)


def divergent_free_lists(group: CPGroup, victim: int) -> RankReport:
    """Keep a block on the victim that all others have freed, in an allocator without agreement."""
    row_bytes = 256
    segment = make_segment(group.store_exchange, 64 * row_bytes, "make an arena")
    arena = FreeList(segment.nbytes)
    block_bytes = group.size * ROWS * row_bytes
    old = arena.allocate(block_bytes)
    arena.allocate(row_bytes)
    if group.rank != victim and old is not None:
        arena.free(old, block_bytes)
    offset = arena.allocate(block_bytes)
    assert offset is not None

    def output(rank: int) -> torch.Tensor:
        memory = segment.view(rank, offset, block_bytes)
        return memory.view(DTYPE).view(group.size * ROWS, *SHAPE)

    poison_(output(group.rank))
    group.barrier()
    mine = slice(group.rank * ROWS, (group.rank + 1) * ROWS)
    for peer in range(group.size):
        output(peer)[mine] = _shard(group)  # at this rank's offset in the peer's memory
    group.barrier()
    wrong = explain_mismatch(output(group.rank).clone(), _layout(group), round=1) or ""
    return RankReport(group.rank, wrong=wrong, reason=f"recv is at offset {offset}")


def shared_memory_is_full(group: CPGroup, _: int) -> RankReport:
    """Create an arena that is larger than the free shared memory."""
    group.barrier()
    SymmetricPool(group, prealloc=2 * shutil.disk_usage(shm_dir()).free + (1 << 30))
    return RankReport(group.rank)


def a_rank_dies(group: CPGroup, victim: int) -> RankReport:
    """Kill the victim before the gather, as the kernel's OOM killer would."""
    with use_symmetric_memory(group):
        output = _output(group)
    if group.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return _gather(group, _shard(group), output)


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        skips_the_rendezvous,
        sizes_differ,
        receive_only,
        wrong_group,
        divergent_free_lists,
        shared_memory_is_full,
        a_rank_dies,
    )
}


def _layout(group: CPGroup) -> ContextParallelMetadata:
    return prepare_context_parallel_metadata([ROWS * group.size], group.size, "contiguous")


def _shard(group: CPGroup) -> torch.Tensor:
    return shard_rows(_layout(group), group.rank, SHAPE, DTYPE, round=1)


def _output(group: CPGroup) -> torch.Tensor:
    return torch.empty(group.size * ROWS, *SHAPE, dtype=DTYPE)


def _gather(group: CPGroup, shard: torch.Tensor, output: torch.Tensor) -> RankReport:
    """Gather, compare every bit, and add the path that each NCCL version would have taken."""
    poison_(output)
    group.cp_all_gather_into_tensor_async(output, shard)
    wrong = explain_mismatch(output, _layout(group), round=1) or ""
    assert group.last_path is not None
    paths, reasons = {"posix": group.last_path.path}, [group.last_path.reason]
    for version in NCCL_VERSIONS:
        report = explain_path(shard, output, group, transport=f"nccl {version}")
        paths[f"nccl {version}"] = report.path
        reasons.append(report.reason)
    return RankReport(group.rank, paths=dict(paths), reason="\n".join(reasons), wrong=wrong)


def main(case: str, victim: int, deadline_s: str, directory: Path) -> None:
    """Run one case on this rank. Does not return; the exit code is 1 after an exception."""
    signal.alarm(_LIFE_S)
    group = group_of_all(directory)
    rank = group.rank
    ready_file(directory, rank).touch()
    os.environ["CPKIT_DEADLINE_S"] = deadline_s  # not earlier, because startup may take longer
    start = time.monotonic()
    try:
        report = CASES[case](group, victim)
    except Exception as problem:  # noqa: BLE001 - every exception belongs in the report
        report = RankReport(rank, type(problem).__name__, str(problem))
    report = msgspec.structs.replace(report, waited_s=time.monotonic() - start)
    (directory / f"{rank}.json").write_bytes(msgspec.json.encode(report))
    sys.stdout.flush()
    os._exit(int(bool(report.error)))  # skips cleanup, which could wait for dead peers


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
