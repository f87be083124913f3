"""The lifetime of symmetric memory on CUDA: what is kept, what is freed, what a graph keeps."""

from __future__ import annotations

import gc

import torch

from cpkit import provenance
from cpkit.gather import ALGORITHMS, all_gather_kv
from cpkit.group import CPGroup
from cpkit.kernels.gather_kernel import gather_kernel
from cpkit.kernels.launch import TileTables
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.plan import plan_gather_kv
from cpkit.symm import SymmetricPool, symmetric_pool, use_symmetric_memory
from cpkit.sync.exchange import SymmetricMemoryError
from tests.ranks.cuda import MIB, Rounds, captured, gather_works, rounds_of, wrong_words
from tests.ranks.device import OWN_GPU, batch_of, world_group
from tests.ranks.errors import error_of, raised


def free_bytes(group: CPGroup) -> int:
    """Return the free bytes of the GPU once all ranks have freed their memory."""
    gc.collect()
    torch.cuda.synchronize()
    group.barrier()
    free, _ = torch.cuda.mem_get_info()
    group.barrier()
    return free


def gather_stamped(group: CPGroup, round: int) -> tuple[torch.Tensor, ContextParallelMetadata]:
    metadata = prepare_context_parallel_metadata([97, 64], group.size)
    rows = provenance.shard_rows(metadata, group.rank, (4, 16), torch.float32, round=round).cuda()
    return all_gather_kv([rows], metadata, group)[0], metadata


def check_a_held_result_outlives_its_pool() -> None:
    group = world_group()
    symmetric_pool(group, "cuda").configure(4 * MIB)
    held, metadata = gather_stamped(group, 1)
    symmetric_pool(group, "cuda").configure(4 * MIB)
    for round in range(2, 6):
        got, _ = gather_stamped(group, round)
        provenance.check(got, metadata, round=round)
    provenance.check(held, metadata, round=1)


def check_dropped_memory_is_freed() -> None:
    group = world_group()
    large = 256 * MIB

    def shrink() -> None:
        for _ in range(2):  # NCCL's windows end when the next segment is made
            symmetric_pool(group, "cuda").configure(4 * MIB)

    shrink()
    before = free_bytes(group)
    symmetric_pool(group, "cuda").configure(large)
    taken = before - free_bytes(group)
    shrink()
    left = before - free_bytes(group)
    assert taken > 0.9 * large * (1 if OWN_GPU else group.size), taken
    assert left < 0.1 * large, left


def check_growing_and_dropping_leaves_nothing() -> None:
    """A spill and a new arena, 200 times; rows are right in between, and the memory is flat."""
    group, metadata, rows = batch_of(97, 64)
    free = []
    for round in range(200):
        pool = symmetric_pool(group, "cuda").configure(4 * MIB)
        spill = pool.empty([8 * MIB], torch.uint8)
        if round % 50 == 0:
            for algorithm in ALGORITHMS:
                (got,) = all_gather_kv([rows], metadata, group, algorithm=algorithm)
                provenance.check(got, metadata, round=1)
                del got
        del spill, pool
        if round in (20, 199):
            free.append(free_bytes(group))
    assert free[0] - free[1] < 8 * MIB, free


def check_equal_segments_are_paired_in_the_same_order_after_configure() -> None:
    """The ranks drop two spills of one size in different orders and allocate two more."""
    group = world_group()
    pool = symmetric_pool(group, "cuda").configure(4 * MIB)
    for round in range(4):
        spills = [pool.empty([8 * MIB], torch.uint8) for _ in range(2)]
        for spill in spills:
            inboxes = spill[: 8 * group.size].view(torch.int64)
            for peer in range(group.size):
                pool.peer_view(inboxes, peer)[group.rank] = 100 * round + group.rank
            pool.backend.leave()
            assert inboxes.tolist() == [100 * round + rank for rank in range(group.size)]
        del spill, inboxes
        del spills[group.rank % 2]
        del spills
        gc.collect()
        pool = pool.configure(4 * MIB)
    gather_works(group)


def check_an_offset_beyond_2_gib_needs_no_other_kernel() -> None:
    group = world_group()
    pool = symmetric_pool(group, "cuda").configure((2 << 30) + 64 * MIB)
    got, metadata = gather_stamped(group, 1)
    provenance.check(got, metadata, round=1)
    variants = sum(len(kernels[0]) for kernels in gather_kernel.device_caches.values())
    below = pool.empty([(2 << 30) + MIB], torch.uint8)
    got, metadata = gather_stamped(group, 2)
    place = pool.locate(got)
    assert place[1] > 2 << 30, place
    provenance.check(got, metadata, round=2)
    assert sum(len(kernels[0]) for kernels in gather_kernel.device_caches.values()) == variants
    del below
    pool.configure(64 * MIB)


