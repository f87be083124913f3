"""Ranks that make different calls, or fail or are interrupted in one: all ranks raise."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cpkit import gather, provenance, repeat
from cpkit.gather import all_gather_kv, cp_all_gather_rerange_kv_cache
from cpkit.group import CPGroup, forget_groups
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata, shard
from cpkit.memory import posix
from cpkit.memory.pool import SymmetricPool
from cpkit.memory.posix import PosixBackend
from cpkit.plan import GatherPlan, plan_gather_kv
from cpkit.settings import deadline_s
from cpkit.symm import use_symmetric_memory
from cpkit.sync.barrier import CallsDiffer, RankFailed
from tests.ranks.device import batch_of, pool_of, world_group
from tests.ranks.errors import error_of, raised
from tests.ranks.mutants import planted


def expect(call: Callable[[], object], *words: str) -> None:
    """Check that the call raises CallsDiffer with these words on this rank."""
    message = raised(CallsDiffer, call)
    assert all(each in message for each in words), message


def interrupt(owner: object, name: str, call: Callable[[], object]) -> None:
    """Interrupt a call in a function, as ■ Interrupt does."""

    def raise_interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with planted(owner, name, raise_interrupt):
        raised(KeyboardInterrupt, call)


def check_two_plans_called_in_different_orders() -> None:
    group, metadata, rows = batch_of(97)
    one, other = (plan_gather_kv([rows], metadata, group) for _ in range(2))
    first, second = (one, other) if group.rank == 0 else (other, one)
    expect(first, "rank 0 at the end of a plan's call", "rank 1 at the end of a plan's call")
    expect(second, "incomplete")


def check_a_plan_and_a_gather() -> None:
    """Only one call fails; the next gather is right."""
    group, metadata, rows = batch_of(97)
    plan = plan_gather_kv([rows], metadata, group)
    gather = lambda: all_gather_kv([rows], metadata, group)  # noqa: E731
    expect(
        plan if group.rank == 0 else gather, "rank 0 at the end of a plan's", "1 at the agreement"
    )
    provenance.check(gather()[0], metadata, round=1)


def check_a_barrier_and_a_gather() -> None:
    group, metadata, rows = batch_of(97)
    gather = lambda: all_gather_kv([rows], metadata, group)  # noqa: E731
    expect(group.barrier if group.rank == 0 else gather, "rank 0 at the end of a gather")


def check_after_an_interrupted_gather_all_ranks_raise_once() -> None:
    """Rank 0 starts its next call while its peers still wait at the end of the first one."""
    forget_groups()
    group, metadata, rows = batch_of(97)
    gather = lambda: all_gather_kv([rows], metadata, group)  # noqa: E731
    pool = pool_of(group)
    for is_repeated in (False, True):
        repeated = list(pool.repeated.values())
        assert bool(repeated) == is_repeated
        if group.rank == 0:
            owner, name = (repeated[0]._repeat, "_push") if is_repeated else (SymmetricPool, "push")
            interrupt(owner, name, gather)
        expect(gather, "rank 0 at the agreement", "rank 1 at the end of a gather")
        provenance.check(gather()[0], metadata, round=1)


def check_after_an_interrupted_call_of_a_plan_all_ranks_raise() -> None:
    """Rank 0 has advanced to the next output; its peers have not."""
    group, metadata, rows = batch_of(97)
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
            expect(gather, "rank 0 at a plan's call that a check refused")

    for move in (renew, grow, torch.Tensor.share_memory_):
        group, metadata, rows = batch_of(97, 64)
        gather = plan_gather_kv([rows], metadata, group)
        gather()
        if group.rank == 0:
            move(rows)
        expect_refusal(gather, "tensors[0]")
    group, metadata, rows = batch_of(97, 64)
    gather = plan_gather_kv([rows], metadata, group)
    (whole,) = gather()
    if group.rank == 0:
        whole.share_memory_()  # as a multiprocessing queue does
    provenance.check(gather()[0], metadata, round=1)
    expect_refusal(gather, "the result of tensors[0]")
    provenance.check(gather()[0], metadata, round=1)


def check_a_plan_made_in_inference_mode_works_outside_it() -> None:
    group = world_group()
    for strategy in ("zigzag", "interleave"):
        metadata = prepare_context_parallel_metadata([97], group.size, strategy)
        whole = torch.arange(97.0)[:, None].expand(-1, 3)
        with torch.inference_mode():
            plan = plan_gather_kv([shard(whole, metadata, group.rank)], metadata, group)
        for _ in range(3):
            assert torch.equal(plan()[0], whole)
        weight = torch.ones(3, requires_grad=True)
        (plan()[0] * weight).sum().backward()  # which saves the result
        assert torch.equal(weight.grad, whole.sum(0))


# ----------------------------------------------------------- a rank that fails in a gather

WORDS = "can't allocate memory (planted)"


Call = Callable[[CPGroup, ContextParallelMetadata, torch.Tensor], object]


def fails(
    kind: type[Exception],
    owner: object,
    name: str,
    call: Call,
    tokens: int = 97,
    *,
    again: bool = False,
    **shape: Any,
) -> None:
    """Check that the last rank's failure in a function reaches every rank, as `kind` on its peers.

    It fails in the first call of a new group, or in the second one with `again`. The ranks are in
    step afterwards: they make new groups, whose gathers are right.
    """

    def refuse(*_: object, **__: object) -> None:
        raise MemoryError(WORDS)

    forget_groups()
    group, metadata, rows = batch_of(tokens, **shape)
    pool_of(group)
    if again:
        call(group, metadata, rows)
    is_victim = group.rank == group.size - 1
    began = time.monotonic()
    with planted(owner, name, refuse) if is_victim else nullcontext():
        said = raised(MemoryError if is_victim else kind, lambda: call(group, metadata, rows))
    assert WORDS in said, said
    assert is_victim or f"rank {group.size - 1}" in said or f"rank(s) {group.size - 1}" in said
    assert time.monotonic() - began < deadline_s() / 2
    forget_groups()
    group, metadata, rows = batch_of(97)
    (got,) = all_gather_kv([rows], metadata, group)
    provenance.check(got, metadata, round=1)


def gather_by(algorithm: str) -> Call:
    return lambda group, metadata, rows: all_gather_kv([rows], metadata, group, algorithm=algorithm)


def check_a_failure_before_the_exit_barrier_reaches_every_rank() -> None:
    for algorithm, owner, name in (
        ("direct", gather, "as_dense"),
        ("direct", SymmetricPool, "empty"),
        ("direct", PosixBackend, "_copies"),
        ("padded_symm_recv", gather, "pad_rows"),
        ("padded_symm_recv", SymmetricPool, "empty"),
        ("padded_symm", SymmetricPool, "push_shard"),
    ):
        fails(RankFailed, owner, name, gather_by(algorithm))
    for owner, name in ((repeat, "as_dense"), (SymmetricPool, "take"), (posix.ctypes, "memmove")):
        fails(RankFailed, owner, name, gather_by("direct"), again=True)
    fails(RankFailed, SymmetricPool, "push_shard", gather_by("padded_symm"), again=True)


def check_a_failure_in_sglangs_functions_and_in_plans_reaches_every_rank() -> None:
    def like_sglang(
        group: CPGroup, metadata: ContextParallelMetadata, rows: torch.Tensor
    ) -> torch.Tensor:
        batch = SimpleNamespace(attn_cp_metadata=metadata)
        total_len = metadata.max_rank_len[0] * group.size
        return cp_all_gather_rerange_kv_cache(rows, total_len, group.size, batch)

    def into_tensor(group: CPGroup, *_: object) -> None:
        with use_symmetric_memory(group):
            recv = torch.empty(2 * group.size)
        group.cp_all_gather_into_tensor_async(recv, torch.ones(2))

    def make_plan(
        group: CPGroup, metadata: ContextParallelMetadata, rows: torch.Tensor
    ) -> GatherPlan:
        return plan_gather_kv([rows], metadata, group)

    fails(RankFailed, gather, "pad_rows", like_sglang)
    fails(RankFailed, SymmetricPool, "push_shard", into_tensor)
    fails(RankFailed, PosixBackend, "prepare", make_plan)
    fails(RankFailed, posix, "stage", lambda *batch: make_plan(*batch)())


def check_a_failure_before_the_collective_of_a_large_batch_reaches_every_rank() -> None:
    for name in ("pad_rows", "as_rows"):
        fails(ValueError, gather, name, gather_by("padded"), tokens=1024, trailing=(4096,))


# ----------------------------------------------------------------------- repeated calls


def check_a_repeated_call_takes_every_step_where_it_has_to() -> None:
    """Inside a dispatch mode, whose copies have no memory, and inside a trace."""
    group, metadata, rows = batch_of(97, 64)
    wide = rows.repeat_interleave(2, dim=-1)
    call = lambda: all_gather_kv([wide[..., ::2]], metadata, group)  # noqa: E731
    call()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert "without memory" in error_of(call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a trace
        plus_0 = lambda x: all_gather_kv([x], metadata, group)[0] + 0  # noqa: E731
        torch.jit.trace(plus_0, (rows,), check_trace=False)
    for _ in range(3):
        provenance.check(call()[0], metadata, round=1)


def check_a_call_that_cannot_be_looked_up_is_everybodys_error() -> None:
    group, metadata, rows = batch_of(97)
    all_gather_kv([rows], metadata, group)
    if group.rank == 0:
        metadata = copy.copy(metadata)
        object.__setattr__(metadata, "lengths", [97])  # unhashable
    raised(TypeError if group.rank == 0 else ValueError, all_gather_kv, [rows], metadata, group)


def check_an_algorithm_that_is_replaced_is_repeated_as_itself() -> None:
    """Under the name `padded` too, whose own failures are not reported."""
    forget_groups()
    group, metadata, rows = batch_of(97)
    known, is_broken = (gather._GATHERS["padded"], gather.TABLE["padded"]), False

    def mine(*arguments: Any) -> Any:
        if is_broken and group.rank == 0:
            raise MemoryError(WORDS)
        return gather.padded_symm_recv(*arguments)

    call = partial(all_gather_kv, [rows], metadata, group, algorithm="padded")
    call()
    try:
        gather.add_gather("padded", mine)
        for _ in range(3):
            provenance.check(call()[0], metadata, round=1)
        (repeated,) = pool_of(group).repeated.values()
        assert repeated.gather is mine
        is_broken = True
        assert WORDS in raised(MemoryError if group.rank == 0 else RankFailed, call)
    finally:
        gather._GATHERS["padded"], gather.TABLE["padded"] = known
    forget_groups()
