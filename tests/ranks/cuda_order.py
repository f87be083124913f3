"""Launches that could interfere: on two streams, with few free blocks, or in graphs that outlive
their outputs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import repeat

import torch

from cpkit import provenance
from cpkit.gather import all_gather_kv
from cpkit.group import CPGroup
from cpkit.layout import prepare_context_parallel_metadata
from cpkit.plan import GatherPlan, plan_gather_kv
from cpkit.symm import use_symmetric_memory
from cpkit.sync.barrier import CallsDiffer
from tests.ranks.cuda import captured, gather_works, rounds_of, wrong_words
from tests.ranks.device import pool_of, world_group
from tests.ranks.errors import error_of, raised

FEW, MANY = [97, 64], [160000]  # tokens: one or two blocks per rank, and blocks on the whole GPU


def check_launches_on_two_streams_are_ordered() -> None:
    """Both use the one page of counters; the second must not count the blocks of the first."""
    _, _, many = rounds_of(*MANY)
    group, metadata, few = rounds_of(*FEW)
    plan = plan_gather_kv([few.mine], metadata, group)
    side = torch.cuda.Stream()
    for _ in range(30):
        many.tick()
        few.tick()
        (long,) = all_gather_kv([many.mine], many.metadata, group, stream=side)
        (short,) = all_gather_kv([few.mine], metadata, group)
        few.judge(short)
        (long_too,) = all_gather_kv([many.mine], many.metadata, group, stream=side)
        few.judge(plan()[0])
        torch.cuda.current_stream().wait_stream(side)
        many.judge(long)
        many.judge(long_too)
        del long, short, long_too
    assert wrong_words(few, group) + wrong_words(many, group) == 0


def check_ranks_on_both_sides_of_a_size_limit_use_one_launch_shape() -> None:
    """One rank has one row more than the others and starts last; its blocks must still fit."""
    group = world_group()
    tokens = group.size * 2048 - 1  # rows of 2 KiB: 4 MiB per rank, or one row less
    metadata = prepare_context_parallel_metadata([tokens], group.size)
    shape, dtype = (8, 128), torch.bfloat16
    rows = provenance.shard_rows(metadata, group.rank, shape, dtype, round=3).cuda()
    start = time.monotonic()
    for late in range(group.size):
        if group.rank == late:
            torch.cuda._sleep(20_000_000)  # about ten milliseconds
        (got,) = all_gather_kv([rows], metadata, group)
        provenance.check(got, metadata, round=3)
    assert time.monotonic() - start < 20


def check_blocks_that_wait_at_their_own_entry() -> None:
    """Ranks wait this way if each has a GPU of its own."""
    group, metadata, few = rounds_of(*FEW)
    group.shares_gpu = False
    graph, result = captured(lambda: all_gather_kv([few.mine], metadata, group))
    for _ in range(50):
        few.tick()
        graph.replay()
        few.judge(result)
        (got,) = all_gather_kv([few.mine], metadata, group)
        few.judge(got)
        del got
    assert wrong_words(few, group) == 0


def two_plans(group: CPGroup) -> list[GatherPlan]:
    plans = []
    for lengths in (FEW, FEW[::-1]):
        metadata = prepare_context_parallel_metadata(lengths, group.size)
        rows = provenance.shard_rows(metadata, group.rank, (8,), torch.float32, round=1)
        plans.append(plan_gather_kv([rows.cuda()], metadata, group))
    return plans


def in_another_order(group: CPGroup, calls: Sequence[Callable[[], object]]) -> None:
    """Make the calls, on rank 0 the last one first, and wait for the GPU."""
    group.barrier()
    with suppress(CallsDiffer):  # the second call may know already
        for call in calls if group.rank else reversed(calls):
            call()
    torch.cuda.synchronize()
    group.barrier()


def check_plans_called_in_another_order_raise_on_every_rank() -> None:
    group = world_group()
    plans = two_plans(group)
    in_another_order(group, plans)
    assert "were in different gathers" in raised(CallsDiffer, group.check)
    for plan in plans:
        raised(CallsDiffer, plan)
    _, metadata, few = rounds_of(*FEW)
    raised(CallsDiffer, all_gather_kv, [few.mine], metadata, group)


def check_without_tags_another_order_is_not_noticed() -> None:
    group = world_group()
    pool_of(group).backend.tags = repeat(0)
    in_another_order(group, two_plans(group))
    group.check()


def check_graphs_replayed_in_another_order_store_nothing_more() -> None:
    group, metadata, few = rounds_of(*FEW)
    graphs = [captured(lambda: all_gather_kv([few.mine], metadata, group)) for _ in range(2)]
    in_another_order(group, [graph.replay for graph, _ in graphs])
    raised(CallsDiffer, group.check)
    for _, result in graphs:
        result.fill_(-1)
    in_another_order(group, [graph.replay for graph, _ in graphs])
    assert all((result == -1).all() for _, result in graphs)


def check_the_outputs_of_a_captured_plan_are_never_reused() -> None:
    group, metadata, few = rounds_of(*FEW)
    plan = plan_gather_kv([few.mine], metadata, group)
    graph, result = captured(plan)
    del plan, result
    gc.collect()
    others = [all_gather_kv([few.mine], metadata, group)[0] for _ in range(4)]
    few.tick()
    graph.replay()
    torch.cuda.synchronize()
    group.barrier()
    for other in others:
        provenance.check(other, metadata, round=0)


def check_a_variant_that_was_not_compiled_is_not_captured() -> None:
    """Triton would compile another kernel for tensors of another alignment."""
    group = world_group()
    metadata = prepare_context_parallel_metadata(FEW, group.size)
    rows, total = metadata.per_rank_actual_token[group.rank], metadata.total_tokens
    memory = torch.zeros(rows * 132 + 16, dtype=torch.uint8, device="cuda")
    aligned, shifted = (memory[at : at + rows * 132].view(rows, 132) for at in (0, 4))
    all_gather_kv([aligned], metadata, group)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        said = error_of(all_gather_kv, [shifted], metadata, group)
        memory.add_(1)  # an empty graph is a warning
    assert "run it once" in said
    with use_symmetric_memory(group):
        cache = torch.empty(total, 132, dtype=torch.uint8, device="cuda")
    numbers = torch.arange(-1, total, device="cuda")
    slots = numbers[1:]
    all_gather_kv([aligned], metadata, group, into=[cache], slots=slots.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # slots are at an odd word, and the kernel is the same
        all_gather_kv([aligned], metadata, group, into=[cache], slots=slots)
    graph.replay()
    torch.cuda.synchronize()
    gather_works(group)
