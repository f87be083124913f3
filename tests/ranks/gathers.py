"""Gathers of random batches are bit-exact: stamped rows, poisoned memory, many rounds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

from cpkit import bench, provenance, stages
from cpkit.gather import (
    ALGORITHMS,
    all_gather_kv,
    as_rows,
    cp_all_gather_reorganized_into_tensor_kv_cache,
    cp_all_gather_rerange_kv_cache,
    from_rows,
    last_path,
    path_of_result,
)
from cpkit.group import CPGroup, init_context_parallel
from cpkit.layout import STRATEGIES, ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.memory.pool import SymmetricPool
from cpkit.plan import plan_gather_kv
from cpkit.reference import all_gather_kv_reference, push_reference
from cpkit.symm import batch_symmetry, explain_path
from tests.ranks.device import (
    DEVICE,
    batch_of,
    finish,
    path_by_table,
    pool_of,
    shard_rows,
    world_group,
)
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
    if DEVICE == "cuda":  # the kernel is compiled per size; each launch tests one size
        return [world]
    return [n for n in range(1, world + 1) if world % n == 0]


def batches(
    seed: str, count: int
) -> Iterator[tuple[CPGroup, ContextParallelMetadata, random.Random]]:
    """Yield random ragged batches of every cp_size and strategy, the same on all ranks."""
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
    """Return the same values as every second element of a wider tensor."""
    wide = x.new_empty(*x.shape, 2)
    wide[..., 0] = x
    return wide[..., 0]


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Return the same values, contiguous, one element after an aligned address."""
    flat = x.new_empty(x.numel() + 1)
    flat[1:] = x.flatten()
    return flat[1:].view(x.shape)


def poison(group: CPGroup) -> None:
    """Poison all free memory of the pool, in which a result could land."""
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


def check_repeated_calls_are_bit_exact() -> None:
    """The second call of a gather skips its checks. Its rows, strides and callers may differ.

    On some ranks the calls are recorded, so that they take every step. A view keeps its result.
    """
    for number, (group, metadata, rng) in enumerate(
        batches("repeated", 3 if DEVICE == "cpu" else 1)
    ):
        kinds = [(rng.choice(DTYPES), rng.choice(TRAILING)) for _ in range(rng.randint(1, 3))]
        algorithm = rng.choice(["direct", "direct", *ALGORITHMS])
        views: list[torch.Tensor] = []
        for repetition in range(5):
            round = 10 * number + repetition
            shards = [
                shard_rows(metadata, group.rank, shape, dtype, round=round, tensor=i)
                for i, (dtype, shape) in enumerate(kinds)
            ]
            shards[0] = rng.choice((torch.clone, strided, shifted))(shards[0])
            poison(group)
            every_step = (repetition + group.rank) % 3 == 2
            with stages.record() if every_step else nullcontext():
                results = all_gather_kv(shards, metadata, group, algorithm=algorithm)
            assert last_path(group) is path_of_result(results[-1])
            for i, got in enumerate(results):
                provenance.check(got, metadata, round=round, tensor=i)
            views.append(results[0].view(torch.uint8) if results[0].ndim > 1 else results[0][:])
            del got, results
        for repetition, view in enumerate(views):
            got = view.view(kinds[0][0])
            provenance.check(got, metadata, round=10 * number + repetition, tensor=0)


def check_a_repeated_call_reads_rows_at_any_address() -> None:
    """The first call has aligned rows; the kernel for these must not read others."""
    group, metadata, _ = batch_of(64)
    forms = (torch.clone, torch.clone, shifted, strided, shifted, torch.clone)
    for round, form in enumerate(forms):
        rows = shard_rows(metadata, group.rank, (8, 16), torch.bfloat16, round=round)
        (got,) = all_gather_kv([form(rows)], metadata, group)
        provenance.check(got, metadata, round=round)


