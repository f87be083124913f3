"""Groups: every divisor of the world size, without a restart, and equal errors on all ranks."""

from __future__ import annotations

import os
import resource
from types import SimpleNamespace

import torch
import torch.distributed as dist

from cpkit import group as group_module
from cpkit import provenance
from cpkit.gather import (
    all_gather_kv,
    cp_all_gather_reorganized_into_tensor_kv_cache,
    last_path,
)
from cpkit.group import forget_groups, get_attention_cp_group, host_id, init_context_parallel
from cpkit.layout import prepare_context_parallel_metadata, shard
from cpkit.memory.nccl_settings import NcclSettings
from cpkit.symm import SymmetricPool, explain_path, use_symmetric_memory
from cpkit.sync.barrier import BarrierTimeout
from cpkit.sync.exchange import ExchangeTimeout
from tests.ranks.device import batch_of
from tests.ranks.errors import error_of, raised
from tests.ranks.gathers import cp_sizes
from tests.ranks.mutants import planted


def gather_works() -> None:
    """Check that the ranks still agree: a gather is bit-exact."""
    group, metadata, rows = batch_of(40, round=9)
    provenance.check(all_gather_kv([rows], metadata, group)[0], metadata, round=9)


def check_every_divisor_makes_groups_of_neighbours() -> None:
    rank = dist.get_rank()
    for cp_size in [*cp_sizes(), *reversed(cp_sizes())]:
        group = init_context_parallel(cp_size)
        first = rank // cp_size * cp_size
        assert group.ranks == tuple(range(first, first + cp_size))
        assert (group.rank, group.size) == (rank - first, cp_size)
        assert get_attention_cp_group() is group
        notes = group.exchange(bytes([rank]))
        assert notes == [bytes([other]) for other in group.ranks]


def check_groups_are_kept() -> None:
    groups = {n: init_context_parallel(n) for n in cp_sizes()}
    assert all(init_context_parallel(n) is groups[n] for n in cp_sizes())


def check_a_bad_cp_size_is_refused_on_every_rank() -> None:
    for bad in (0, -1, 3, 8, 2.0, True, "2"):
        said = error_of(init_context_parallel, bad)
        assert f"cp_size is {bad!r}" in said
        assert "1, 2, 4" in said
        assert ("whole number" in said) == (type(bad) is not int)
    assert "up to 64 characters" in error_of(init_context_parallel, 2, "x" * 20_000)
    gather_works()


def check_a_rank_without_descriptors_is_named_before_a_group_is_made() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        said = error_of(init_context_parallel, 2, "none free")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert said.startswith("rank(s) 1: too many open files: the limit of this process is 3"), said
    assert init_context_parallel(2, "none free").size == 2
    gather_works()


def check_different_cp_sizes_are_named_by_rank() -> None:
    said = error_of(init_context_parallel, 2 if dist.get_rank() == 1 else 4)
    assert "rank(s) 1: init_context_parallel(2, 'default')" in said
    assert "rank(s) 0, 2, 3: init_context_parallel(4, 'default')" in said
    gather_works()


def check_a_bad_argument_of_one_rank_is_an_error_on_all_ranks() -> None:
    group = init_context_parallel(4)
    metadata = prepare_context_parallel_metadata([40], 4)
    rows = torch.zeros(metadata.per_rank_actual_token[group.rank], 8)
    one = group.rank == 2
    cases = [
        (([rows[:3] if one else rows], metadata, group), {}, "rank(s) 2: tensors[0] is [3, 8]"),
        (([rows.double() if one else rows], metadata, group), {}, "torch.float64"),
        (([rows[:, :4] if one else rows], metadata, group), {}, "rows of [4]"),
        (([rows, rows] if one else [rows], metadata, group), {}, "different collectives"),
        (([], metadata, group), {}, "tensors is an empty list; it must be a list of at least one"),
        (([rows], metadata, group), {"algorithm": "fast"}, "padded, padded_symm_recv"),
        (([rows], metadata, group), {"algorithm": "padded" if one else "direct"}, "rank(s) 2"),
        (([rows], None, group), {}, "prepare_context_parallel_metadata"),
        ((["rows"], metadata, group), {}, "tensors[0] is str; it must be a tensor"),
        ((rows if one else [rows], metadata, group), {}, "rank(s) 2: tensors is Tensor"),
        ((5 if one else [rows], metadata, group), {}, "rank(s) 2: tensors is int"),
        (([rows] * 200, metadata, group), {"algorithm": "padded" if one else "direct"}, "rank(s)"),
    ]
    for args, kwargs, words in cases:
        assert words in error_of(all_gather_kv, *args, **kwargs)
    other = prepare_context_parallel_metadata([41, 9] if one else [40, 10], 4)
    rows = torch.zeros(other.per_rank_actual_token[group.rank], 8)
    assert "lengths=[41, 9]" in error_of(all_gather_kv, [rows], other, group)
    gather_works()


def check_a_nested_tensor_is_an_error_on_all_ranks() -> None:
    group = init_context_parallel(4)
    metadata = prepare_context_parallel_metadata([64], 4)
    rows = shard(torch.randn(64, 2), metadata, group.rank)
    bad = torch.nested.as_nested_tensor([rows, rows]) if group.rank == 0 else rows
    assert "tensors[0] is nested" in error_of(all_gather_kv, [bad], metadata, group)
    gather_works()


def check_metadata_for_another_cp_size_is_refused() -> None:
    group = init_context_parallel(2)
    metadata = prepare_context_parallel_metadata([40], 4)
    said = error_of(all_gather_kv, [torch.zeros(10, 2)], metadata, group)
    assert "metadata is for cp_size 4" in said
    assert "init_context_parallel(4)" in said
    assert "prepare_context_parallel_metadata(lengths, 2)" in said


