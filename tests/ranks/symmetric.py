"""Symmetric memory: one offset is the same block on every rank; a difference is an error."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from unittest import mock

import psutil
import torch
import torch.distributed as dist

from cpkit.gather import all_gather_kv, last_path
from cpkit.group import init_context_parallel
from cpkit.layout import prepare_context_parallel_metadata
from cpkit.memory.allocator import MAX_BLOCKS
from cpkit.settings import shm_dir
from cpkit.symm import (
    SymmetricMemoryError,
    SymmetricPool,
    explain_path,
    is_allocation_symmetric,
    symmetric_pool,
    use_symmetric_memory,
)
from cpkit.sync import free_memory, shm
from cpkit.sync.agreement import Signature
from cpkit.sync.free_memory import Limit
from cpkit.sync.shm import _create, free_bytes, reap_dead_files
from tests.ranks.device import batch_of, world_group
from tests.ranks.errors import error_of, raised
from tests.ranks.gathers import cp_sizes
from tests.ranks.groups import gather_works
from tests.ranks.mutants import planted

MIB = 1 << 20


def own_files() -> list[Path]:
    return list(shm_dir().glob(f"cpkit-{os.getuid()}-{os.getpid()}-*"))


def check_peers_write_into_each_others_memory() -> None:
    group = world_group()
    with use_symmetric_memory(group):
        inbox = torch.zeros(group.size, 5, dtype=torch.int64)
    group.barrier()
    for peer in range(group.size):
        symmetric_pool(group).peer_view(inbox, peer)[group.rank] = 100 * group.rank + peer
    group.barrier()
    assert inbox[:, 0].tolist() == [100 * sender + group.rank for sender in range(group.size)]


def check_offsets_agree_and_memory_is_reused() -> None:
    group = world_group()
    pool = symmetric_pool(group)
    seen = set()
    for size in (1, 300, 4096, 70000) * 5:
        with use_symmetric_memory(group):
            x = torch.empty(size, dtype=torch.uint8)
        place = pool.locate(x)
        assert len(set(group.exchange(repr(place).encode()))) == 1
        seen.add(place)
        del x
        pool.free_dropped("settle")
    assert len(seen) == 1
    assert pool.stats().used_bytes == 0


def check_a_block_that_one_rank_still_holds_is_not_reused() -> None:
    """A block is free only if all ranks have released it; rank 0 still holds it."""
    group = world_group()
    pool = symmetric_pool(group)

    def allocate() -> torch.Tensor:
        with use_symmetric_memory(group):
            return torch.empty(4096, dtype=torch.uint8)

    held = allocate()
    location = pool.locate(held)
    kept = [held] if group.rank == 0 else []
    del held
    pool.free_dropped("settle")
    other = allocate()
    assert pool.locate(other) != location, f"rank {group.rank}: {location} was given out twice"
    kept.clear()
    del other
    pool.free_dropped("settle")
    assert pool.locate(allocate()) == location
    pool.free_dropped("settle")


def check_a_block_that_is_placed_during_an_agreement_is_freed_once() -> None:
    """Both blocks are alive, so they have different memory.

    In a full pool an allocation is an agreement of its own. Here it happens inside the checks of
    another one: the factories of those checks are redirected to the pool too.
    """
    group = init_context_parallel(dist.get_world_size(), "freed once")
    pool = SymmetricPool(group, 1 << 20)
    with use_symmetric_memory(group):
        full = torch.empty(pool.stats().largest_free_bytes - 256, dtype=torch.uint8)
        del full  # and not yet free: the peers have not agreed
        with pool.agreement() as call:
            temporary = torch.zeros(5000)
            del temporary
            call.must_match(Signature("an agreement around an allocation"))
        first = torch.full((1000,), 1.0)
        pool.free_dropped("free what was dropped")
        second = torch.full((1000,), 2.0)
    assert pool.locate(first) != pool.locate(second)
    assert first.unique().tolist() == [1.0]


def check_a_failed_warm_up_keeps_the_arena() -> None:
    group = init_context_parallel(dist.get_world_size(), "failed warm-up")
    pool = SymmetricPool(group, 1 << 20)
    assert "warm the symmetric pool up" in raised(SymmetricMemoryError, pool.warm_up, 1 << 35)
    assert pool.stats().arena_bytes == 1 << 20
    with use_symmetric_memory(group):
        blocks = [torch.empty(1000) for _ in range(20)]
    assert len(blocks) == 20
    assert pool.stats().spills == 0


def check_files_are_unlinked_once_they_are_mapped() -> None:
    group = world_group()
    symmetric_pool(group)
    group.barrier()
    assert own_files() == []


def check_disabled_means_ordinary_memory() -> None:
    group = world_group()
    with use_symmetric_memory(group, disabled=True):
        x = torch.empty(10)
    with use_symmetric_memory(group, disabled=not is_allocation_symmetric()):
        y = torch.empty(10)
    assert symmetric_pool(group).locate(x) is None
    assert symmetric_pool(group).locate(y) is not None


def check_spills_are_counted_and_warm_up_prevents_them() -> None:
    group = world_group()
    pool = symmetric_pool(group).configure(MIB)
    with use_symmetric_memory(group):
        small = torch.empty(MIB // 2, dtype=torch.uint8)
    assert pool.stats().spills == 0
    with use_symmetric_memory(group):
        large = torch.empty(3 * MIB, dtype=torch.uint8)
    stats = pool.stats()
    assert (stats.spills, stats.segments, stats.arena_bytes) == (1, 2, MIB)
    assert stats.spill_bytes == 4 * MIB
    assert stats.registering_ms > 0
    assert stats.peak_bytes >= small.numel() + large.numel()

    pool = symmetric_pool(group).configure(MIB)
    pool.warm_up(20000, (8, 16), torch.float32, tensors=2)
    metadata = prepare_context_parallel_metadata([20000], group.size)
    rows = torch.zeros(metadata.per_rank_actual_token[group.rank], 8, 16)
    for algorithm in ("direct", "padded_symm", "padded_symm_recv") * 2:
        all_gather_kv([rows, rows], metadata, group, algorithm=algorithm)
    assert pool.stats().spills == 0


def check_different_allocations_are_an_error() -> None:
    group = world_group()
    size = 4096 if group.rank == 0 else 8192
    with use_symmetric_memory(group):
        torch.empty(size, dtype=torch.uint8)
    said = raised(SymmetricMemoryError, group.pools["cpu"].free_dropped, "anything")
    assert "rank 0: [4096]" in said
    assert "rank 1: [8192]" in said
    assert "max_rank_len" in said


def check_spills_that_differ_in_size_are_refused_with_the_sizes() -> None:
    group = world_group()
    symmetric_pool(group).configure(MIB)
    with use_symmetric_memory(group):
        said = error_of(torch.empty, (4 + 2 * group.rank) * MIB, dtype=torch.uint8)
    assert f"allocate {4 * MIB} symmetric bytes" in said
    assert f"allocate {6 * MIB} symmetric bytes" in said


def check_an_allocation_during_a_peers_gather_is_an_error_on_both_ranks() -> None:
    group, metadata, rows = batch_of(64)
    symmetric_pool(group).configure(MIB)
    if group.rank == 0:
        said = error_of(symmetric_pool(group).empty, [5 * MIB], torch.uint8)
    else:
        said = error_of(all_gather_kv, [rows], metadata, group)
    assert "rank(s) 0: allocate" in said
    assert "all_gather_kv" in said
    gather_works()


def check_full_shared_memory_is_a_clear_error_on_every_rank() -> None:
    """First all ranks request more than is available; then only one rank cannot create a file."""
    group = world_group()
    symmetric_pool(group)
    too_much = free_bytes() * 2
    said = raised(SymmetricMemoryError, symmetric_pool(group).configure, too_much)
    assert "too full" in said
    assert str(too_much) in said
    assert "--shm-size" in said
    group.barrier()
    if group.rank == 1:
        os.environ["CPKIT_SHM_DIR"] = "/proc"  # no process can create files there
    said = raised(SymmetricMemoryError, symmetric_pool(group).configure, MIB)
    os.environ.pop("CPKIT_SHM_DIR", None)
    assert said.startswith("cannot preallocate the symmetric pool. rank 1: cannot create")
    assert "rank 0" not in said
    assert own_files() == []
    gather_works()


def check_memory_that_the_system_refuses_has_its_own_words() -> None:
    """One rank has no memory left while the segment is made; the file system has room."""
    group = world_group()
    pool = symmetric_pool(group)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "planted") if group.size == 2 else MemoryError("planted")

    with planted(shm, "_reserve", refuse) if group.rank == 1 else nullcontext():
        said = raised(SymmetricMemoryError, pool.configure, MIB)
    assert "rank 1: cannot create a segment" in said
    assert "the system refused the memory" in said
    assert "too full" not in said
    gather_works()


def check_what_exceeds_the_limit_of_the_container_is_refused_before_it_allocates() -> None:
    """The container has room for one rank's gather, and not for those of all ranks."""
    group, metadata, rows = batch_of(1024, trailing=(8192,))
    result = metadata.total_tokens * rows[0].nbytes
    pool = symmetric_pool(group).configure(MIB)
    limits: list[Limit] = []
    with planted(free_memory, "_cgroup_limits", lambda *_: limits):
        for algorithm, per_rank in (("direct", result), ("padded", 3.25 * result)):
            limits[:] = [Limit("test", int(1.5 * per_rank), "the limit is low", "Raise it")]
            said = error_of(all_gather_kv, [rows], metadata, group, algorithm=algorithm)
            assert f"the limit is low, and {group.size} rank(s) need" in said
        said = raised(SymmetricMemoryError, pool.empty, [5 * result], torch.uint8)
        assert f"the limit is low, and {group.size} rank(s) need" in said
    assert pool.stats().segments == 1
    gather_works()


