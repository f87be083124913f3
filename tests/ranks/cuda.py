"""Checks of symmetric memory and gathers that exist only on CUDA.

Rounds are stamped on the GPU: adding `1 << 52` to every word of a row advances it to the next round
(cpkit.provenance). So a thousand rounds run back to back without the host.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import torch

from cpkit import provenance
from cpkit.gather import ALGORITHMS, all_gather_kv, last_path
from cpkit.group import CPGroup
from cpkit.kernels import launch as cuda_launch
from cpkit.layout import STRATEGIES, ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.plan import plan_gather_kv
from cpkit.symm import explain_path, symmetric_pool, use_symmetric_memory
from cpkit.sync.barrier import BarrierTimeout
from tests.ranks.device import OWN_GPU, path_by_table, world_group
from tests.ranks.errors import error_of, raised

ROUNDS = int(os.environ.get("CPKIT_TEST_ROUNDS", "1000"))
MIB = 1 << 20
NEXT_ROUND = 1 << 52


class Rounds:
    """Rows that advance one round per `tick`, and the number of wrong words so far."""

    def __init__(self, group: CPGroup, metadata: ContextParallelMetadata) -> None:
        self.metadata = metadata
        shape, dtype = (4, 16), torch.float32
        self.mine = provenance.shard_rows(metadata, group.rank, shape, dtype, round=0).cuda()
        self.want = provenance.expected_rows(metadata, shape, dtype, round=0).cuda()
        self.wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def tick(self) -> None:
        self.mine.view(torch.int64).add_(NEXT_ROUND)
        self.want.view(torch.int64).add_(NEXT_ROUND)

    def judge(self, got: torch.Tensor) -> None:
        self.wrong += (got.view(torch.int64) != self.want.view(torch.int64)).sum()


def rounds_of(
    *lengths: int, strategy: str = "zigzag"
) -> tuple[CPGroup, ContextParallelMetadata, Rounds]:
    """Return the group of all ranks, a layout over it, and rounds of its rows."""
    group = world_group()
    metadata = prepare_context_parallel_metadata(lengths, group.size, strategy)
    return group, metadata, Rounds(group, metadata)


def wrong_words(rounds: Rounds, group: CPGroup) -> int:
    """Wait for the GPU; return the number of wrong words over all ranks."""
    torch.cuda.synchronize()
    symmetric_pool(group, "cuda").backend.check()
    return sum(int(note) for note in group.exchange(str(int(rounds.wrong)).encode()))


def captured(call: Callable[[], list[torch.Tensor]]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Return a graph of the call, and the tensor that its replays fill."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (result,) = call()
    return graph, result


def check_a_thousand_rounds_back_to_back_eager() -> None:
    for algorithm in ALGORITHMS:
        group, metadata, rounds = rounds_of(97, 64)
        for _ in range(ROUNDS):
            rounds.tick()
            (got,) = all_gather_kv([rounds.mine], metadata, group, algorithm=algorithm)
            rounds.judge(got)
            del got
        assert wrong_words(rounds, group) == 0, algorithm


def check_a_thousand_rounds_back_to_back_captured() -> None:
    for algorithm in ALGORITHMS:
        group, metadata, rounds = rounds_of(97, 64)
        gather = partial(all_gather_kv, [rounds.mine], metadata, group, algorithm=algorithm)
        graph, result = captured(gather)
        for _ in range(ROUNDS):
            rounds.tick()
            graph.replay()
            rounds.judge(result)
        assert wrong_words(rounds, group) == 0, algorithm


def check_captured_gathers_of_every_strategy_into_a_cache() -> None:
    for strategy in STRATEGIES:
        group, metadata, rounds = rounds_of(97, 64, strategy=strategy)
        slots = torch.randperm(161, generator=torch.Generator().manual_seed(1)).cuda()
        with use_symmetric_memory(group):
            dense = torch.empty(161, 4, 16, device="cuda")
            whole = provenance.poison_(torch.empty(161, 6, 16, device="cuda"))
        for cache, where in ((dense, slots), (whole[:, 1:5], slots.int())):
            gather = partial(
                all_gather_kv, [rounds.mine], metadata, group, into=[cache], slots=where
            )
            graph, result = captured(gather)
            for _ in range(50):
                rounds.tick()
                graph.replay()
                rounds.judge(result[slots].contiguous())
            assert wrong_words(rounds, group) == 0, strategy
        untouched = whole[:, [0, 5]].contiguous().view(torch.uint8)
        assert (untouched == provenance.POISON_BYTE).all()


def check_plans_back_to_back() -> None:
    group, metadata, rounds = rounds_of(97, 64)
    plan = plan_gather_kv([rounds.mine], metadata, group)
    for _ in range(ROUNDS):
        rounds.tick()
        rounds.judge(plan()[0])
    assert wrong_words(rounds, group) == 0


def check_without_exit_synchronization_the_rounds_are_wrong() -> None:
    """Negative control: rank 0 is late, and its peers do not wait for it."""
    group, metadata, rounds = rounds_of(97, 64)
    real = cuda_launch.SYNC
    all_gather_kv([rounds.mine], metadata, group)
    try:
        cuda_launch.SYNC = False
        for _ in range(20):
            rounds.tick()
            if group.rank == 0:
                torch.cuda._sleep(2_000_000)  # about a millisecond
            (got,) = all_gather_kv([rounds.mine], metadata, group)
            rounds.judge(got)
            del got
    finally:
        cuda_launch.SYNC = real
    assert wrong_words(rounds, group) > 0


def check_other_streams_are_waited_for() -> None:
    group, metadata, rounds = rounds_of(97, 64)
    side = torch.cuda.Stream()
    for _ in range(30):
        torch.cuda._sleep(200_000)
        rounds.tick()
        (got,) = all_gather_kv([rounds.mine], metadata, group, stream=side)
        torch.cuda.current_stream().wait_stream(side)
        rounds.judge(got)
        del got
    assert wrong_words(rounds, group) == 0


def check_capture_before_the_first_run_is_an_error_on_every_rank() -> None:
    group = world_group()
    metadata = prepare_context_parallel_metadata([333], group.size)
    rows = torch.zeros(metadata.per_rank_actual_token[group.rank], 8, device="cuda")
    symmetric_pool(group, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        said = error_of(all_gather_kv, [rows], metadata, group)
        rows.add_(1)  # an empty graph is a warning
    assert "run it once" in said


def gather_works(group: CPGroup) -> None:
    group, metadata, rounds = rounds_of(64)
    (got,) = all_gather_kv([rounds.mine], metadata, group)
    rounds.judge(got)
    assert wrong_words(rounds, group) == 0


def check_offsets_and_addresses_of_peers() -> None:
    group = world_group()
    pool = symmetric_pool(group, "cuda")
    with use_symmetric_memory(group):
        inbox = torch.zeros(group.size, 5, dtype=torch.int64, device="cuda")
        on_the_host = torch.zeros(3)
    assert on_the_host.device.type == "cpu"
    torch.cuda.synchronize()
    group.barrier()
    for peer in range(group.size):
        pool.peer_view(inbox, peer)[group.rank] = 100 * group.rank + peer
    pool.backend.leave()
    assert inbox[:, 0].tolist() == [100 * sender + group.rank for sender in range(group.size)]
    assert len(set(group.exchange(repr(pool.locate(inbox)).encode()))) == 1


def check_the_predicted_path_is_the_reported_one() -> None:
    group = world_group()
    rank = float(group.rank)
    with use_symmetric_memory(group):
        symm_send = torch.full((4, 4), rank, device="cuda")
        symm_recv = torch.empty(4 * group.size, 4, device="cuda")
    send = torch.full((4, 4), rank, device="cuda")
    recv = torch.empty(4 * group.size, 4, device="cuda")
    # Peers read from a symmetric send buffer only if cpkit and not NCCL moves the rows.
    staged = "fallback" if OWN_GPU else "staged"
    for source, target, path, by_nccl in (
        (symm_send, symm_recv, path_by_table("padded_symm"), "symmetric"),
        (send, symm_recv, path_by_table("padded_symm_recv"), "fallback"),
        (symm_send, recv, staged, "fallback"),
        (send, recv, "fallback", "fallback"),
    ):
        target.fill_(-1)
        report = explain_path(source, target, group)
        group.cp_all_gather_into_tensor_async(target, source)
        assert target[:, 1].tolist() == [float(r) for r in range(group.size) for _ in range(4)]
        assert report.path == path
        assert last_path(group) == report
        assert explain_path(source, target, group, transport="nccl 2.28.9").path == by_nccl
    late = explain_path(send, symm_recv, group, transport="nccl 2.29.7")
    assert late.path == "symmetric"


def check_large_shards_fit_on_the_gpu_with_all_ranks() -> None:
    """Launch as many blocks as fit, in both launch shapes, for rows of wide and of narrow units.

    Blocks that do not fit on the GPU together would wait at the entry forever.
    """
    group = world_group()
    for own_bytes in (2 << 20, 5 << 20):
        for row_bytes in (1024, 132, 165):
            tokens = group.size * own_bytes // row_bytes
            metadata = prepare_context_parallel_metadata([tokens], group.size)
            shape = (row_bytes,)
            rows = provenance.shard_rows(metadata, group.rank, shape, torch.uint8, round=7).cuda()
            (got,) = all_gather_kv([rows], metadata, group)
            provenance.check(got, metadata, round=7)
            del got
            with use_symmetric_memory(group):
                cache = torch.empty(tokens, row_bytes, dtype=torch.uint8, device="cuda")
            slots = torch.arange(tokens, device="cuda")
            all_gather_kv([rows], metadata, group, into=[cache], slots=slots)
            provenance.check(cache, metadata, round=7)
            del cache


def check_different_devices_are_an_error_on_all_ranks() -> None:
    group = world_group()
    metadata = prepare_context_parallel_metadata([64], group.size)
    rows = torch.zeros(metadata.per_rank_actual_token[group.rank], 8)
    first = group.rank == 0
    said = error_of(all_gather_kv, [rows if first else rows.cuda()], metadata, group)
    assert "float32 cpu" in said
    assert "float32 cuda" in said
    assert "one device" in error_of(all_gather_kv, [rows, rows.cuda()], metadata, group)
    gather_works(group)


def check_z_a_rank_that_does_not_replay_in_time_is_named() -> None:
    """This check is the last one, because the ranks of the group no longer agree after it.

    The late rank must not treat rows as received that no peer has sent.
    """
    group, metadata, rounds = rounds_of(97, 64)
    os.environ["CPKIT_DEADLINE_S"] = "2"
    try:
        graph, result = captured(lambda: all_gather_kv([rounds.mine], metadata, group))
    finally:
        del os.environ["CPKIT_DEADLINE_S"]
    result.fill_(-1)
    torch.cuda.synchronize()
    group.barrier()
    if group.rank != 1:
        start = time.monotonic()
        graph.replay()
        graph.replay()
        torch.cuda.synchronize()
        assert time.monotonic() - start < 20
    group.barrier()
    assert (result == -1).all(), "rows of a rank that had timed out"
    if group.rank == 1:
        graph.replay()
        graph.replay()
        torch.cuda.synchronize()
    said = raised(BarrierTimeout, symmetric_pool(group, "cuda").backend.check)
    last_of_the_others = group.size - 1 if group.size > 2 else 0
    late = last_of_the_others if group.rank == 1 else 1
    assert f"for rank {late}, which did not launch its gather" in said, said
