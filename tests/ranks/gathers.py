"""Gathers, bit for bit: level 4 of the ladder (provenance, poison, rounds, random batches)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.distributed as dist

from cpkit import provenance, stages, steps
from cpkit.gather import (
    ALGORITHMS,
    all_gather_kv,
    cp_all_gather_reorganized_into_tensor_kv_cache,
    cp_all_gather_rerange_kv_cache,
    last_path,
    path_of_result,
)
from cpkit.group import CPGroup, init_context_parallel
from cpkit.layout import STRATEGIES, ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.reference import all_gather_kv_reference
from cpkit.symm import batch_symmetry, use_symmetric_memory
from tests.ranks.device import DEVICE, finish, pool_of, shard_rows
from tests.ranks.errors import error_of

DTYPES = (
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.bool,
    torch.int8,
    torch.complex64,
    torch.float8_e4m3fn,
)
TRAILING = ((8, 16), (1, 5), (3,), (), (24,))


def cp_sizes() -> list[int]:
    world = dist.get_world_size()
    if DEVICE == "cuda":  # every size is compiled for; 2, 4 and 8 come from three launches
        return [world]
    return [n for n in range(1, world + 1) if world % n == 0]


def batches(
    seed: str, count: int
) -> Iterator[tuple[CPGroup, ContextParallelMetadata, random.Random]]:
    """Random ragged batches of every cp_size and strategy, the same on all ranks."""
    for cp_size in cp_sizes():
        group = init_context_parallel(cp_size)
        for strategy in STRATEGIES:
            rng = random.Random(f"{seed} {cp_size} {strategy}")
            for _ in range(count):
                shortest = 2 * cp_size if strategy == "zigzag" else 1
                lengths = [rng.randint(shortest, shortest + 60) for _ in range(rng.randint(1, 5))]
                metadata = prepare_context_parallel_metadata(lengths, cp_size, strategy)
                yield group, metadata, rng


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a wider tensor."""
    wide = x.new_empty(*x.shape, 2)
    wide[..., 0] = x
    return wide[..., 0]


def poison(group: CPGroup) -> None:
    """All memory that a result could land in: the pool, and torch's own uninitialised memory."""
    pool_of(group).poison_free()
    finish()
    group.barrier()


def check_every_algorithm_is_bit_exact() -> None:
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with a known pattern
    for round, (group, metadata, rng) in enumerate(batches("algorithms", 2)):
        kinds = [(rng.choice(DTYPES), rng.choice(TRAILING)) for _ in range(rng.randint(1, 3))]
        for algorithm in ALGORITHMS:
            shards = [
                shard_rows(metadata, group.rank, shape, dtype, round=round, tensor=i)
                for i, (dtype, shape) in enumerate(kinds)
            ]
            if rng.random() < 0.5:
                shards[0] = strided(shards[0])
            poison(group)
            for i, got in enumerate(all_gather_kv(shards, metadata, group, algorithm=algorithm)):
                provenance.check(got, metadata, round=round, tensor=i)
            del got
    torch.use_deterministic_algorithms(False)


def check_many_rounds_back_to_back() -> None:
    """Without a pause between rounds: a missing barrier shows as a stale or torn row."""
    group = init_context_parallel(dist.get_world_size())
    metadata = prepare_context_parallel_metadata([97, 64], group.size)
    for round in range(1, 201):
        algorithm = ALGORITHMS[round % 4] if round % 3 else "direct"
        rows = shard_rows(metadata, group.rank, (16,), torch.float32, round=round)
        (got,) = all_gather_kv([rows], metadata, group, algorithm=algorithm)
        provenance.check(got, metadata, round=round)


def check_results_that_are_kept_stay_valid() -> None:
    """Ranks keep different results for different times: offsets must not drift apart."""
    group = init_context_parallel(dist.get_world_size())
    metadata = prepare_context_parallel_metadata([50], group.size)
    kept: dict[int, torch.Tensor] = {}
    rng = random.Random(dist.get_rank())
    for round in range(1, 60):
        rows = shard_rows(metadata, group.rank, (32,), torch.int32, round=round)
        (got,) = all_gather_kv([rows], metadata, group)
        kept[round] = got
        for other, result in kept.items():
            provenance.check(result, metadata, round=other)
        while kept and rng.random() < 0.5:
            kept.pop(rng.choice(list(kept)))