def check_files_of_killed_processes_are_reaped() -> None:
    if dist.get_rank() == 0:
        directory = mkdtemp()
        os.environ["CPKIT_SHM_DIR"] = directory
        code = "import os, cpkit.sync.shm as s; s._create(4096, 1); os.kill(os.getpid(), 9)"
        subprocess.run([sys.executable, "-c", code], check=False)
        left = list(Path(directory).iterdir())
        assert len(left) == 1
        assert left[0].stat().st_mode & 0o777 == 0o600
        stranger = Path(directory) / f"cpkit-{os.getuid()}-note"
        stranger.touch()
        assert reap_dead_files() == left
        stranger.unlink()
        Path(directory).rmdir()
        del os.environ["CPKIT_SHM_DIR"]


def check_a_file_that_is_reaped_before_it_is_locked_is_made_again() -> None:
    """A peer locks the first file before its owner, or has already removed it by then.

    Afterwards the lock alone decides, whatever process id is in the name.
    """
    with TemporaryDirectory() as apart, mock.patch.dict(os.environ, CPKIT_SHM_DIR=apart):
        for owner_gets_lock in (False, True):
            files: list[list[Path]] = []

            def lock(_: int, gets: bool = owner_gets_lock, files: list[list[Path]] = files) -> bool:
                files.append(own_files())
                return len(files) > 1 or (gets and files[0][0].unlink() is None)

            with mock.patch("cpkit.sync.shm._lock", lock):
                path, _, problem = _create(4096, 1)
            assert not problem
            assert own_files() == [path] == files[1] != files[0]
            path.unlink()
        path, own, _ = _create(4096, 1)
        assert reap_dead_files() == []
        own.close()
        assert reap_dead_files() == [path]