def check_a_plan_captured_by_its_caller() -> None:
    """Replays and eager calls alternate, and rank 0 is sometimes late."""
    group, metadata, rounds = rounds_of(97, 64)
    plan = plan_gather_kv([rounds.mine], metadata, group)
    graph, result = captured(plan)
    for call in range(60):
        rounds.tick()
        if group.rank == 0 and call % 7 == 0:
            torch.cuda._sleep(2_000_000)
        if call % 3 == 2:
            rounds.judge(plan()[0])
        else:
            graph.replay()
            rounds.judge(result)
    assert wrong_words(rounds, group) == 0


def check_a_plan_keeps_the_tiles_that_its_graphs_read() -> None:
    """In the meantime, its tiles are evicted, created again and captured again."""
    group = world_group()
    lengths = ([97, 64], [201], [97, 64])
    layouts = [prepare_context_parallel_metadata(each, group.size) for each in lengths]
    rounds = [Rounds(group, metadata) for metadata in layouts]
    kept, TileTables.MAX_TABLES = TileTables.MAX_TABLES, 1
    try:
        plans = [
            plan_gather_kv([each.mine], metadata, group)
            for each, metadata in zip(rounds, layouts, strict=True)
        ]
        junk = [torch.full((4096,), -1, dtype=torch.int64, device="cuda") for _ in range(64)]
        for each, plan in zip(rounds * 3, plans * 3, strict=True):
            each.tick()
            each.judge(plan()[0])
    finally:
        TileTables.MAX_TABLES = kept
    del junk
    assert [wrong_words(each, group) for each in rounds] == [0, 0, 0]


def check_a_plan_is_not_made_during_a_capture() -> None:
    group, metadata, rounds = rounds_of(97, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        said = error_of(plan_gather_kv, [rounds.mine], metadata, group)
        rounds.mine.add_(0)
    assert "make it before" in said


def check_only_direct_is_captured_into_caches() -> None:
    group, metadata, rounds = rounds_of(97, 64)
    slots = torch.arange(161, device="cuda")
    with use_symmetric_memory(group):
        cache = torch.empty(161, 4, 16, device="cuda")

    def gather(algorithm: str) -> list[torch.Tensor]:
        return all_gather_kv(
            [rounds.mine], metadata, group, algorithm=algorithm, into=[cache], slots=slots
        )

    gather("padded")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        said = error_of(gather, "padded")
        unknown = error_of(gather, "direct")
        rounds.mine.add_(0)
    assert "only 'direct' in symmetric memory" in said
    assert "run it once" in unknown


def check_a_pool_that_must_grow_during_capture_is_an_error_on_every_rank() -> None:
    group = world_group()
    pool = symmetric_pool(group, "cuda").configure(4 * MIB)
    metadata = prepare_context_parallel_metadata([64], group.size)
    rows = torch.zeros(metadata.per_rank_actual_token[group.rank], 8, device="cuda")
    all_gather_kv([rows], metadata, group)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        said = error_of(pool.empty, [8 * MIB], torch.uint8)
        rows.add_(1)
    assert "warm_up" in said
    assert pool.stats().spills == 0


def check_memory_that_one_rank_cannot_allocate_is_an_error_on_all_ranks() -> None:
    group = world_group()
    symmetric_pool(group, "cuda").configure(4 * MIB)
    if group.rank == 1:
        torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        said = raised(SymmetricMemoryError, symmetric_pool(group, "cuda").configure, 512 * MIB)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert said.startswith("cannot preallocate the symmetric pool. rank 1:"), said
    assert "CPKIT_SYMM_PREALLOC_GB" in said
    gather_works(group)


def check_an_arena_larger_than_the_gpu_is_a_clear_error() -> None:
    group = world_group()
    symmetric_pool(group, "cuda")
    too_much = 1 << 42
    said = raised(SymmetricMemoryError, SymmetricPool, group, too_much, "cuda")
    assert f"{too_much} were requested" in said
    assert "bytes free" in said
    gather_works(group)


def check_spills_are_timed_and_warm_up_keeps_one_arena() -> None:
    group = world_group()
    pool = symmetric_pool(group, "cuda").configure(4 * MIB)
    group.samples_pools = True
    with use_symmetric_memory(group):
        large = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
    stats = pool.stats()
    assert (stats.spills, stats.segments) == (1, 2)
    assert stats.spill_ms > 0
    assert pool.history.samples[-1].used_bytes >= large.numel()
    del large
    pool.warm_up(20000, (8, 16), torch.float32, tensors=2)
    assert pool.stats().segments == 1
    assert pool.stats().arena_bytes > 8 * MIB