def check_the_seeds_functions() -> None:
    for round, (group, metadata, _) in enumerate(batches("seed", 2)):
        rows = shard_rows(metadata, group.rank, (2, 8), torch.bfloat16, round=round)
        batch = SimpleNamespace(attn_cp_metadata=metadata)
        total_len = metadata.max_rank_len[0] * group.size
        poison(group)
        got = cp_all_gather_reorganized_into_tensor_kv_cache(rows, total_len, group.size, batch)
        provenance.check(got[metadata.token_order], metadata, round=round)
        got = cp_all_gather_rerange_kv_cache(rows, total_len, group.size, batch, None)
        provenance.check(got, metadata, round=round)


def check_one_sequence_takes_the_seeds_own_total_len() -> None:
    group = init_context_parallel(dist.get_world_size())
    metadata = prepare_context_parallel_metadata([101], group.size)
    rows = shard_rows(metadata, group.rank, (4,), torch.float32, round=1)
    batch = SimpleNamespace(attn_cp_metadata=metadata)
    got = cp_all_gather_rerange_kv_cache(rows, 101, group.size, batch)
    provenance.check(got, metadata, round=1)


def check_ranks_without_rows_and_rows_without_bytes() -> None:
    group = init_context_parallel(dist.get_world_size())
    for strategy in ("interleave", "contiguous"):
        metadata = prepare_context_parallel_metadata([1], group.size, strategy)
        for algorithm in ALGORITHMS:
            rows = shard_rows(metadata, group.rank, (8,), torch.float32, round=1)
            empty = torch.empty(rows.shape[0], 0, 4, device=DEVICE)
            got, nothing = all_gather_kv([rows, empty], metadata, group, algorithm=algorithm)
            provenance.check(got, metadata, round=1)
            assert nothing.shape == (1, 0, 4)


def check_the_reference_agrees() -> None:
    for round, (group, metadata, _) in enumerate(batches("reference", 1)):
        rows = shard_rows(metadata, group.rank, (8,), torch.float64, round=round)
        for gather in (all_gather_kv, all_gather_kv_reference):
            (got,) = gather([rows], metadata, group, algorithm="direct")
            provenance.check(got, metadata, round=round)


def check_an_asymmetric_batch_falls_back_and_says_so() -> None:
    group = init_context_parallel(dist.get_world_size())
    metadata = prepare_context_parallel_metadata([64], group.size)
    rows = shard_rows(metadata, group.rank, (8,), torch.float32, round=1)
    for algorithm in ALGORITHMS:
        with batch_symmetry(False):
            (got,) = all_gather_kv([rows], metadata, group, algorithm=algorithm)
        provenance.check(got, metadata, round=1)
        report = last_path(group)
        assert report is not None
        assert report.path == "fallback"
        assert "is_allocation_symmetric() is false" in report.reason
        all_gather_kv([rows], metadata, group, algorithm=algorithm)
        report = last_path(group)
        assert report is not None
        ordinary = "staged" if DEVICE == "cuda" else "fallback"  # ranks of one GPU go over a stage
        assert report.path == (ordinary if algorithm == "padded" else "symmetric")


def check_stages_are_recorded() -> None:
    group = init_context_parallel(dist.get_world_size())
    metadata = prepare_context_parallel_metadata([67, 50], group.size)
    rows = shard_rows(metadata, group.rank, (8,), torch.float32, round=4)
    with stages.record(keep_arrays=True) as recorder:
        all_gather_kv([rows], metadata, group, algorithm="padded_symm")
    assert list(recorder.total_us()) == ["agree", "pad", "wire", "exit", "strip", "reorder"]
    assert recorder.arrays["pad"].shape[0] == metadata.max_rank_len[0]
    assert recorder.arrays["wire"].shape[0] == metadata.max_rank_len[0] * group.size
    in_rank_order = provenance.decode_rows(recorder.arrays["strip"])
    starts = torch.tensor(metadata.starts)[in_rank_order[:, 2]]
    assert torch.equal(starts + in_rank_order[:, 3], metadata.rank_order)
    provenance.check(recorder.arrays["reorder"].view(torch.float32), metadata, round=4)