def check_a_rank_without_descriptors_is_named_and_recovers() -> None:
    """Rank 1 has 0, 1 and then 2 free descriptors: it fails at each step of making a segment."""
    group = world_group()
    symmetric_pool(group).configure(MIB)
    used, limits = psutil.Process().num_fds(), resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest_free := os.dup(0))
    for free in range(3):
        if group.rank == 1:
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + free, limits[1]))
        try:
            said = raised(SymmetricMemoryError, symmetric_pool(group).configure, 2 * MIB)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert "rank 1: " in said, said
        assert "too many open files: the limit of this process is " in said, said
        assert "`ulimit -n " in said, said
        assert psutil.Process().num_fds() == used
    assert own_files() == []
    gather_works()


def check_the_predicted_path_is_the_reported_one() -> None:
    group = world_group()
    with use_symmetric_memory(group):
        symm_send = torch.full((4, 4), float(group.rank))
        symm_recv = torch.empty(4 * group.size, 4)
    send, recv = torch.full((4, 4), float(group.rank)), torch.empty(4 * group.size, 4)
    cases = [
        (symm_send, symm_recv, "symmetric"),
        (send, symm_recv, "symmetric"),
        (symm_send, recv, "staged"),
        (send, recv, "fallback"),
    ]
    for source, target, path in cases:
        target.fill_(-1)
        report = explain_path(source, target, group)
        group.cp_all_gather_into_tensor_async(target, source)
        assert target[:, 1].tolist() == [float(r) for r in range(group.size) for _ in range(4)]
        assert report.path == path
        assert last_path(group) == report


