"""Memory that every rank of a machine can address: one file per rank, mapped by all its peers.

    rank 0                      rank 1
    ─────── exchange whether all segments fit ────────
    create A, reserve, map      create B, reserve, map
    ──────────── exchange names and sizes ────────────
    map B                       map A
    ──────────────── exchange "mapped" ───────────────
    unlink A                    unlink B                  no names remain: a crash leaves nothing

Large segments get huge pages where Linux (6.1 or newer) has free ones, because stores into 4 KiB
pages of every peer miss the TLB constantly. In runs that alternated between both page sizes, plans
of 2 ranks took 0.88 of the time at 4 MB and 0.70 to 0.77 at 8 to 134 MB.

A process that is killed before it can unlink leaves a file whose name identifies that process; the
next process that makes a segment removes it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import secrets
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

from cpkit.processes import ProcessId, process_id
from cpkit.settings import shm_dir
from cpkit.sync.exchange import SegmentOffer, StoreExchange, agree_on_segment
from cpkit.sync.free_memory import explain_refusal, segment_limits, shortage, size

_PREFIX = "cpkit"
_HUGE_PAGE_BYTES = 2 << 20
_COLLAPSE_FROM_BYTES = 64 << 20  # the default arena; collapsing it takes 0.1 s, once
_MADV_COLLAPSE = 25  # Python's mmap has no name for it


def free_bytes() -> int:
    """Return the memory that segments can still use, all ranks together."""
    return min((limit.free_bytes for limit in segment_limits()), default=0)


class Segment:
    """One allocation of `nbytes` on every rank; `maps[rank]` is that rank's memory, writable."""

    def __init__(self, maps: list[mmap.mmap], nbytes: int, rank: int) -> None:
        self.maps, self.nbytes, self._rank = maps, nbytes, rank
        self.addresses = [self.view(r, 0, nbytes).data_ptr() for r in range(len(maps))]

    def view(self, rank: int, offset: int, nbytes: int) -> torch.Tensor:
        """Return bytes of a rank's memory: uint8 `[nbytes]`."""
        return torch.frombuffer(self.maps[rank], dtype=torch.uint8, count=nbytes, offset=offset)

    def block(self, offset: int, nbytes: int, release: Callable[[], object]) -> torch.Tensor:
        """Return own bytes, uint8 `[nbytes]`; `release` runs once no tensor uses them any more."""
        # The tensor's storage keeps this view alive until the last tensor over it is dropped.
        memory = memoryview(self.maps[self._rank])[offset : offset + nbytes]
        weakref.finalize(memory, release).atexit = False
        return torch.frombuffer(memory, dtype=torch.uint8)


def make_segment(exchange: StoreExchange, nbytes: int, purpose: str) -> Segment:
    """Make a segment on every rank; collective over the ranks of the exchange.

    Raises SymmetricMemoryError on every rank when one of them has no room or sizes differ, and
    ExchangeTimeout when a rank does not arrive. All ranks check their room before any of them
    reserves memory, because a process that exceeds the limit of its container is killed.
    """
    page_tables = nbytes * exchange.size // 512  # 8 bytes per 4 KiB of every rank's segment
    problem = shortage(exchange.ranks_by_limit, nbytes, page_tables)
    agree_on_segment(exchange, SegmentOffer("", nbytes, problem), purpose)
    path, own, problem = _create(nbytes, exchange.size)
    try:
        offers = agree_on_segment(exchange, SegmentOffer(path.name, nbytes, problem), purpose)
        maps, problem = _map_peers(offers, exchange.rank, own, nbytes)
        agree_on_segment(exchange, SegmentOffer(path.name, nbytes, problem), purpose)
    finally:
        path.unlink(missing_ok=True)
    return Segment(maps, nbytes, exchange.rank)


def reap_dead_files() -> list[Path]:
    """Remove this user's segment files whose process is dead; return their paths."""
    removed = []
    ours = re.compile(rf"{_PREFIX}-{os.getuid()}-(\d+)-(\d+)-[0-9a-f]{{16}}")
    for path in shm_dir().iterdir():
        made = ours.fullmatch(path.name)
        if made and not ProcessId(int(made[1]), int(made[2])).is_alive():
            with contextlib.suppress(OSError):  # of another user, or removed meanwhile
                if path.lstat().st_uid == os.getuid():
                    path.unlink()
                    removed.append(path)
    return removed