def check_ranks_that_repeat_different_calls_raise() -> None:
    """Fingerprints differ, and the words are those of a first call; then the ranks go on."""
    group, metadata, rows = batch_of(64)
    _, other, other_rows = batch_of(72)
    calls = [partial(all_gather_kv, [rows], metadata, group)]
    calls.append(partial(all_gather_kv, [other_rows], other, group))
    for call in (*calls, *calls):
        call()
    words = error_of(calls[group.rank == 0])
    assert "different collectives" in words, words
    assert "lengths=[64]" in words, words
    assert "lengths=[72]" in words, words
    for call, layout in zip(calls, (metadata, other), strict=True):
        provenance.check(call()[0], layout, round=1)


def check_many_rounds_back_to_back() -> None:
    """No rank pauses between rounds, so a missing barrier causes a stale or torn row."""
    group = world_group()
    metadata = prepare_context_parallel_metadata([97, 64], group.size)
    for round in range(1, 201):
        algorithm = ALGORITHMS[round % 4] if round % 3 else "direct"
        rows = shard_rows(metadata, group.rank, (16,), torch.float32, round=round)
        (got,) = all_gather_kv([rows], metadata, group, algorithm=algorithm)
        provenance.check(got, metadata, round=round)


def check_kept_results_stay_valid() -> None:
    """Ranks keep different results for different times. Their offsets must stay equal."""
    group = world_group()
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


def check_one_sequence_accepts_the_seeds_own_total_len() -> None:
    group, metadata, rows = batch_of(101, trailing=(4,))
    batch = SimpleNamespace(attn_cp_metadata=metadata)
    got = cp_all_gather_rerange_kv_cache(rows, 101, group.size, batch)
    provenance.check(got, metadata, round=1)


def check_ranks_without_rows_and_rows_without_bytes() -> None:
    group = world_group()
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


def check_an_asymmetric_batch_falls_back_with_the_reason() -> None:
    group, metadata, rows = batch_of(64)
    for algorithm in ALGORITHMS:
        with batch_symmetry(False):
            (got,) = all_gather_kv([rows], metadata, group, algorithm=algorithm)
        provenance.check(got, metadata, round=1)
        report = last_path(group)
        assert report.path == "fallback"
        assert "is_allocation_symmetric() is false" in report.reason
        all_gather_kv([rows], metadata, group, algorithm=algorithm)
        assert last_path(group).path == path_by_table(algorithm), algorithm


def check_stages_are_recorded() -> None:
    group, metadata, rows = batch_of(67, 50, round=4)
    with stages.record(keep_arrays=True) as recorder:
        all_gather_kv([rows], metadata, group, algorithm="padded_symm")
    assert list(recorder.total_us()) == ["agree", "pad", "wire", "exit", "strip", "reorder"]
    assert recorder.arrays["pad"].shape[0] == metadata.max_rank_len[0]
    assert recorder.arrays["wire"].shape[0] == metadata.max_rank_len[0] * group.size
    in_rank_order = provenance.decode_rows(recorder.arrays["strip"])
    starts = torch.tensor(metadata.starts)[in_rank_order[:, 2]]
    assert torch.equal(starts + in_rank_order[:, 3], metadata.rank_order)
    provenance.check(recorder.arrays["reorder"].view(torch.float32), metadata, round=4)


def check_timed_gathers_are_not_recorded() -> None:
    """A recorded gather takes every step, so `time_calls` records none."""
    group, metadata, rows = batch_of(1021)
    observed: list[bool] = []

    def call() -> None:
        observed.append(stages.is_observed())
        all_gather_kv([rows], metadata, group)

    timings = bench.time_calls({"": call}, group, 4, warmup=1)
    assert not any(observed[:5])
    bench.add_stages({"": call}, group, timings)
    assert observed[-1]
    assert len(timings[""].call_us) == 4
    assert {"agree", "wire"} <= set(timings[""].stages_us)


