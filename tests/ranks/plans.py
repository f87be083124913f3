"""Plans: every call is bit-exact, reads its rows in place, and is safe without an entry barrier."""

from __future__ import annotations

import time
from typing import Any

import torch

from cpkit import provenance, stages
from cpkit.gather import ALGORITHMS, last_path
from cpkit.layout import STRATEGIES, ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.plan import GatherPlan, plan_gather_kv
from tests.ranks.device import DEVICE, batch_of, pool_of, shard_rows, world_group
from tests.ranks.errors import error_of
from tests.ranks.mutants import planted


def stamp(rows: torch.Tensor, metadata: ContextParallelMetadata, rank: int, round: int) -> None:
    """Fill the memory that a plan reads with the rows of a round."""
    rows.copy_(shard_rows(metadata, rank, tuple(rows.shape[1:]), rows.dtype, round=round))


def check_every_algorithm_and_strategy_is_bit_exact_in_every_call() -> None:
    for strategy in STRATEGIES:
        for algorithm in ALGORITHMS:
            group, metadata, rows = batch_of(97, 64, strategy=strategy)
            pool_of(group).poison_free()
            group.barrier()
            gather = plan_gather_kv([rows], metadata, group, algorithm=algorithm)
            for round in range(1, 8):
                stamp(rows, metadata, group.rank, round)
                provenance.check(gather()[0], metadata, round=round)


def check_several_tensors_of_several_kinds() -> None:
    group, metadata, _ = batch_of(97, 64)
    kinds = ((torch.bfloat16, (8, 16)), (torch.float8_e4m3fn, (5,)), (torch.bool, (3, 2)))
    rows = [
        shard_rows(metadata, group.rank, shape, dtype, round=3, tensor=number)
        for number, (dtype, shape) in enumerate(kinds)
    ]
    rows.append(torch.empty(rows[0].shape[0], 0, device=DEVICE))
    *got, nothing = plan_gather_kv(rows, metadata, group)()
    for number, tensor in enumerate(got):
        provenance.check(tensor, metadata, round=3, tensor=number)
    assert nothing.shape == (metadata.total_tokens, 0)


def check_a_large_shard_is_cut_into_tiles() -> None:
    """A shard of 3 MiB or more has several tiles; the last one is shorter."""
    group = world_group()
    for strategy in STRATEGIES:
        metadata = prepare_context_parallel_metadata([700 * group.size + 1], group.size, strategy)
        rows = shard_rows(metadata, group.rank, (2, 1031), torch.bfloat16, round=5)
        provenance.check(plan_gather_kv([rows], metadata, group)()[0], metadata, round=5)


def wrong_rows(keep: int) -> list[str]:
    """Return each rank's mismatch, or "", while the last rank reads its results late.

    During that time its peers proceed with their next call as far as they can.
    """
    group, metadata, rows = batch_of(97, 64)
    gather = plan_gather_kv([rows], metadata, group, keep=keep)
    said = ""
    for round in range(1, 6):
        stamp(rows, metadata, group.rank, round)
        (got,) = gather()
        if group.rank == group.size - 1:
            time.sleep(0.02)
        said = said or provenance.explain_mismatch(got, metadata, round=round) or ""
    return [note.decode() for note in group.exchange(said[:500].encode())]


def check_a_result_stays_valid_until_the_next_call() -> None:
    assert not any(wrong_rows(keep=1))


def check_one_output_without_an_entry_barrier_is_detected() -> None:
    """Negative control: all calls of a plan share one output."""

    def shared(real: Any, backend: Any, pool: Any, rows: Any, sets: list[Any], *layout: Any) -> Any:
        sets[:] = sets[:1] * len(sets)
        return real(backend, pool, rows, sets, *layout)

    backend = pool_of(world_group()).backend
    with planted(type(backend), "prepare", shared):
        said = wrong_rows(keep=1)
    assert any("expected round" in each for each in said), said


def check_keep_extends_the_life_of_results() -> None:
    group, metadata, rows = batch_of(97, 64)
    gather = plan_gather_kv([rows], metadata, group, keep=3)
    results: list[torch.Tensor] = []
    for round in range(1, 10):
        stamp(rows, metadata, group.rank, round)
        results.append(gather()[0])
        for late in range(3):
            if round > late:
                provenance.check(results[-1 - late], metadata, round=round - late)


def check_bad_arguments_are_refused_on_every_rank() -> None:
    group, metadata, rows = batch_of(97, 64)
    strided = torch.empty(*rows.shape, 2, device=DEVICE)[..., 0]
    mine = strided if group.rank == 0 else rows
    for tensors, keep, words in (
        ([mine], 1, "strided"),
        ([rows], 0, "keep is 0"),
        ([rows], True, "keep is True"),
        ([rows], 1 + (group.rank == 0), "different collectives"),
        ([rows[1:]], 1, "per_rank_actual_token"),
    ):
        assert words in error_of(plan_gather_kv, tensors, metadata, group, keep=keep), words


def check_it_reports_its_path_and_its_stages() -> None:
    group, metadata, rows = batch_of(97, 64)
    gather = plan_gather_kv([rows], metadata, group)
    with stages.record() as recorder:
        gather()
    assert list(recorder.total_us()) == ["wire", "exit"]
    assert last_path(group).path == "symmetric"
    assert isinstance(gather, GatherPlan)


def check_outputs_return_to_the_pool_with_the_plan() -> None:
    group, metadata, rows = batch_of(97, 64)
    pool = pool_of(group)
    for _ in range(3):
        plan_gather_kv([rows], metadata, group)()
        pool.free_dropped("settle")
    assert pool.stats().used_bytes == 0


def check_memory_that_has_moved_is_refused() -> None:
    """The prepared copies use addresses; tests.ranks.crossed moves the memory of one rank."""
    group, metadata, rows = batch_of(97, 64)
    gather = plan_gather_kv([rows], metadata, group)
    gather()
    rows.data = rows.clone()
    said = error_of(gather)
    assert "the memory of tensors[0] has moved" in said, said
    assert "make a new plan" in said, said


def check_rows_that_require_grad_later_are_refused() -> None:
    """An in-place operation gives the plan's tensor a gradient, which the gather would drop."""
    group, metadata, rows = batch_of(97, 64)
    gather = plan_gather_kv([rows], metadata, group)
    with torch.no_grad():
        rows.copy_(rows.clone().requires_grad_())
        provenance.check(gather()[0], metadata, round=1)
    rows.copy_(rows.clone().requires_grad_())
    said = error_of(gather)
    assert "tensors[0] requires grad" in said, said
    with torch.no_grad():
        provenance.check(gather()[0], metadata, round=1)


def check_views_in_place_of_a_result_end_with_it() -> None:
    group, metadata, rows = batch_of(97, 64)
    gather = plan_gather_kv([rows], metadata, group)
    for _ in range(4):
        (whole,) = gather()
        provenance.check(whole, metadata, round=1)
        whole.t_()
        whole.unsqueeze_(0)


def check_a_plan_outlives_the_pool_that_it_was_made_in() -> None:
    """Its copies write through the mappings of that pool."""
    group, metadata, rows = batch_of(97, 64)
    gather = plan_gather_kv([rows], metadata, group)
    pool_of(group).configure(1 << 20)
    for round in range(1, 4):
        stamp(rows, metadata, group.rank, round)
        provenance.check(gather()[0], metadata, round=round)
        group.barrier()
