"""Gathers with one planted bug each. The provenance check must detect all of them.

Each `check_*` plants a bug and passes if at least one rank detects a wrong row.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from cpkit import gather, provenance
from cpkit.gather import all_gather_kv
from cpkit.layout import prepare_context_parallel_metadata
from cpkit.memory import posix
from cpkit.memory.posix import PosixBackend
from cpkit.symm import symmetric_pool
from cpkit.sync.barrier import PLAIN, ShmBarrier
from tests.ranks.device import world_group


@contextmanager
def planted(owner: object, name: str, bug: Any) -> Iterator[Any]:
    """Replace a function by a broken one, which receives the original as its first argument."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: bug(original, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, original)


def complaints(algorithm: str) -> list[str]:
    """Return the mismatch, or "", that each rank finds in two gathers by this algorithm."""
    group = world_group()
    metadata = prepare_context_parallel_metadata([40, 33], group.size)
    said = ""
    for round in (1, 2):
        rows = provenance.shard_rows(metadata, group.rank, (8,), torch.float32, round=round)
        symmetric_pool(group).poison_free()
        group.barrier()
        (got,) = all_gather_kv([rows], metadata, group, algorithm=algorithm)
        said = said or provenance.explain_mismatch(got, metadata, round=round) or ""
        group.exchange(b"checked")
    return [note.decode() for note in group.exchange(said[:500].encode())]


def expect(algorithm: str, words: str) -> None:
    said = complaints(algorithm)
    assert any(words in each for each in said), f"no rank reported {words!r}: {said}"


def check_control_without_a_bug_no_rank_reports_one() -> None:
    for algorithm in ("direct", "padded", "padded_symm", "padded_symm_recv"):
        assert not any(complaints(algorithm))


def check_a_peer_that_is_skipped() -> None:
    def last_is_me(real: Any, pool: Any, tensor: torch.Tensor) -> list[int]:
        addresses: list[int] = real(pool, tensor)
        return [*addresses[:-1], addresses[pool.group.rank]]

    pool_class = type(symmetric_pool(world_group()))
    with planted(pool_class, "peer_addresses", last_is_me):
        expect("direct", "poison (never written)")


def check_a_peer_that_a_repeated_call_skips() -> None:
    """The first call is right, and the second one stores to itself instead of its last peer."""

    def last_is_me(real: Any, tiles: Any, peers: list[int], *args: Any) -> Any:
        return real(tiles, [*peers[:-1], peers[0]], *args)

    symmetric_pool(world_group()).repeated.clear()
    with planted(posix, "_push_dense", last_is_me):
        expect("direct", "expected round 2" if dist.get_world_size() > 1 else "")
    symmetric_pool(world_group()).repeated.clear()


def check_a_repeated_call_with_the_shape_of_another() -> None:
    """It takes the outputs and the place of the rows of a gather with other lengths."""

    def first(real: Any, *arguments: Any) -> Any:
        found = real(*arguments)
        return found and next(iter(group.pools["cpu"].repeated.values()))

    group = world_group()
    symmetric_pool(group).repeated.clear()
    other = prepare_context_parallel_metadata([33, 40], group.size)
    rows = provenance.shard_rows(other, group.rank, (8,), torch.float32, round=1)
    all_gather_kv([rows], other, group)
    with planted(gather, "find_repeated", first):
        expect("direct", "expected round 2")


def check_rows_stored_one_place_off() -> None:
    def shifted(real: Any, backend: Any, peers: Any, rows: list[torch.Tensor], *args: Any) -> Any:
        return real(backend, peers, [x.roll(1, 0) for x in rows], *args)

    with planted(PosixBackend, "push", shifted):
        expect("direct", "expected round 1, rank")


def check_no_barrier_after_the_wire() -> None:
    """Rank 0 stores late, so a rank that does not wait reads the old content."""

    def late(real: Any, *args: Any) -> Any:
        if dist.get_rank() == 0:
            time.sleep(0.2)
        return real(*args)

    def no_wait(real: Any, barrier: ShmBarrier, call: int = PLAIN) -> None:
        if call != PLAIN:  # the agreements still wait
            real(barrier, call)

    group = world_group()
    symmetric_pool(group).poison_free()
    metadata = prepare_context_parallel_metadata([40], group.size)
    rows = provenance.shard_rows(metadata, group.rank, (8,), torch.float32, round=1)
    with planted(PosixBackend, "push", late), planted(ShmBarrier, "barrier", no_wait):
        group.exchange(b"poisoned")
        (got,) = all_gather_kv([rows], metadata, group)
        said = provenance.explain_mismatch(got, metadata, round=1) or ""
    everybody = [note.decode() for note in group.exchange(said.encode())]
    assert any("poison (never written)" in each for each in everybody), everybody


def check_no_reorder() -> None:
    with planted(gather, "reorder_tokens", lambda real, rank_order, metadata: rank_order):
        expect("padded", "expected")


def check_the_wrong_end_stripped() -> None:
    def tail(real: Any, gathered: torch.Tensor, rows: list[int]) -> torch.Tensor:
        chunks = gathered.chunk(len(rows))
        return torch.cat([c[len(c) - n :] for c, n in zip(chunks, rows, strict=True)])

    with planted(gather, "strip_padding", tail):
        expect("padded", "token 1, lane 0, tensor 0; expected round 1, rank 0, sequence 0, token 0")


def check_a_result_of_the_previous_round() -> None:
    """The second round returns the result of the first one."""
    kept: list[list[torch.Tensor]] = []

    def first_again(real: Any, outputs: list[torch.Tensor], *args: Any) -> list[torch.Tensor]:
        kept.append([x.clone() for x in outputs])
        return real(kept[0], *args)  # type: ignore[no-any-return]

    with planted(gather, "_strip_and_reorder", first_again):
        expect("padded_symm", "holds round 1")


def check_a_barrier_that_does_not_wait() -> None:
    """ShmBarrier.barrier is broken, so ranks read the records of an exchange before they exist."""

    def through(real: Any, barrier: ShmBarrier, call: int) -> None:
        barrier._round += 1

    group = world_group()
    if group.rank == 0:
        time.sleep(0.2)
    with planted(ShmBarrier, "barrier", through):
        notes = group.exchange(b"here %d" % group.rank)
    wrong = notes != [b"here %d" % rank for rank in range(group.size)]
    found = torch.tensor(int(wrong))
    dist.all_reduce(found)
    assert found
