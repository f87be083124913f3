"""Plans: right in every call, read in place, and safe without an entry barrier."""

from __future__ import annotations

import time
from typing import Any

import torch

from cpkit import provenance, stages
from cpkit.gather import ALGORITHMS, last_path
from cpkit.group import CPGroup
from cpkit.layout import STRATEGIES, ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.memory.pool import SymmetricPool
from cpkit.plan import GatherPlan, plan_gather_kv
from tests.ranks.device import DEVICE, pool_of, shard_rows, world_group
from tests.ranks.errors import error_of
from tests.ranks.mutants import planted


def stamp(rows: torch.Tensor, metadata: ContextParallelMetadata, rank: int, round: int) -> None:
    """Fill the memory that a plan reads with the rows of another round."""
    rows.copy_(shard_rows(metadata, rank, tuple(rows.shape[1:]), rows.dtype, round=round))


def everybody_and_rows(
    strategy: str = "zigzag",
) -> tuple[CPGroup, ContextParallelMetadata, torch.Tensor]:
    group = world_group()
    metadata = prepare_context_parallel_metadata([97, 64], group.size, strategy)
    rows = shard_rows(metadata, group.rank, (16,), torch.float32, round=0)
    return group, metadata, rows


def check_every_algorithm_and_strategy_is_bit_exact_in_every_call() -> None:
    for strategy in STRATEGIES:
        for algorithm in ALGORITHMS:
            group, metadata, rows = everybody_and_rows(strategy)
            pool_of(group).poison_free()
            group.barrier()
            gather = plan_gather_kv([rows], metadata, group, algorithm=algorithm)
            for round in range(1, 8):
                stamp(rows, metadata, group.rank, round)
                provenance.check(gather()[0], metadata, round=round)


def check_several_tensors_of_several_kinds() -> None:
    group, metadata, _ = everybody_and_rows()
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
    """3 MiB a rank and more: several tiles, the last one shorter."""
    group = world_group()
    for strategy in STRATEGIES:
        metadata = prepare_context_parallel_metadata([700 * group.size + 1], group.size, strategy)
        rows = shard_rows(metadata, group.rank, (2, 1031), torch.bfloat16, round=5)
        provenance.check(plan_gather_kv([rows], metadata, group)()[0], metadata, round=5)


def wrong_rows(keep: int) -> list[str]:
    """What each rank's check says, when it looks at a result late and its peers run ahead.

    The last rank reads slowly: the others are in their next call, as far as they get, meanwhile.
    """
    group, metadata, rows = everybody_and_rows()
    gather = plan_gather_kv([rows], metadata, group, keep=keep)
    said = ""
    for round in range(1, 6):
        stamp(rows, metadata, group.rank, round)
        (got,) = gather()
        if group.rank == group.size - 1:
            time.sleep(0.02)
        said = said or provenance.explain_mismatch(got, metadata, round=round) or ""
    return [note.decode() for note in group.exchange(said[:500].encode())]


def check_a_result_is_whole_until_the_next_call() -> None:
    assert not any(wrong_rows(keep=1))


def check_one_output_without_an_entry_barrier_is_seen() -> None:
    """The planted bug: all calls of a plan share one output."""

    def shared(real: Any, pool: Any, rows: Any, output_sets: list[Any], metadata: Any) -> Any:
        output_sets[:] = output_sets[:1] * len(output_sets)
        return real(pool, rows, output_sets, metadata)

    with planted(SymmetricPool, "prepare", shared):
        said = wrong_rows(keep=1)
    assert any("wanted round" in each for each in said), said


def check_keep_makes_results_last_longer() -> None:
    group, metadata, rows = everybody_and_rows()
    gather = plan_gather_kv([rows], metadata, group, keep=3)
    results: list[torch.Tensor] = []
    for round in range(1, 10):
        stamp(rows, metadata, group.rank, round)
        results.append(gather()[0])
        for late in range(3):
            if round > late:
                provenance.check(results[-1 - late], metadata, round=round - late)


def check_bad_arguments_are_refused_on_every_rank() -> None:
    group, metadata, rows = everybody_and_rows()
    strided = torch.empty(*rows.shape, 2, device=DEVICE)[..., 0]
    mine = strided if group.rank == 0 else rows
    for tensors, keep, words in (
        ([mine], 1, "strided"),
        ([rows], 0, "keep is 0"),
        ([rows], True, "keep is True"),
        ([rows], 1 + (group.rank == 0), "different collectives"),
        ([rows[1:]], 1, "per_rank_actual_token"),
    ):
        try:
            plan_gather_kv(tensors, metadata, group, keep=keep)
        except ValueError as error:
            assert words in str(error), error  # noqa: PT017
        else:
            raise AssertionError(f"accepted: {words}")


def check_it_says_its_path_and_its_stages() -> None:
    group, metadata, rows = everybody_and_rows()
    gather = plan_gather_kv([rows], metadata, group)
    with stages.record() as recorder:
        gather()
    assert list(recorder.total_us()) == ["wire", "exit"]
    report = last_path(group)
    assert report is not None
    assert report.path == "symmetric"
    assert isinstance(gather, GatherPlan)


def check_outputs_return_to_the_pool_with_the_plan() -> None:
    group, metadata, rows = everybody_and_rows()
    pool = pool_of(group)
    for _ in range(3):
        plan_gather_kv([rows], metadata, group)()
        pool.free_dropped("settle")
    assert pool.stats().used_bytes == 0


def check_memory_that_has_moved_is_refused() -> None:
    """The prepared copies use addresses; tests.ranks.crossed moves the memory of one rank."""
    group, metadata, rows = everybody_and_rows()
    gather = plan_gather_kv([rows], metadata, group)
    gather()
    rows.data = rows.clone()
    said = error_of(gather)
    assert "the memory of tensors[0] has moved" in said, said
    assert "make a new plan" in said, said


def check_views_in_place_of_a_result_end_with_it() -> None:
    group, metadata, rows = everybody_and_rows()
    gather = plan_gather_kv([rows], metadata, group)
    for _ in range(4):
        (whole,) = gather()
        provenance.check(whole, metadata, round=0)
        whole.t_()
        whole.unsqueeze_(0)


def check_a_plan_outlives_the_pool_that_it_was_made_in() -> None:
    """Its copies write through that pool's maps."""
    group, metadata, rows = everybody_and_rows()
    gather = plan_gather_kv([rows], metadata, group)
    pool_of(group).configure(1 << 20)
    for round in range(1, 4):
        stamp(rows, metadata, group.rank, round)
        provenance.check(gather()[0], metadata, round=round)
        group.barrier()
