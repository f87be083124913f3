"""Rows passed from rank to rank with signals only, on the CPU or on CUDA."""

from __future__ import annotations

import os
import time

import torch

from cpkit import provenance
from cpkit.group import CPGroup
from cpkit.layout import prepare_context_parallel_metadata
from cpkit.memory import posix as shm_backend
from cpkit.symm import put_signal, use_symmetric_memory, wait_signal
from cpkit.sync.barrier import BarrierTimeout
from tests.ranks.device import DEVICE, finish, pool_of, shard_rows, world_group
from tests.ranks.errors import error_of, raised

ROUNDS = min(300, int(os.environ.get("CPKIT_TEST_ROUNDS", "300")))


def pass_around(group: CPGroup, rounds: int, *, wait: bool = True) -> list[str]:
    """Store rows in the right neighbour's memory, read those of the left one; return what is wrong.

    One signal says that the buffer is full, a second one in the other direction that it is empty.
    """
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    metadata = prepare_context_parallel_metadata([group.size * 4], group.size, "contiguous")
    with use_symmetric_memory(group):
        inbox = torch.empty(4, 8, dtype=torch.float64, device=DEVICE)
    provenance.poison_(inbox)
    finish()
    group.barrier()
    there = pool_of(group).peer_view(inbox, right)
    seen = []
    for round in range(rounds):
        if group.rank == 0 and round % 50 == 7:
            time.sleep(0.003)
        there.copy_(shard_rows(metadata, group.rank, (8,), torch.float64, round=round))
        put_signal(group, right, DEVICE)
        early = inbox.clone()
        wait_signal(group, left, DEVICE)
        seen.append(inbox.clone() if wait else early)
        put_signal(group, left, DEVICE)
        wait_signal(group, right, DEVICE)
    finish()
    expected = (
        provenance.shard_rows(metadata, left, (8,), torch.float64, round=round)
        for round in range(rounds)
    )
    return [
        f"round {round}"
        for round, (got, want) in enumerate(zip(seen, expected, strict=True))
        if not torch.equal(got.cpu().view(torch.int64), want.view(torch.int64))
    ]


def check_rows_passed_around_are_never_stale() -> None:
    assert pass_around(world_group(), ROUNDS) == []


def check_a_row_read_before_its_signal_is_stale() -> None:
    """Negative control: the row is read before the wait."""
    group = world_group()
    wrong = pass_around(group, ROUNDS, wait=False)
    assert any(int(note) for note in group.exchange(str(len(wrong)).encode()))


def check_a_signal_blocks_until_the_previous_one_is_consumed() -> None:
    """Timed only on the CPU, where the host waits."""
    group = world_group()
    pool_of(group)
    group.barrier()
    if group.rank == 0:
        put_signal(group, 1, DEVICE)
        start = time.monotonic()
        put_signal(group, 1, DEVICE)
        waited_s = time.monotonic() - start
        assert DEVICE == "cuda" or waited_s > 0.04, waited_s
    if group.rank == 1:
        time.sleep(0.05)
        wait_signal(group, 0, DEVICE)
        wait_signal(group, 0, DEVICE)
    finish()
    group.barrier()


def check_the_device_may_be_omitted_if_there_is_only_one() -> None:
    group = world_group()
    pool_of(group)
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    put_signal(group, right)
    wait_signal(group, left)
    other = "cpu" if DEVICE == "cuda" else "cuda"
    assert f"symmetric memory on ['{DEVICE}']" in error_of(put_signal, group, right, other)


def check_a_peer_that_does_not_exist_is_an_error() -> None:
    group = world_group()
    for peer in (-1, group.size, "0", True):
        said = error_of(put_signal, group, peer, DEVICE)
        assert f"ranks 0 to {group.size - 1}" in said
        assert f"{peer!r}" in error_of(wait_signal, group, peer, DEVICE)


def check_z_a_missing_signal_is_named_after_the_deadline() -> None:
    """Only on the CPU, because torch's kernel would trap and destroy the CUDA context."""
    group = world_group()
    backend = pool_of(group).backend
    if group.rank == 0 and isinstance(backend, shm_backend.PosixBackend):
        os.environ["CPKIT_DEADLINE_S"] = "0.5"
        assert "for rank 1 to send a signal" in raised(
            BarrierTimeout, wait_signal, group, 1, DEVICE
        )
        del os.environ["CPKIT_DEADLINE_S"]
    group.barrier()
