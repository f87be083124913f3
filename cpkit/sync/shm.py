"""Memory that every rank of a machine can address: one file a rank, mapped by all its peers.

    rank 0                      rank 1
    create A, reserve, map      create B, reserve, map
    ──────────── exchange names and sizes ────────────
    map B                       map A
    ──────────────── exchange "mapped" ───────────────
    unlink A                    unlink B                  no names any more: a crash leaves nothing

Large segments get huge pages where Linux (6.1 or newer) has some to give: stores into 4 KiB pages
of every peer miss the TLB all the time. Beside 4 KiB pages, in turns, plans of 2 ranks took 0.88
of the time at 4 MB and 0.70 to 0.77 at 8 to 134 MB.

A process that is killed before it can unlink leaves a file whose name says who made it; the next
one to make a segment removes it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import secrets
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch

from cpkit.processes import ProcessId, process_id
from cpkit.sync.exchange import StoreExchange
from cpkit.sync.offers import Offer, agree

_PREFIX = "cpkit"
_HUGE_PAGE_BYTES = 2 << 20
_COLLAPSE_FROM_BYTES = 64 << 20  # the default arena: a tenth of a second, once
_MADV_COLLAPSE = 25  # Python's mmap has no name for it


def shm_dir() -> Path:
    """Where segments are made: `CPKIT_SHM_DIR`, else /dev/shm, else the temporary directory."""
    chosen = os.environ.get("CPKIT_SHM_DIR")
    if chosen:
        return Path(chosen)
    shared = Path("/dev/shm")
    return shared if shared.is_dir() else Path(tempfile.gettempdir())


def shm_problem() -> str:
    """Why there can't be any segments; empty when there can."""
    if shm_dir().is_dir():
        return ""
    return f"CPKIT_SHM_DIR is {str(shm_dir())!r}; it must be a directory, best a tmpfs"


def free_bytes() -> int:
    """Bytes that can still be reserved in `shm_dir()`."""
    stat = os.statvfs(shm_dir())
    return stat.f_bavail * stat.f_frsize


class Segment:
    """One allocation of `nbytes` on every rank; `maps[rank]` is that rank's memory, writable."""

    def __init__(self, maps: list[mmap.mmap], nbytes: int, rank: int) -> None:
        self.maps, self.nbytes, self._rank = maps, nbytes, rank
        self.addresses = [self.view(r, 0, nbytes).data_ptr() for r in range(len(maps))]

    def view(self, rank: int, offset: int, nbytes: int) -> torch.Tensor:
        """Bytes of a rank's memory: uint8 `[nbytes]`."""
        return torch.frombuffer(self.maps[rank], dtype=torch.uint8, count=nbytes, offset=offset)

    def block(self, offset: int, nbytes: int, release: Callable[[], object]) -> torch.Tensor:
        """Own bytes, uint8 `[nbytes]`; calls `release` when the last tensor over them has gone."""
        # The tensor's storage keeps this view alive; when the view goes, the last tensor has gone.
        memory = memoryview(self.maps[self._rank])[offset : offset + nbytes]
        weakref.finalize(memory, release).atexit = False
        return torch.frombuffer(memory, dtype=torch.uint8)


def make_segment(rendezvous: StoreExchange, nbytes: int, purpose: str) -> Segment:
    """Make a segment together; collective over the ranks of the rendezvous.

    Raises SymmetricMemoryError on every rank when one of them has no room, or asks for another
    size, and ExchangeTimeout when one does not come.
    """
    path, own, problem = _create(nbytes, rendezvous.size)
    try:
        offers = agree(rendezvous, Offer(path.name, nbytes, problem), purpose)
        maps, problem = _map_peers(offers, rendezvous.rank, own, nbytes)
        agree(rendezvous, Offer(path.name, nbytes, problem), purpose)
    finally:
        path.unlink(missing_ok=True)
    return Segment(maps, nbytes, rendezvous.rank)


def reap_dead_files() -> list[Path]:
    """Remove segments whose maker is dead; returns them. Other users' files are not touched."""
    removed = []
    ours = re.compile(rf"{_PREFIX}-{os.getuid()}-(\d+)-(\d+)-[0-9a-f]{{16}}")
    for path in shm_dir().iterdir():
        made = ours.fullmatch(path.name)
        if made and not ProcessId(int(made[1]), int(made[2])).is_alive():
            with contextlib.suppress(OSError):  # somebody else's, or gone by now
                if path.lstat().st_uid == os.getuid():
                    path.unlink()
                    removed.append(path)
    return removed


def _create(nbytes: int, ranks: int) -> tuple[Path, mmap.mmap | None, str]:
    """Create, reserve and map this rank's file. Returns a problem instead of raising."""
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
        return path, None, _in_words(error, nbytes, ranks)


def _stored_bytes(nbytes: int) -> int:
    """What a segment takes in the file: large ones are whole huge pages."""
    if nbytes < _COLLAPSE_FROM_BYTES:
        return nbytes
    return -(-nbytes // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES


def _reserve(descriptor: int, nbytes: int) -> None:
    """Take the pages now: a full file system is an error here, a bus error at first touch."""
    if nbytes > free_bytes():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
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
    """Let the next map of this size begin where a huge page can, if it falls where a probe does.

    Maps go from high addresses to low ones, each into the first gap that holds it:

        │ … probe ────────────────│ used     ends anywhere, so it begins anywhere
        │ … the map ──────│ spacer│ used     begins at a multiple of 2 MiB

    """
    if nbytes >= _COLLAPSE_FROM_BYTES:
        with mmap.mmap(descriptor, nbytes) as probe:
            excess = _address(probe) % _HUGE_PAGE_BYTES
        if excess:
            spacers.enter_context(mmap.mmap(-1, excess))


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()


def _collapse(memory: mmap.mmap) -> None:
    """Gather the pages of a segment into huge ones; costs what copying them costs.

    MADV_COLLAPSE asks for this segment alone, whatever the machine's shmem_enabled says. It stays
    in small pages on older systems, where no huge pages are left, or where it lies askew.
    """
    if sys.platform == "linux" and len(memory) >= _COLLAPSE_FROM_BYTES:
        with contextlib.suppress(OSError):
            memory.madvise(_MADV_COLLAPSE)


def _map_peers(
    offers: list[Offer], rank: int, own: mmap.mmap | None, nbytes: int
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
    except (OSError, ValueError) as error:
        return maps, f"cannot map rank {len(maps)}'s segment: {error}"
    return maps, ""


def _in_words(error: OSError, nbytes: int, ranks: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.ENOMEM):
        return (
            f"{shm_dir()} is full: it has {free_bytes()} bytes free, and {ranks} rank(s) need "
            f"{nbytes} bytes each. Make it larger (docker run --shm-size=2g), gather less, "
            f"or set CPKIT_SHM_DIR to a larger tmpfs"
        )
    if error.errno == errno.EMFILE:
        return f"too many open files: each segment takes {ranks}; raise the limit (ulimit -n)"
    return f"cannot create a segment in {shm_dir()}: {error}"