def check_a_buffer_of_another_group_is_named() -> None:
    wide, narrow = world_group(), init_context_parallel(cp_sizes()[0])
    with use_symmetric_memory(narrow):
        send = torch.zeros(4, 4)
    report = explain_path(send, send, wide)
    assert report.path == "fallback"
    assert "pool of another group" in report.recv


def check_bad_pools_are_refused() -> None:
    group = world_group()
    assert "prealloc is 0 bytes" in error_of(SymmetricPool, group, 0)
    assert "prealloc is '4G' bytes" in error_of(SymmetricPool, group, "4G")
    assert "init_context_parallel" in error_of(symmetric_pool, None)
    pool = symmetric_pool(group)
    assert "max_tokens is 0" in error_of(pool.warm_up, 0 if group.rank == 0 else 10)
    assert "rank(s) 0: warm_up(10" in error_of(pool.warm_up, 10 if group.rank == 0 else 1000)
    assert "use_symmetric_memory" in error_of(pool.peer_view, torch.zeros(3), 0)
    mine = pool.empty([3], torch.float32)
    for rank in (-1, True, "a", group.size):
        said = error_of(pool.peer_view, mine, rank)
        assert f"rank is {rank!r}; the group has ranks 0 to {group.size - 1}" in said, said
    assert "negated view" in error_of(pool.peer_view, torch._neg_view(mine), 0)
    if not torch.cuda.is_available():
        assert "where torch sees a GPU" in error_of(symmetric_pool, group, "cuda")
    gather_works()


def check_a_file_that_cannot_be_reserved_is_a_clear_error() -> None:
    """The check of the free space passes, but the reservation fails."""
    group = world_group()
    symmetric_pool(group)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if group.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB // 2, limits[1]))
    try:
        said = raised(SymmetricMemoryError, symmetric_pool(group).configure, MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"rank 0: cannot create a segment of 1.0 MiB ({MIB} bytes)" in said
    assert "ulimit -f" in said
    assert own_files() == []
    gather_works()


def check_the_last_block_of_the_pool_is_allocated_once() -> None:
    """1024 blocks are alive; after one is dropped, one more can be allocated."""
    group = world_group()
    pool = symmetric_pool(group)
    held = [pool.empty([1], torch.uint8) for _ in range(MAX_BLOCKS)]
    assert "1024 symmetric tensors are alive" in error_of(pool.empty, [1], torch.uint8)
    for _ in range(3):
        held.pop()
        held.append(pool.empty([1], torch.uint8))
    del held
    pool.free_dropped("settle")
    assert pool.stats().live_blocks == 0


def check_sizes_beyond_all_memory_are_refused_on_every_rank() -> None:
    """The error has a message, and the pool is unchanged."""
    group = world_group()
    first = group.rank == 0
    assert "prealloc is" in error_of(SymmetricPool, group, 1 << 70 if first else 1 << 20)
    pool = symmetric_pool(group)
    before = pool.stats()
    assert "too many" in error_of(pool.warm_up, 10**30 if first else 10)
    assert pool.stats() == before
    assert "full" in raised(SymmetricMemoryError, pool.warm_up, 10**10)
    assert pool.stats().spill_bytes == 0
    gather_works()
