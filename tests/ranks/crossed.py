"""Ranks that are in different calls, or left one half-way: every rank hears of it, in words."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from cpkit import provenance
from cpkit.gather import all_gather_kv
from cpkit.group import CPGroup, init_context_parallel
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata, shard
from cpkit.memory.pool import SymmetricPool
from cpkit.plan import GatherPlan, plan_gather_kv
from cpkit.sync.barrier import CallsDiffer
from tests.ranks.errors import error_of
from tests.ranks.mutants import planted


def everybody_and_rows() -> tuple[CPGroup, ContextParallelMetadata, torch.Tensor]:
    group = init_context_parallel(dist.get_world_size())
    metadata = prepare_context_parallel_metadata([97], group.size)
    rows = provenance.shard_rows(metadata, group.rank, (16,), torch.float32, round=1)
    return group, metadata, rows


def expect(call: Callable[[], object], *words: str) -> None:
    """The call raises CallsDiffer with these words, on this rank."""
    try:
        call()
    except CallsDiffer as error:
        assert all(each in str(error) for each in words), error  # noqa: PT017
    else:
        raise AssertionError(f"nobody said {words}")


def interrupted(call: Callable[[], object]) -> None:
    """Leave a call before its rows are stored, as ■ Interrupt does."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with planted(SymmetricPool, "push", interrupt):
        try:
            call()
        except KeyboardInterrupt:
            return
    raise AssertionError("the call was not interrupted")


def check_two_plans_in_another_order() -> None:
    group, metadata, rows = everybody_and_rows()
    one, other = (plan_gather_kv([rows], metadata, group) for _ in range(2))
    first, second = (one, other) if group.rank == 0 else (other, one)
    expect(first, "rank 0 at the end of a plan's call", "rank 1 at the end of a plan's call")
    expect(second, "incomplete")


def check_a_plan_and_a_gather() -> None:
    """Out of step for one call only: the next ones are right again."""
    group, metadata, rows = everybody_and_rows()
    plan = plan_gather_kv([rows], metadata, group)
    gather = lambda: all_gather_kv([rows], metadata, group)  # noqa: E731
    expect(
        plan if group.rank == 0 else gather, "rank 0 at the end of a plan's", "1 at the agreement"
    )
    provenance.check(gather()[0], metadata, round=1)


def check_a_barrier_and_a_gather() -> None:
    group, metadata, rows = everybody_and_rows()
    gather = lambda: all_gather_kv([rows], metadata, group)  # noqa: E731
    expect(group.barrier if group.rank == 0 else gather, "rank 0 at the end of a gather")


def check_an_interrupted_gather_ends_nobody_elses() -> None:
    """Rank 0's next call meets the end of its peers' first: their rows from it are missing."""
    group, metadata, rows = everybody_and_rows()
    gather = lambda: all_gather_kv([rows], metadata, group)  # noqa: E731
    gather()
    if group.rank == 0:
        interrupted(gather)
    expect(gather, "rank 0 at the agreement", "rank 1 at the end of a gather")
    provenance.check(gather()[0], metadata, round=1)


def check_an_interrupted_call_of_a_plan_ends_nobody_elses() -> None:
    """Rank 0 is one output ahead of its peers from then on."""
    group = init_context_parallel(dist.get_world_size())
    metadata = prepare_context_parallel_metadata([97], group.size)
    rows = provenance.shard_rows(metadata, group.rank, (16,), torch.float32, round=1)
    plan = plan_gather_kv([rows], metadata, group)
    if group.rank == 0:
        assert plan._pushes
        next(plan._pushes)
    expect(plan, "output 1), rank 1 at", "output 0)")


def check_memory_that_moved_on_one_rank_is_everybodys_error() -> None:
    """Of a tensor, or of a result: then the other output still works."""

    def renew(x: torch.Tensor) -> None:
        x.data = x.clone()

    def grow(x: torch.Tensor) -> None:
        x.resize_(2 * len(x), *x.shape[1:])

    def expect_refusal(gather: GatherPlan, name: str) -> None:
        if group.rank == 0:
            assert f"the memory of {name} has moved" in error_of(gather)
        else:
            expect(gather, "rank 0 at a plan's call whose memory has moved")

    for move in (renew, grow, torch.Tensor.share_memory_, torch.Tensor.t_):
        group, metadata, rows = everybody_and_rows()
        gather = plan_gather_kv([rows], metadata, group)
        gather()
        if group.rank == 0:
            move(rows)
        expect_refusal(gather, "tensors[0]")
    group, metadata, rows = everybody_and_rows()
    gather = plan_gather_kv([rows], metadata, group)
    (whole,) = gather()
    if group.rank == 0:
        whole.share_memory_()  # as a multiprocessing queue does
    provenance.check(gather()[0], metadata, round=1)
    expect_refusal(gather, "a result of tensors[0]")
    provenance.check(gather()[0], metadata, round=1)


def check_a_plan_made_under_inference_mode_is_called_outside() -> None:
    group = init_context_parallel(dist.get_world_size())
    for strategy in ("zigzag", "interleave"):
        metadata = prepare_context_parallel_metadata([97], group.size, strategy)
        whole = torch.arange(97.0)[:, None].expand(-1, 3)
        with torch.inference_mode():
            plan = plan_gather_kv([shard(whole, metadata, group.rank)], metadata, group)
        for _ in range(3):
            assert torch.equal(plan()[0], whole)
