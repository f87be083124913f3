"""Gathers straight into a paged KV cache, on every rank's device."""

from __future__ import annotations

from functools import partial

import torch

from cpkit import provenance
from cpkit.gather import ALGORITHMS, all_gather_kv
from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.symm import use_symmetric_memory
from tests.ranks.device import DEVICE, batch_of, finish, shard_rows, world_group
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


# The shape of a whole cache after [slots], and the columns that each tensor is stored in.
SLICED = (
    (torch.bfloat16, (1, 72), [(..., slice(64)), (..., slice(64, 72))]),  # MLA: nope, rope
    (torch.uint8, (132,), [(..., slice(128)), (..., slice(128, 132))]),  # fp8 keys, their scales
    (torch.float32, (3, 2, 5), [(slice(None), 1)]),  # one layer of a stacked cache
)


def check_column_slices_are_filled_and_their_surroundings_stay_untouched() -> None:
    """Slots are int64 on rank 0, and every second item of an int32 tensor on the other ranks."""
    for round, (group, metadata, _) in enumerate(batches("columns", 1)):
        total = metadata.total_tokens
        slots = torch.randperm(2 * total, generator=torch.Generator().manual_seed(round))[:total]
        slots[::5] = -1
        mine = slots.to(DEVICE)
        if group.rank:
            mine = mine.int().repeat_interleave(2)[::2]
        with use_symmetric_memory(group):
            wholes = [
                torch.empty(2 * total, *shape, dtype=dtype, device=DEVICE)
                for dtype, shape, _ in SLICED
            ]
        expected = [provenance.poison_(whole.clone()).cpu() for whole in wholes]
        caches, shards, stored = [], [], slots >= 0
        for whole, want, (dtype, _, columns) in zip(wholes, expected, SLICED, strict=True):
            for column in columns:
                stamp = {"round": round, "tensor": len(caches)}
                caches.append(whole[column])
                shape = caches[-1].shape[1:]
                shards.append(shard_rows(metadata, group.rank, shape, dtype, **stamp))
                rows = provenance.expected_rows(metadata, shape, dtype, **stamp)
                want[column][slots[stored]] = rows[stored]
        for algorithm in ALGORITHMS:
            for whole in wholes:
                provenance.poison_(whole)
            finish()
            group.barrier()
            all_gather_kv(shards, metadata, group, algorithm=algorithm, into=caches, slots=mine)
            for whole, want in zip(wholes, expected, strict=True):
                assert torch.equal(whole.cpu().view(torch.uint8), want.view(torch.uint8)), algorithm