def check_the_seed_refuses_a_total_len_that_would_cut_rows_off() -> None:
    group = init_context_parallel(4)
    metadata = prepare_context_parallel_metadata([4097] * 16, 4)
    rows = torch.zeros(metadata.per_rank_actual_token[group.rank], 2)
    batch = SimpleNamespace(attn_cp_metadata=metadata)
    gather = cp_all_gather_reorganized_into_tensor_kv_cache
    said = error_of(gather, rows, metadata.total_tokens, 4, batch)
    for words in ("pads to 16388 rows", "holds 16400", "cut off", "65600", "all_gather_kv"):
        assert words in said
    assert "total_len is None" in error_of(gather, rows, None, 4, batch)
    assert "All three must be equal" in error_of(gather, rows, metadata.total_tokens, 2, batch)
    assert "metadata is None" in error_of(gather, rows, 4, 4, SimpleNamespace())


def check_the_plain_collective_checks_its_buffers() -> None:
    group = init_context_parallel(4)
    shard = torch.full((3, 2), float(group.rank))
    output = torch.empty(12, 2)
    group.cp_all_gather_into_tensor_async(output, shard)
    assert output[:, 0].tolist() == [float(rank) for rank in range(4) for _ in range(3)]
    said = error_of(group.cp_all_gather_into_tensor_async, output[:9], shard)
    assert "output must be [12, 2]" in said
    view = torch.zeros(12, 2, dtype=torch.complex64).conj()
    said = error_of(group.cp_all_gather_into_tensor_async, view, view[:3].clone())
    assert "not a conjugated or negated view" in said
    group.cp_all_gather_into_tensor_async(output, output[3 * group.rank :][:3])
    assert output[:, 0].tolist() == [float(rank) for rank in range(4) for _ in range(3)]
    elsewhere = output[1:4] if group.rank == 0 else shard
    said = error_of(group.cp_all_gather_into_tensor_async, output, elsewhere)
    assert "rank(s) 0: input shares memory with output" in said, said
    one = shard.double() if group.rank == 0 else shard
    assert "rank(s) 0" in error_of(group.cp_all_gather_into_tensor_async, output, one)


def check_a_missing_rank_is_named() -> None:
    """The last rank does not enter the barrier. The others time out and name it."""
    init_context_parallel(4).exchange(b"")
    os.environ["CPKIT_DEADLINE_S"] = "0.5"
    try:
        group = init_context_parallel(4)
        if group.rank != 3:
            assert "waited 0.5 s for rank(s) 3" in raised(BarrierTimeout, group.barrier)
            exchange = group.store_exchange.exchange
            message = raised(ExchangeTimeout, exchange, b"", "grow the symmetric pool")
            assert "rank(s) 3 to grow the symmetric pool" in message
    finally:
        del os.environ["CPKIT_DEADLINE_S"]
    dist.barrier()
    forget_groups()
    gather_works()


def check_groups_that_span_machines_fall_back_and_report_it() -> None:
    """Each pair of ranks simulates one machine: a group of 2 shares memory, a group of 4 cannot."""
    os.environ["CPKIT_HOST_ID"] = f"machine {dist.get_rank() // 2}"
    host_id.cache_clear()
    forget_groups()
    try:
        for cp_size, path in ((2, "symmetric"), (4, "fallback")):
            group = init_context_parallel(cp_size)
            assert group.spans_hosts is (cp_size == 4)
            metadata = prepare_context_parallel_metadata([40, 23], cp_size)
            rows = provenance.shard_rows(metadata, group.rank, (8,), torch.bfloat16, round=3)
            for algorithm in ("direct", "padded_symm"):
                (got,) = all_gather_kv([rows], metadata, group, algorithm=algorithm)
                provenance.check(got, metadata, round=3)
                assert last_path(group).path == path
            with use_symmetric_memory(group):
                x = torch.empty(5)
            assert (explain_path(x, x, group).path == "symmetric") is (cp_size == 2)
            assert "rank(s) 1" in error_of(
                all_gather_kv, [rows[:1] if group.rank == 1 else rows], metadata, group
            )
        assert "spans machines" in error_of(SymmetricPool, init_context_parallel(4))
    finally:
        del os.environ["CPKIT_HOST_ID"]
        host_id.cache_clear()
        forget_groups()
    gather_works()


def check_two_versions_of_nccl_are_an_error_on_every_rank() -> None:
    """Each pair of ranks simulates a GPU per rank, and an installation of NCCL."""
    rank = dist.get_rank()
    nccl = NcclSettings((2, 28, 9) if rank < 2 else (2, 30, 7))
    forget_groups()
    try:
        with (
            planted(group_module, "gpu_id", lambda _: f"gpu {rank}"),
            planted(dist, "is_nccl_available", lambda _: True),
            planted(group_module, "settings_of_this_process", lambda _: nccl),
        ):
            said = error_of(init_context_parallel, 4)
    finally:
        forget_groups()
    assert "rank(s) 0, 1: 2.28.9; rank(s) 2, 3: 2.30.7" in said, said
    gather_works()


def check_a_rank_without_a_directory_for_segments_is_named() -> None:
    forget_groups()
    before = os.environ.get("CPKIT_SHM_DIR")
    try:
        if dist.get_rank() == 1:
            os.environ["CPKIT_SHM_DIR"] = "/not/there"
        said = error_of(init_context_parallel, 4)
    finally:
        os.environ.pop("CPKIT_SHM_DIR", None)
        if before:
            os.environ["CPKIT_SHM_DIR"] = before
    assert said.startswith("rank(s) 1: CPKIT_SHM_DIR is '/not/there'"), said
    gather_works()