def check_one_strided_row_a_rank() -> None:
    """One row counts as contiguous to torch, whatever its strides are."""
    group = init_context_parallel(dist.get_world_size())
    metadata = prepare_context_parallel_metadata([group.size], group.size, "interleave")
    for dtype in (torch.float32, torch.complex128, torch.uint8):
        for algorithm in ALGORITHMS:
            rows = shard_rows(metadata, group.rank, (), dtype, round=1)
            shard = torch.empty(2, dtype=dtype, device=DEVICE)[::2]
            shard[0] = rows[0]
            (got,) = all_gather_kv([shard], metadata, group, algorithm=algorithm)
            provenance.check(got, metadata, round=1)


def check_rows_that_require_grad_are_data_like_any_other() -> None:
    group = init_context_parallel(dist.get_world_size())
    metadata = prepare_context_parallel_metadata([40], group.size)
    rows = shard_rows(metadata, group.rank, (8,), torch.float32, round=2)
    for algorithm in ALGORITHMS:
        (got,) = all_gather_kv([rows.requires_grad_()], metadata, group, algorithm=algorithm)
        assert not got.requires_grad
        provenance.check(got, metadata, round=2)


def check_rows_land_in_the_slots_of_every_ranks_cache() -> None:
    """Paged cache: rows that no slot names stay as they were, on every rank."""
    for round, (group, metadata, rng) in enumerate(batches("slots", 1)):
        total = metadata.total_tokens
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        slots = torch.randperm(2 * total, generator=generator)[:total]
        slots[torch.rand(total, generator=generator) < 0.2] = -1
        kinds = [(torch.bfloat16, (2, 8)), (torch.uint8, (33,))]
        shards = [
            shard_rows(metadata, group.rank, shape, dtype, round=round, tensor=i)
            for i, (dtype, shape) in enumerate(kinds)
        ]
        with use_symmetric_memory(group):
            caches = [
                torch.empty(2 * total, *shape, dtype=dtype, device=DEVICE) for dtype, shape in kinds
            ]
        for algorithm in ALGORITHMS:
            for cache in caches:
                provenance.poison_(cache)
            finish()
            group.barrier()
            got = all_gather_kv(
                shards, metadata, group, algorithm=algorithm, into=caches, slots=slots.to(DEVICE)
            )
            assert [x.data_ptr() for x in got] == [x.data_ptr() for x in caches]
            assert_in_slots(caches, slots, metadata, kinds, round)


def assert_in_slots(
    caches: list[torch.Tensor],
    slots: torch.Tensor,
    metadata: ContextParallelMetadata,
    kinds: list[tuple[torch.dtype, tuple[int, ...]]],
    round: int,
) -> None:
    """Every token in its slot, poison everywhere else."""
    stored = slots >= 0
    for i, (cache, (dtype, shape)) in enumerate(zip(caches, kinds, strict=True)):
        want = provenance.expected_rows(metadata, shape, dtype, round=round, tensor=i)
        whole = provenance.poison_(torch.empty(cache.shape, dtype=dtype))
        whole[slots[stored]] = want[stored]
        assert torch.equal(cache.cpu().view(torch.uint8), whole.view(torch.uint8))


