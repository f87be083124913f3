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

A process that is killed before it can unlink leaves its file. The owner of a file holds a lock on
it (flock), which ends with the owner, so the next process that makes a segment removes the files
that it can lock. A process id would not do: the ranks may be in containers, each with its own ids.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import math
import mmap
import os
import re
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cpkit.os_errors import (
    SPARE_DESCRIPTORS,
    describe,
    lacks_descriptors,
    require_descriptors,
)
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
        self._memory = _memory_type(nbytes)

    def view(self, rank: int, offset: int, nbytes: int) -> torch.Tensor:
        """Return bytes of a rank's memory: uint8 `[nbytes]`."""
        return torch.frombuffer(self.maps[rank], dtype=torch.uint8, count=nbytes, offset=offset)

    def block(
        self,
        offset: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        release: Callable[[], object],
    ) -> torch.Tensor:
        """Return own memory; `release` is called when the last tensor over it is dropped."""
        # The tensor's storage keeps this object alive until the last tensor over it is dropped.
        memory = self._memory.from_buffer(self.maps[self._rank])
        memory.release = release
        items = math.prod(shape)
        return torch.frombuffer(memory, dtype=dtype, count=items, offset=offset).view(shape)


def _memory_type(nbytes: int) -> Any:
    """Return a type of memory that calls its `release`, an attribute, when it is dropped."""
    return type("Memory", (ctypes.c_char * nbytes,), {"__del__": lambda self: self.release()})


def make_segment(exchange: StoreExchange, nbytes: int, purpose: str) -> Segment:
    """Make a segment on every rank; collective over the ranks of the exchange.

    Raises SymmetricMemoryError on every rank when one of them has no room or sizes differ, and
    ExchangeTimeout when a rank does not arrive. All ranks check their room before any of them
    reserves memory, because a process that exceeds the limit of its container is killed.
    """
    agree_on_segment(exchange, SegmentOffer("", nbytes, _shortage(exchange, nbytes)), purpose)
    path, own, problem = _create(nbytes, exchange.size)
    name, opened = path.name if path else "", [own] if own else []
    try:
        offers = agree_on_segment(exchange, SegmentOffer(name, nbytes, problem), purpose)
        maps, problem = _map_peers(offers, exchange.rank, own, nbytes)
        opened += maps
        agree_on_segment(exchange, SegmentOffer(name, nbytes, problem), purpose)
    except BaseException:
        for memory in opened:
            memory.close()  # now, because a traceback may keep them and their descriptors
        raise
    finally:
        if path:
            path.unlink(missing_ok=True)
    return Segment(maps, nbytes, exchange.rank)


def _shortage(exchange: StoreExchange, nbytes: int) -> str:
    page_tables = nbytes * exchange.size // 512  # 8 bytes per 4 KiB of every rank's segment
    try:
        return shortage(exchange.ranks_by_limit, nbytes, page_tables)
    except OSError as error:  # no descriptor is free to read the limits
        return describe(error)


def reap_dead_files() -> list[Path]:
    """Remove this user's segment files whose owner has ended; return their paths."""
    ours = re.compile(rf"{_PREFIX}-{os.getuid()}-\d+-[0-9a-f]{{16}}")
    found = [path for path in shm_dir().iterdir() if ours.fullmatch(path.name)]
    return [path for path in found if _remove_unlocked(path)]


def _remove_unlocked(path: Path) -> bool:
    """Remove a file of this user whose owner does not hold its lock; return whether it did."""
    with contextlib.suppress(OSError):  # locked, of another user, or removed meanwhile
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_uid == os.getuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                return True
        finally:
            os.close(descriptor)
    return False


def _create(nbytes: int, ranks: int) -> tuple[Path | None, mmap.mmap | None, str]:
    """Create, reserve and map this rank's file; return its path, its map, and why that failed.

    The map has a duplicate of the descriptor, so the file stays locked as long as the map exists.
    """
    try:
        require_descriptors(ranks + SPARE_DESCRIPTORS)
        reap_dead_files()
        path, descriptor = _create_locked()
        try:
            _reserve(descriptor, _stored_bytes(nbytes))
            own = _map(descriptor, _stored_bytes(nbytes))
            _collapse(own)
            return path, own, ""
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        return None, None, _explain(error, nbytes, ranks)
    except Exception as error:  # noqa: BLE001 - the peers wait to learn what it is
        return None, None, f"cannot create a segment in {shm_dir()}: {_reason(error)}"


def _reason(error: Exception) -> str:
    return explain_refusal(error) or describe(error)


def _create_locked() -> tuple[Path, int]:
    """Create a file and lock it; return its path and its descriptor.

    A peer that removes dead files may lock the file before its owner does. Then there is another:

        owner   create A ─────────────────── cannot lock A, or it has no name ─── create B, lock B
        peer              lock A, unlink A
    """
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        # The process id in the name only informs people.
        path = shm_dir() / f"{_PREFIX}-{os.getuid()}-{os.getpid()}-{secrets.token_hex(8)}"
        descriptor = os.open(path, flags, 0o600)
        if _lock(descriptor) and os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _lock(descriptor: int) -> bool:
    """Lock a file without waiting; return False when another process holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # this file system has no locks, so no peer can lock the file and remove it
    return True


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
        return maps, f"cannot map rank {len(maps)}'s segment: {_reason(error)}"
    return maps, ""


def _explain(error: OSError, nbytes: int, ranks: int) -> str:
    if error.errno == errno.ENOSPC:
        needed_gib = ranks * nbytes // 2**30 + 1
        return (
            f"{shm_dir()} is too full: {ranks} rank(s) need {size(nbytes)} each. Make it larger "
            f"(docker run --shm-size={needed_gib}g), gather less, or set CPKIT_SHM_DIR to a larger "
            f"tmpfs"
        )
    if lacks_descriptors(error):
        spare = SPARE_DESCRIPTORS
        return f"{describe(error)}. Each segment takes {ranks} and leaves {spare} for other uses"
    refusal = explain_refusal(error)
    if refusal:
        return f"cannot create a segment of {size(nbytes)}: {refusal}"
    return f"cannot create a segment in {shm_dir()}: {error}"