def check_stages_are_ranges_in_a_profile() -> None:
    group = world_group()
    metadata = prepare_context_parallel_metadata([67, 50], group.size)
    rows = shard_rows(metadata, group.rank, (8,), torch.float32, round=5)
    with torch.profiler.profile() as profile:
        all_gather_kv([rows], metadata, group, algorithm="padded_symm")
    named = {event.name for event in profile.events() if event.name.startswith("cpkit.")}
    expected = {"agree", "pad", "wire", "strip", "reorder"}
    assert named >= {f"cpkit.{name}" for name in expected}, named


def check_one_strided_row_per_rank() -> None:
    """torch reports a single row as contiguous whatever its strides are."""
    group = world_group()
    metadata = prepare_context_parallel_metadata([group.size], group.size, "interleave")
    for dtype in (torch.float32, torch.complex128, torch.uint8):
        for algorithm in ALGORITHMS:
            rows = shard_rows(metadata, group.rank, (), dtype, round=1)
            shard = torch.empty(2, dtype=dtype, device=DEVICE)[::2]
            shard[0] = rows[0]
            (got,) = all_gather_kv([shard], metadata, group, algorithm=algorithm)
            provenance.check(got, metadata, round=1)


def eight_rows() -> tuple[CPGroup, ContextParallelMetadata, torch.Tensor]:
    """Eight rows per rank, of round 2."""
    group = world_group()
    metadata = prepare_context_parallel_metadata([8 * group.size], group.size)
    return group, metadata, shard_rows(metadata, group.rank, (8,), torch.float32, round=2)


