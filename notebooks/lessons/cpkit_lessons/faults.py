"""One throw-away rank: makes one mistake on purpose, and writes down what it saw.

    python -m cpkit_lessons.faults CASE VICTIM DEADLINE_S DIRECTORY PARENT_PID
    (RANK and WORLD_SIZE in the environment)

`cpkit_lessons.throwaway` starts these ranks, tied to its own process (cpkit.control.tied), and
ends them. A rank also ends on its own when its time is up: a mistake can't outlive its lesson.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from cpkit.group import CPGroup, init_context_parallel
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.memory.allocator import Arena
from cpkit.provenance import explain_mismatch, poison_, shard_rows
from cpkit.symm import SymmetricPool, explain_path, symmetric_pool, use_symmetric_memory
from cpkit.sync.shm import free_bytes, make_segment
from cpkit_lessons.fault_report import RankReport

ROWS, SHAPE, DTYPE = 4, (8, 16), torch.bfloat16  # rows a rank, of 256 bytes
NCCL_VERSIONS = ("2.28.9", "2.29.7")
_LIFE_S = 40.0


Case = Callable[[CPGroup, int], RankReport]


def skips_the_rendezvous(group: CPGroup, victim: int) -> RankReport:
    """The victim takes a branch in which no symmetric memory is made."""
    if group.rank == victim:
        return RankReport(group.rank, said="took another branch and went home")
    symmetric_pool(group)
    return RankReport(group.rank)


def sizes_differ(group: CPGroup, victim: int) -> RankReport:
    """Each rank sizes a scratch buffer by its own rows, not by max_rank_len."""
    local_rows = ROWS + (group.rank == victim)
    with use_symmetric_memory(group):
        scratch = torch.empty(local_rows, *SHAPE, dtype=DTYPE)
        output = torch.empty(group.size * ROWS, *SHAPE, dtype=DTYPE)
    del scratch
    return _gather(group, _shard(group), output)


def receive_only(group: CPGroup, _: int) -> RankReport:
    """As #24040 merged it: the output is symmetric, the shard is an ordinary tensor."""
    with use_symmetric_memory(group):
        output = torch.empty(group.size * ROWS, *SHAPE, dtype=DTYPE)
    return _gather(group, _shard(group), output)


def wrong_group(group: CPGroup, _: int) -> RankReport:
    """The buffers are made in the pool of another group (#19329)."""
    other = init_context_parallel(1)
    with use_symmetric_memory(other):
        output = torch.empty(group.size * ROWS, *SHAPE, dtype=DTYPE)
        shard = torch.empty(ROWS, *SHAPE, dtype=DTYPE)
    shard.copy_(_shard(group))
    return _gather(group, shard, output)


def divergent_free_lists(group: CPGroup, victim: int) -> RankReport:
    """An allocator without common books: the victim keeps a block that all others have freed."""
    row_bytes = 256
    segment = make_segment(group.store_exchange, 64 * row_bytes, "make an arena")
    arena = Arena(segment.nbytes)
    block_bytes = group.size * ROWS * row_bytes
    old = arena.allocate(block_bytes)
    arena.allocate(row_bytes)
    if group.rank != victim and old is not None:
        arena.free(old, block_bytes)
    offset = arena.allocate(block_bytes)
    assert offset is not None

    def recv(rank: int) -> torch.Tensor:
        memory = segment.view(rank, offset, block_bytes)
        return memory.view(DTYPE).view(group.size * ROWS, *SHAPE)

    poison_(recv(group.rank))
    group.barrier()
    mine = slice(group.rank * ROWS, (group.rank + 1) * ROWS)
    for peer in range(group.size):
        recv(peer)[mine] = _shard(group)  # at *my* offset in the peer's memory
    group.barrier()
    wrong = explain_mismatch(recv(group.rank).clone(), _layout(group), round=1) or ""
    return RankReport(group.rank, wrong=wrong, reason=f"recv is at offset {offset}")


def shared_memory_is_full(group: CPGroup, _: int) -> RankReport:
    """The arena is larger than what is left of the shared memory."""
    group.barrier()
    SymmetricPool(group, prealloc=2 * free_bytes() + (1 << 30))
    return RankReport(group.rank)


def a_rank_dies(group: CPGroup, victim: int) -> RankReport:
    """The victim is killed between its put and the barrier, as by the kernel's OOM killer."""
    with use_symmetric_memory(group):
        output = torch.empty(group.size * ROWS, *SHAPE, dtype=DTYPE)
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


def _gather(group: CPGroup, shard: torch.Tensor, output: torch.Tensor) -> RankReport:
    """Gather, compare every bit, and ask what NCCL would have done with these buffers."""
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


def main(case: str, victim: int, deadline_s: str, directory: Path, parent_pid: int) -> None:
    """Run one case on this rank. Does not return: the exit code is 1 when it ended in an error."""
    _limit_life(parent_pid)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _store(directory, rank, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    group = init_context_parallel(size)
    os.environ["CPKIT_DEADLINE_S"] = deadline_s  # from here on; starting up may take longer
    start = time.monotonic()
    try:
        report = CASES[case](group, victim)
    except Exception as problem:  # noqa: BLE001 - whatever it is, it goes into the post-mortem
        report = RankReport(rank, type(problem).__name__, str(problem))
    waited_s = time.monotonic() - start
    report = msgspec.structs.replace(report, waited_s=waited_s)
    (directory / f"{rank}.json").write_bytes(msgspec.json.encode(report))
    _stay_until_all_have_written(directory, size)
    sys.stdout.flush()
    os._exit(int(bool(report.error)))  # no clean-up with peers that may be gone


def _store(directory: Path, rank: int, size: int) -> dist.Store:
    """The job's key-value store: rank 0 serves it on a free port, and writes the port down."""
    note = directory / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        note.with_suffix(".new").write_text(str(store.port))
        note.with_suffix(".new").rename(note)
        return store
    while not note.exists():
        time.sleep(0.02)
    timeout = timedelta(seconds=20)
    return dist.TCPStore("127.0.0.1", int(note.read_text()), size, timeout=timeout)


def _stay_until_all_have_written(directory: Path, size: int) -> None:
    """Rank 0 serves the store: its peers still need it while they find their words.

    A victim that was killed never writes; so not for long.
    """
    give_up = time.monotonic() + 1
    notes = [directory / f"{rank}.json" for rank in range(size)]
    while time.monotonic() < give_up and not all(note.exists() for note in notes):
        time.sleep(0.02)


def _limit_life(parent_pid: int) -> None:
    """Start a thread that ends this process when its time is up.

    Or when its parent is gone, for systems on which cpkit.control.tied has only the pid to go by.
    """
    give_up = time.monotonic() + _LIFE_S

    def watch() -> None:
        while os.getppid() == parent_pid and time.monotonic() < give_up:
            time.sleep(0.1)
        os._exit(3)

    threading.Thread(target=watch, name="cpkit life", daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]))