def check_bad_caches_and_slots_are_everybodys_error() -> None:
    group = init_context_parallel(dist.get_world_size())
    metadata = prepare_context_parallel_metadata([64], group.size)
    rows = shard_rows(metadata, group.rank, (8,), torch.float32, round=1)
    slots = torch.arange(64, device=DEVICE)
    with use_symmetric_memory(group):
        cache = torch.empty(64, 8, device=DEVICE)
    ordinary = torch.empty(64, 8, device=DEVICE)
    first = group.rank == 0
    cases = [
        ([cache], None, "go together"),
        ([cache, cache], slots, "has 2 caches for 1 tensors"),
        ([cache[:, :4]], slots, "must be equal"),
        ([ordinary], slots, "inside `with use_symmetric_memory(group)`"),
        ([ordinary if first else cache], slots, "rank 0: into[0] is ordinary memory"),
        ([cache], slots + 1, "slots go from 1 to 64"),
        ([cache], slots // 2, "name a row twice"),
        ([cache], slots.flip(0) if first else slots, "slots differ between the ranks"),
        ([cache], slots[:5] if first else slots, "rank(s) 0: slots is [5] int64"),
    ]
    into_some = {"into": [cache], "slots": slots} if first else {}
    assert "different collectives" in error_of(all_gather_kv, [rows], metadata, group, **into_some)
    twice = {"into": [cache, cache], "slots": slots}
    assert "same cache twice" in error_of(all_gather_kv, [rows, rows], metadata, group, **twice)
    for into, where, words in cases:
        said = error_of(all_gather_kv, [rows], metadata, group, into=into, slots=where)
        assert words in said, (words, said)
    (got,) = all_gather_kv([rows], metadata, group)
    provenance.check(got, metadata, round=1)


def check_a_result_knows_its_path() -> None:
    group = init_context_parallel(dist.get_world_size())
    metadata = prepare_context_parallel_metadata([64], group.size)
    rows = shard_rows(metadata, group.rank, (8,), torch.float32, round=1)
    direct, padded = (
        all_gather_kv([rows], metadata, group, algorithm=algorithm)[0]
        for algorithm in ("direct", "padded")
    )
    told = path_of_result(direct), path_of_result(padded)
    assert told[0] is not None
    assert told[0].path == "symmetric"
    assert told[1] is not None
    assert told[1].path == ("staged" if DEVICE == "cuda" else "fallback")
    assert path_of_result(rows) is None


def check_the_reference_push_agrees() -> None:
    """`push_all_reference` and the fast path of the device, into poisoned outputs."""
    for round, (group, metadata, rng) in enumerate(batches("push", 1)):
        pool = pool_of(group)
        kinds = [(rng.choice(DTYPES), rng.choice(TRAILING)) for _ in range(2)]
        rows = [
            steps.as_rows(shard_rows(metadata, group.rank, shape, dtype, round=round, tensor=i))
            for i, (dtype, shape) in enumerate(kinds)
        ]
        outputs = [pool.empty((metadata.total_tokens, x.shape[1]), x.dtype) for x in rows]
        for output in outputs:
            provenance.poison_(output)
        finish()
        group.barrier()
        steps.push_all_reference(rows, outputs, metadata, pool)
        for i, (output, (dtype, shape)) in enumerate(zip(outputs, kinds, strict=True)):
            like = torch.empty(0, *shape, dtype=dtype, device=DEVICE)
            provenance.check(steps.from_rows(output, like), metadata, round=round, tensor=i)
        pool.meet("next")


def check_rows_of_another_alignment_land_in_a_cache() -> None:
    """Rank 0's rows begin at an odd element, so that they move in narrower lanes than the cache."""
    group = init_context_parallel(dist.get_world_size())
    metadata = prepare_context_parallel_metadata([64], group.size)
    rows = shard_rows(metadata, group.rank, (4,), torch.bfloat16, round=3)
    if group.rank == 0:
        wider = torch.empty(rows.numel() + 1, dtype=rows.dtype, device=DEVICE)
        wider[1:] = rows.flatten()
        rows = wider[1:].view(rows.shape)
    slots = torch.arange(64, device=DEVICE)
    with use_symmetric_memory(group):
        cache = torch.empty(64, 4, dtype=torch.bfloat16, device=DEVICE)
    for algorithm in ALGORITHMS:
        provenance.poison_(cache)
        finish()
        group.barrier()
        all_gather_kv([rows], metadata, group, algorithm=algorithm, into=[cache], slots=slots)
        provenance.check(cache, metadata, round=3)