def _create(nbytes: int, ranks: int) -> tuple[Path, mmap.mmap | None, str]:
    """Create, reserve and map this rank's file; return its path, its map, and why that failed."""
    me = process_id()
    name = f"{_PREFIX}-{os.getuid()}-{me.pid}-{me.start_ticks}-{secrets.token_hex(8)}"
    path = shm_dir() / name
    try:
        reap_dead_files()
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            _reserve(descriptor, _stored_bytes(nbytes))
            own = _map(descriptor, _stored_bytes(nbytes))
            _collapse(own)
            return path, own, ""
        finally:
            os.close(descriptor)
    except OSError as error:
        return path, None, _explain(error, nbytes, ranks)
    except Exception as error:  # noqa: BLE001 - the peers wait to learn what it is
        reason = explain_refusal(error) or f"{type(error).__name__}: {error}"
        return path, None, f"cannot create a segment in {shm_dir()}: {reason}"


def _stored_bytes(nbytes: int) -> int:
    """Return the bytes of the file: large ones are whole huge pages."""
    if nbytes < _COLLAPSE_FROM_BYTES:
        return nbytes
    return -(-nbytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES


def _reserve(descriptor: int, nbytes: int) -> None:
    """Reserve the pages now, so that a full file system is an error here, not a bus error later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, nbytes)
    else:
        os.ftruncate(descriptor, nbytes)


def _map(descriptor: int, nbytes: int) -> mmap.mmap:
    populate = getattr(mmap, "MAP_POPULATE", 0)
    with contextlib.ExitStack() as spacers:
        _align(spacers, descriptor, nbytes)
        return mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED | populate)


def _align(spacers: contextlib.ExitStack, descriptor: int, nbytes: int) -> None:
    """Align the next map of this size to a huge page, by a spacer above it.

    Linux places maps from high addresses to low ones, each in the first gap that holds it:

        │ … probe ────────────────│ used     starts at any address
        │ … the map ──────│ spacer│ used     starts at a multiple of 2 MiB

    """
    if nbytes >= _COLLAPSE_FROM_BYTES:
        with mmap.mmap(descriptor, nbytes) as probe:
            excess = _address(probe) % _HUGE_PAGE_BYTES
        if excess:
            spacers.enter_context(mmap.mmap(-1, excess))


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()


def _collapse(memory: mmap.mmap) -> None:
    """Collapse the pages of a segment into huge ones, at the cost of copying them.

    MADV_COLLAPSE applies to this segment alone, whatever the machine's shmem_enabled is. The pages
    stay small on older systems, where no huge page is free, or where the map is not aligned.
    """
    if sys.platform == "linux" and len(memory) >= _COLLAPSE_FROM_BYTES:
        with contextlib.suppress(OSError):
            memory.madvise(_MADV_COLLAPSE)


def _map_peers(
    offers: list[SegmentOffer], rank: int, own: mmap.mmap | None, nbytes: int
) -> tuple[list[mmap.mmap], str]:
    maps: list[mmap.mmap] = []
    try:
        for peer, offer in enumerate(offers):
            if peer == rank and own is not None:
                maps.append(own)
                continue
            descriptor = os.open(shm_dir() / offer.name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                maps.append(_map(descriptor, _stored_bytes(nbytes)))
            finally:
                os.close(descriptor)
    except Exception as error:  # noqa: BLE001 - the peers wait to learn what it is
        reason = explain_refusal(error) or f"{type(error).__name__}: {error}"
        return maps, f"cannot map rank {len(maps)}'s segment: {reason}"
    return maps, ""


def _explain(error: OSError, nbytes: int, ranks: int) -> str:
    if error.errno == errno.ENOSPC:
        return (
            f"{shm_dir()} is full: {ranks} rank(s) need {size(nbytes)} each. Make it larger "
            f"(docker run --shm-size=2g), gather less, or set CPKIT_SHM_DIR to a larger tmpfs"
        )
    refusal = explain_refusal(error)
    if refusal:
        return f"cannot create a segment of {size(nbytes)}: {refusal}"
    if error.errno == errno.EMFILE:
        return f"too many open files: each segment takes {ranks}; raise the limit (ulimit -n)"
    return f"cannot create a segment in {shm_dir()}: {error}"