def check_small_caches_and_batches() -> None:
    """Rows of no elements, caches of one slot or none, ranks without rows, a leading offset."""
    group = world_group()
    one_token = prepare_context_parallel_metadata([1], group.size, "contiguous")
    skipped, first = (torch.tensor([n], device=DEVICE) for n in (-1, 0))
    with use_symmetric_memory(group):
        whole = torch.empty(4, 8, device=DEVICE)
        empty = torch.empty(4, 8, 0, device=DEVICE)
    cases = [
        (whole[1:2], first),
        (whole[3:], first),
        (whole[1:2, :3], first),
        (whole[:, 3:6], first),
        (whole[:0], skipped),
        (whole[:1], skipped),
        (empty, first),
    ]
    for cache, slots in cases:
        rows = shard_rows(one_token, group.rank, cache.shape[1:], torch.float32, round=1)
        for algorithm in ALGORITHMS:
            provenance.poison_(whole)
            expected = whole.clone()
            finish()
            group.barrier()
            all_gather_kv([rows], one_token, group, algorithm=algorithm, into=[cache], slots=slots)
            if slots is first:
                provenance.check(cache[:1], one_token, round=1)
                cache[:1] = provenance.poison_(cache[:1].clone())
            assert torch.equal(whole.view(torch.uint8), expected.view(torch.uint8))
            finish()
            group.barrier()


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
        wide = torch.empty(64, 24, device=DEVICE)
    ordinary = torch.empty(64, 8, device=DEVICE)
    first = group.rank == 0
    fp8 = cache.to(torch.float8_e4m3fn)
    differ = "at different offsets on the ranks, or their rows lie apart by different strides"
    cases = [
        ([cache], None, "pass into and slots together"),
        ([cache, cache], slots, "has 2 caches for 1 tensors"),
        ([cache[:, :4]], slots, "must be equal. To fill a part of every cache row, pass a column"),
        ([cache.view(16, 4, 8)], slots, "For a cache of pages pass its rows: cache.view(-1, 8)"),
        ([cache.view(64, 2, 4)], slots, "rows.reshape(-1, 2, 4)"),
        ([fp8], slots, "rows.to(torch.float8_e4m3fn) sends 1 instead of 4 bytes per element"),
        ([cache.view(torch.int32)], slots, "or rows.view(torch.int32) if the cache holds"),
        ([wide[:, ::3]], slots, "strides [24, 3]; each of its rows must be dense"),
        ([cache[:1].expand(64, 8)], slots, "must not overlap the next one"),
        ([wide[:, :8] if first else wide[:, 8:16]], slots, differ),
        ([wide[:, :8] if first else wide.view(-1)[: 64 * 8].view(64, 8)], slots, differ),
        ([ordinary], slots, "inside `with use_symmetric_memory(group)`"),
        ([ordinary if first else cache], slots, "rank(s) 0: into[0] is ordinary memory"),
        ([cache], slots + 1 if first else slots, "slots go from 1 to 64"),
        ([cache], slots // 2 if first else slots, "name a row twice: row 0 is the slot of 2 tok"),
        ([cache], slots.clamp(max=9), "use -1 for tokens that are not to be stored"),
        ([cache], slots.flip(0) if first else slots, "slots differ between the ranks"),
        ([cache], slots[:5] if first else slots, "rank(s) 0: slots is [5] int64"),
        (
            [cache],
            slots.to("meta") if first else slots,
            f"int64 meta; it must be int64 or int32 [64] on {DEVICE}",
        ),
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
        wide = torch.empty(64, 9, device=DEVICE)
    inside = large[: len(rows)]
    for tensors, into in (
        ([rows, rows], [large[:64], large[32:96]]),
        ([inside], [large[:64]]),
        ([rows, rows], [large[:64], large[:64]]),
        ([wide[: len(rows), :4]], [wide[:, 3:7]]),
    ):
        said = error_of(all_gather_kv, tensors, metadata, group, into=into, slots=slots)
        assert "share memory" in said
    with use_symmetric_memory(group):
        numbers = torch.empty(len(slots), dtype=slots.dtype, device=DEVICE).copy_(slots)
    ids = numbers[: len(rows)].clone()
    said = error_of(all_gather_kv, [ids], metadata, group, into=[numbers], slots=numbers)
    assert "slots" in said, said
    apart = [large[:64], large[64:128]]
    for cache in apart:
        provenance.poison_(cache)
    finish()
    group.barrier()
    for cache in all_gather_kv([rows, rows], metadata, group, into=apart, slots=slots):
        provenance.check(cache, metadata, round=1)


def check_slices_overlap_only_where_they_share_elements() -> None:
    group = world_group()
    metadata = prepare_context_parallel_metadata([1], group.size, "contiguous")
    rows = shard_rows(metadata, group.rank, (4,), torch.float32, round=1)
    slots = torch.tensor([-1], device=DEVICE)
    with use_symmetric_memory(group):
        flat = torch.empty(100, device=DEVICE)
    numbers = torch.arange(100)
    for start in range(80):
        places = [((3, 4), (9, 1), 30), ((2, 4), (9, 1), start)]
        caches = [flat.as_strided(*place) for place in places]
        one, other = (set(numbers.as_strided(*place).flatten().tolist()) for place in places)
        gather = partial(all_gather_kv, [rows, rows], metadata, group, into=caches, slots=slots)
        if one & other:
            assert "share memory" in error_of(gather), start
        else:
            gather()


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
        assert "is a conjugated or negated view" in said, said