def refusals(spoil: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Yield what each function says where rank 0 passes one spoiled tensor: (its name, error)."""
    group, metadata, rows = eight_rows()
    bad = spoil(rows.clone()) if group.rank == 0 else rows
    batch = SimpleNamespace(attn_cp_metadata=metadata)
    recv = torch.empty(8 * group.size, 8, device=DEVICE)
    bad_recv = spoil(recv.clone()) if group.rank == 0 else recv
    slots = torch.arange(8 * group.size, device=DEVICE)
    into = {"algorithm": "padded", "slots": slots, "into": [bad_recv]}
    kv = (metadata, group)
    for algorithm in ALGORITHMS:
        yield "tensors[0]", error_of(all_gather_kv, [bad], *kv, algorithm=algorithm)
    yield "into[0]", error_of(all_gather_kv, [rows], *kv, **into)
    yield "tensors[0]", error_of(plan_gather_kv, [bad], *kv)
    seed = cp_all_gather_reorganized_into_tensor_kv_cache
    yield "input_tensor", error_of(seed, bad, metadata.total_tokens, group.size, batch)
    yield "input", error_of(group.cp_all_gather_into_tensor_async, recv, bad)
    yield "output", error_of(group.cp_all_gather_into_tensor_async, bad_recv, rows)


def check_tensors_without_memory_of_their_own_are_refused_on_every_rank() -> None:
    """Their addresses are null, or hold something else than the values."""
    group, metadata, rows = eight_rows()
    first = group.rank == 0
    all_gather_kv([rows], metadata, group)  # what is remembered of this call must not help

    def zero(x: torch.Tensor) -> torch.Tensor:
        return torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device)

    def freed(x: torch.Tensor) -> torch.Tensor:
        x.untyped_storage().resize_(0)
        return x

    def quantized(x: torch.Tensor) -> torch.Tensor:
        return torch.quantize_per_tensor(x.nan_to_num(), 1.0, 0, torch.qint8)

    for spoil, words in (
        (lambda x: TwoTensor(x, x), "is a TwoTensor without"),
        (zero, "is a Tensor without"),
        (freed, "is a Tensor without"),
        (quantized, "is quantized"),
    ):
        for name, said in refusals(spoil):
            assert f"rank(s) 0: {name} {words}" in said, said
            assert "to_local()" in said, said
    slots = torch.arange(8 * group.size, device=DEVICE)
    options = {
        "slots": zero(slots) if first else slots,
        "into": [torch.empty(8 * group.size, 8, device=DEVICE)],
    }
    said = error_of(all_gather_kv, [rows], metadata, group, algorithm="padded", **options)
    assert "rank(s) 0: slots is a Tensor without" in said, said
    said = error_of(explain_path, zero(rows) if first else rows, rows, group)
    assert "rank(s) 0: send is a Tensor without" in said, said


def check_rows_that_require_grad_are_refused_on_every_rank() -> None:
    """A gather has no backward: training would go on with a gradient that is silently wrong."""
    group, metadata, rows = eight_rows()
    for name, said in refusals(torch.Tensor.requires_grad_):
        assert f"{name} requires grad" in said, said
        assert f"{name}.detach()" in said
        assert "torch.no_grad()" in said
    with forward_ad.dual_level():
        for name, said in refusals(lambda x: forward_ad.make_dual(x, torch.ones_like(x))):
            assert f"{name} has a forward-mode tangent" in said, said
            assert f"unpack_dual({name}).primal" in said
    trained = rows.clone().requires_grad_(group.rank == 0)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            (got,) = all_gather_kv([trained], metadata, group)
        provenance.check(got, metadata, round=2)
    (got,) = all_gather_kv([trained.detach()], metadata, group)
    provenance.check(got, metadata, round=2)


def check_a_result_has_its_path() -> None:
    group, metadata, rows = batch_of(64)
    results = {
        algorithm: all_gather_kv([rows], metadata, group, algorithm=algorithm)[0]
        for algorithm in ("direct", "padded")
    }
    for algorithm, result in results.items():
        assert path_of_result(result).path == path_by_table(algorithm)
    assert path_of_result(rows) is None


def check_the_reference_push_agrees() -> None:
    """`push_reference` and the fast path of the device store the same rows."""
    for round, (group, metadata, rng) in enumerate(batches("push", 1)):
        pool = pool_of(group)
        kinds = [(rng.choice(DTYPES), rng.choice(TRAILING)) for _ in range(2)]
        rows = [
            as_rows(shard_rows(metadata, group.rank, shape, dtype, round=round, tensor=i))
            for i, (dtype, shape) in enumerate(kinds)
        ]
        outputs = [pool.empty((metadata.total_tokens, x.shape[1]), x.dtype) for x in rows]
        for push in (push_reference, SymmetricPool.push):
            for output in outputs:
                provenance.poison_(output)
            finish()
            group.barrier()
            push(pool, rows, outputs, metadata)
            finish()
            for i, (output, (dtype, shape)) in enumerate(zip(outputs, kinds, strict=True)):
                like = torch.empty(0, *shape, dtype=dtype, device=DEVICE)
                provenance.check(from_rows(output, like), metadata, round=round, tensor=i)
            pool.free_dropped("next")


def check_a_wrong_type_on_one_rank_is_an_error_on_all_ranks() -> None:
    group, metadata, rows = batch_of(64)
    first, pool = group.rank == 0, pool_of(group)
    batch = SimpleNamespace(attn_cp_metadata=metadata)
    seed = cp_all_gather_reorganized_into_tensor_kv_cache
    for words, call, *arguments in (
        ("stream is 'x'", all_gather_kv, [rows], metadata, group),
        ("stream is 'x'", seed, rows, 64, group.size, batch),
        ("cp_size is 2.0", seed, rows, 64, 2.0 if first else group.size, batch),
        ("transport is 5", explain_path, rows, rows, group, 5 if first else None),
        ("trailing_shape is 8", pool.warm_up, 10, 8 if first else (8,)),
        ("dtype is 'x'", pool.warm_up, 10, (8,), "x" if first else torch.int8),
        ("tensors is True", pool.warm_up, 10, (8,), torch.int8, True if first else 1),
    ):
        extra = {"stream": "x"} if first and "stream" in words else {}
        assert words in error_of(call, *arguments, **extra), words
    listed = ContextParallelMetadata([64], group.size, "zigzag")  # type: ignore[arg-type]
    (got,) = all_gather_kv([rows], listed if first else metadata, group)
    provenance.check(got, metadata, round=1)
