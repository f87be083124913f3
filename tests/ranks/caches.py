"""Gathers straight into a paged KV cache, on every rank's device."""

from __future__ import annotations

import torch

from cpkit import provenance
from cpkit.gather import ALGORITHMS, all_gather_kv
from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata
from cpkit.symm import use_symmetric_memory
from tests.ranks.device import DEVICE, batch_of, finish, shard_rows
from tests.ranks.errors import error_of
from tests.ranks.gathers import batches


def check_rows_are_stored_in_the_slots_of_every_ranks_cache() -> None:
    """Cache rows that no slot names keep their content on every rank."""
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


def one_sequence(
    trailing: tuple[int, ...], dtype: torch.dtype = torch.float32, round: int = 1
) -> tuple[CPGroup, ContextParallelMetadata, torch.Tensor, torch.Tensor]:
    """Return `batch_of` 64 tokens, and slots that store token t in row t."""
    batch = batch_of(64, trailing=trailing, dtype=dtype, round=round)
    return *batch, torch.arange(64, device=DEVICE)


def assert_in_slots(
    caches: list[torch.Tensor],
    slots: torch.Tensor,
    metadata: ContextParallelMetadata,
    kinds: list[tuple[torch.dtype, tuple[int, ...]]],
    round: int,
) -> None:
    """Check that every token is in its slot and that all other rows are poison."""
    stored = slots >= 0
    for i, (cache, (dtype, shape)) in enumerate(zip(caches, kinds, strict=True)):
        want = provenance.expected_rows(metadata, shape, dtype, round=round, tensor=i)
        whole = provenance.poison_(torch.empty(cache.shape, dtype=dtype))
        whole[slots[stored]] = want[stored]
        assert torch.equal(cache.cpu().view(torch.uint8), whole.view(torch.uint8))


def check_bad_caches_and_slots_are_an_error_on_all_ranks() -> None:
    group, metadata, rows, slots = one_sequence((8,))
    with use_symmetric_memory(group):
        cache = torch.empty(64, 8, device=DEVICE)
    ordinary = torch.empty(64, 8, device=DEVICE)
    first = group.rank == 0
    cases = [
        ([cache], None, "pass into and slots together"),
        ([cache, cache], slots, "has 2 caches for 1 tensors"),
        ([cache[:, :4]], slots, "must be equal"),
        ([ordinary], slots, "inside `with use_symmetric_memory(group)`"),
        ([ordinary if first else cache], slots, "rank(s) 0: into[0] is ordinary memory"),
        ([cache], slots + 1 if first else slots, "slots go from 1 to 64"),
        ([cache], slots // 2 if first else slots, "name a row twice"),
        ([cache], slots.flip(0) if first else slots, "slots differ between the ranks"),
        ([cache], slots[:5] if first else slots, "rank(s) 0: slots is [5] int64"),
        ([cache], slots.to("meta") if first else slots, "rank(s) 0: slots is [64] int64 meta"),
    ]
    into_some = {"into": [cache], "slots": slots} if first else {}
    assert "different collectives" in error_of(all_gather_kv, [rows], metadata, group, **into_some)
    for into, where, words in cases:
        said = error_of(all_gather_kv, [rows], metadata, group, into=into, slots=where)
        assert words in said, (words, said)
    (got,) = all_gather_kv([rows], metadata, group)
    provenance.check(got, metadata, round=1)


def check_misaligned_rows_are_stored_in_a_cache() -> None:
    """Rank 0's rows begin at an odd element, so they are copied in narrower units."""
    group, metadata, rows, slots = one_sequence((4,), torch.bfloat16, round=3)
    if group.rank == 0:
        wider = torch.empty(rows.numel() + 1, dtype=rows.dtype, device=DEVICE)
        wider[1:] = rows.flatten()
        rows = wider[1:].view(rows.shape)
    with use_symmetric_memory(group):
        cache = torch.empty(64, 4, dtype=torch.bfloat16, device=DEVICE)
    for algorithm in ALGORITHMS:
        provenance.poison_(cache)
        finish()
        group.barrier()
        all_gather_kv([rows], metadata, group, algorithm=algorithm, into=[cache], slots=slots)
        provenance.check(cache, metadata, round=3)


def check_overlapping_caches_are_an_error_on_all_ranks() -> None:
    group, metadata, rows, slots = one_sequence((4,))
    with use_symmetric_memory(group):
        large = torch.empty(160, 4, device=DEVICE)
    inside = large[: len(rows)]
    for tensors, into in (
        ([rows, rows], [large[:64], large[32:96]]),
        ([inside], [large[:64]]),
        ([rows, rows], [large[:64], large[:64]]),
    ):
        said = error_of(all_gather_kv, tensors, metadata, group, into=into, slots=slots)
        assert "share memory" in said
    apart = [large[:64], large[64:128]]
    for cache in apart:
        provenance.poison_(cache)
    finish()
    group.barrier()
    for cache in all_gather_kv([rows, rows], metadata, group, into=apart, slots=slots):
        provenance.check(cache, metadata, round=1)


def check_the_agreement_has_no_limit_on_the_number_of_caches() -> None:
    group, metadata, rows, slots = one_sequence((4,))
    count = 300
    with use_symmetric_memory(group):
        caches = list(torch.empty(count, 64, 4, device=DEVICE))
    provenance.check(
        all_gather_kv([rows] * count, metadata, group, into=caches, slots=slots)[-1],
        metadata,
        round=1,
    )
    ordinary = [torch.empty(64, 4, device=DEVICE) for _ in range(count)]
    mine = ordinary if group.rank == 0 else caches
    said = error_of(all_gather_kv, [rows] * count, metadata, group, into=mine, slots=slots)
    assert "rank(s) 0: into[0] is ordinary memory" in said


def check_a_conjugated_view_of_a_cache_is_refused() -> None:
    group, metadata, rows, slots = one_sequence((8,), torch.complex64)
    with use_symmetric_memory(group):
        cache = torch.zeros(64, 8, dtype=torch.complex64, device=DEVICE)
    mine = cache.conj() if group.rank == 0 else cache
    for algorithm in ALGORITHMS:
        said = error_of(
            all_gather_kv, [rows], metadata, group, algorithm=algorithm, into=[mine], slots=slots
        )
        assert "not a conjugated or negated view" in said, said
