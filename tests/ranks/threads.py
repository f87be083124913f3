"""Two threads of a rank, forked children and torch.compile: the right rows, or an error at once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from threading import Barrier

import torch
import torch.distributed as dist

from cpkit import provenance
from cpkit.gather import ALGORITHMS, all_gather_kv, cp_all_gather_rerange_kv_cache
from cpkit.group import (
    CPGroup,
    batch_symmetry,
    forget_groups,
    get_attention_cp_group,
    init_context_parallel,
    is_allocation_symmetric,
    use_group,
)
from cpkit.plan import plan_gather_kv
from cpkit.symm import put_signal, symmetric_pool, use_symmetric_memory
from tests.ranks.device import DEVICE, batch_of, finish, pool_of, shard_rows, world_group
from tests.ranks.errors import raised

ROUNDS = 50


def in_thread(call: Callable[[], object]) -> object:
    """Return what a call returns or raises in another thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="other") as threads:
        return threads.submit(call).result()


def refused(call: Callable[[], object]) -> str:
    return raised(RuntimeError, call)


def own_stream() -> AbstractContextManager[object]:
    return torch.cuda.stream(torch.cuda.Stream()) if DEVICE == "cuda" else nullcontext()


def check_threads_with_a_group_each_gather_at_once() -> None:
    """Both micro-batches are alike, and their calls alternate differently on every rank."""
    _, metadata, _ = batch_of(4097, 333)
    groups = [init_context_parallel(dist.get_world_size(), name) for name in ("first", "second")]
    both = Barrier(2)

    def gather(group: CPGroup, number: int, round: int) -> None:
        rows = shard_rows(metadata, group.rank, (8,), torch.float32, round=round)
        algorithm = ALGORITHMS[number % len(ALGORITHMS)]
        whole = all_gather_kv([rows], metadata, group, algorithm=algorithm)[0]
        provenance.check(whole, metadata, round=round)

    def gather_often(group: CPGroup, batch: int) -> None:
        with use_group(group), own_stream():
            both.wait(60)
            for number in range(ROUNDS):
                gather(group, number, 2 * number + batch)
            assert get_attention_cp_group() is group

    for group in groups:  # once before: loading a kernel waits for all other work of the GPU
        for number in range(len(ALGORITHMS)):
            gather(group, number, 0)

    with ThreadPoolExecutor(2) as threads:
        for done in [
            threads.submit(gather_often, group, batch) for batch, group in enumerate(groups)
        ]:
            done.result()
    finish()


def check_a_second_thread_is_refused_at_once() -> None:
    group, metadata, rows = batch_of(40)
    plan = plan_gather_kv([rows], metadata, group)
    calls: list[Callable[[], object]] = [
        lambda: all_gather_kv([rows], metadata, group),
        plan,
        lambda: plan_gather_kv([rows], metadata, group),
        lambda: pool_of(group).empty((8,), torch.float32),
        lambda: symmetric_pool(group, DEVICE).warm_up(100, (8,), torch.float32),
        lambda: group.cp_all_gather_into_tensor_async(rows.repeat(group.size, 1), rows),
        group.barrier,
        lambda: group.exchange(b""),
        lambda: init_context_parallel(group.size),
        lambda: put_signal(group, group.rank),
        forget_groups,
    ]
    for call in calls:
        said = str(in_thread(lambda call=call: refused(call)))
        assert "belongs to thread 'MainThread', and was used in thread 'other_0'" in said, said
    provenance.check(plan()[0], metadata, round=1)
    provenance.check(all_gather_kv([rows], metadata, group)[0], metadata, round=1)


def check_a_group_changes_threads_and_returns() -> None:
    group, metadata, rows = batch_of(40)

    def gather() -> torch.Tensor:
        with use_group(group):
            return all_gather_kv([rows], metadata, get_attention_cp_group())[0]

    whole = in_thread(gather)
    assert isinstance(whole, torch.Tensor)
    provenance.check(whole, metadata, round=1)
    with use_group(group), use_group(group):  # in its own thread too
        group.barrier()
        said = str(in_thread(lambda: refused(gather)))
        assert "belongs to thread 'MainThread'" in said, said
    group.barrier()


def check_current_group_and_symmetry_belong_to_a_thread() -> None:
    world_group()
    assert "has no context-parallel group" in str(
        in_thread(lambda: refused(get_attention_cp_group))
    )
    with batch_symmetry(False):
        assert in_thread(is_allocation_symmetric) is True


def check_tasks_of_one_thread_have_their_own_current_groups() -> None:
    groups = [init_context_parallel(dist.get_world_size(), name) for name in ("first", "second")]

    async def current(group: CPGroup) -> CPGroup:
        with use_group(group):
            await asyncio.sleep(0)  # the other task enters its block
            return get_attention_cp_group()

    async def both() -> list[CPGroup]:
        return await asyncio.gather(*map(current, groups))

    assert asyncio.run(both()) == groups


def check_a_forked_child_is_refused_and_its_parent_gathers() -> None:
    """The peers would take the child's rows for those of its parent."""
    group, metadata, rows = batch_of(40)
    plan = plan_gather_kv([rows], metadata, group)

    def use() -> None:
        with use_group(group):
            pass

    gather = lambda: all_gather_kv([rows], metadata, group)  # noqa: E731
    calls = (gather, plan, group.barrier, world_group, use, forget_groups)
    child = os.fork()
    if child == 0:
        wrong = 1
        try:
            wrong = sum("was forked" not in refused(call) for call in calls)
        finally:
            os._exit(wrong)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    provenance.check(plan()[0], metadata, round=1)


def check_the_compiler_calls_a_gather_as_it_is() -> None:
    group, metadata, rows = batch_of(64, 33)
    kept = rows.clone()
    plan = plan_gather_kv([kept], metadata, group)
    total_len = group.size * metadata.max_rank_len[0]

    class Batch:
        attn_cp_metadata = metadata

    def gather(x: torch.Tensor) -> torch.Tensor:
        return all_gather_kv([x * 2], metadata, group)[0] / 2

    def planned(x: torch.Tensor) -> torch.Tensor:
        kept.copy_(x * 2)
        return plan()[0] / 2

    def like_sglang(x: torch.Tensor) -> torch.Tensor:
        gathered = cp_all_gather_rerange_kv_cache(x * 2, total_len, group.size, Batch())
        with use_symmetric_memory(group):
            whole = torch.empty_like(gathered)
        assert pool_of(group).locate(whole)
        return whole.copy_(gathered) / 2

    for function in (gather, planned, like_sglang):
        torch.compiler.reset()
        compiled = torch.compile(function, backend="eager")
        for _ in range(2):
            provenance.check(compiled(rows), metadata, round=1)
    torch.compiler.reset()
    whole_graph = torch.compile(gather, backend="eager", fullgraph=True)
    assert "cpkit.gather.all_gather_kv runs eagerly" in raised(Exception, whole_graph, rows)
