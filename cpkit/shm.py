"""Memory that every rank of a machine can address: one file a rank, mapped by all its peers.

    rank 0                         rank 1 create A, reserve, map         create B, reserve, map
    ──────────────── exchange names and sizes ──────────────── map B                          map A
    ──────────────── exchange "mapped" ─────────────────────── unlink A                       unlink
    B        nothing has a name any more: a crash leaves nothing

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
import tempfile
from pathlib import Path

import msgspec

from cpkit.processes import ProcessId, process_id
from cpkit.rendezvous import Rendezvous

_PREFIX = "cpkit"


class SymmetricMemoryError(RuntimeError):
    """Symmetric memory could not be made, or ranks disagree about it. Raised on every rank."""


class _Offer(msgspec.Struct):
    """What a rank brings to the exchange: its file, or why it has none."""

    name: str
    nbytes: int
    problem: str = ""


def shm_dir() -> Path:
    """Where segments are made: `CPKIT_SHM_DIR`, else /dev/shm, else the temporary directory."""
    chosen = os.environ.get("CPKIT_SHM_DIR")
    if chosen:
        return Path(chosen)
    shared = Path("/dev/shm")
    return shared if shared.is_dir() else Path(tempfile.gettempdir())


def free_bytes() -> int:
    """Bytes that can still be reserved in `shm_dir()`."""
    stat = os.statvfs(shm_dir())
    return stat.f_bavail * stat.f_frsize


class Segment:
    """One allocation of `nbytes` on every rank; `maps[rank]` is that rank's memory, writable."""

    def __init__(self, maps: list[mmap.mmap], nbytes: int) -> None:
        self.maps, self.nbytes = maps, nbytes


def make_segment(rendezvous: Rendezvous, nbytes: int, purpose: str) -> Segment:
    """Make a segment together; collective over the ranks of the rendezvous.

    Raises SymmetricMemoryError on every rank when one of them has no room, or asks for another
    size, and RendezvousTimeout when one does not come.
    """
    path, own, problem = _create(nbytes, rendezvous.size)
    try:
        offers = _exchange(rendezvous, _Offer(path.name, nbytes, problem), purpose)
        _raise_for(offers, purpose)
        maps, problem = _map_peers(offers, rendezvous.rank, own, nbytes)
        _raise_for(_exchange(rendezvous, _Offer(path.name, nbytes, problem), purpose), purpose)
    finally:
        path.unlink(missing_ok=True)
    return Segment(maps, nbytes)


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
            _reserve(descriptor, nbytes)
            return path, _map(descriptor, nbytes), ""
        finally:
            os.close(descriptor)
    except OSError as error:
        return path, None, _in_words(error, nbytes, ranks)


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
    return mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED | populate)


def _map_peers(
    offers: list[_Offer], rank: int, own: mmap.mmap | None, nbytes: int
) -> tuple[list[mmap.mmap], str]:
    maps: list[mmap.mmap] = []
    try:
        for peer, offer in enumerate(offers):
            if peer == rank and own is not None:
                maps.append(own)
                continue
            descriptor = os.open(shm_dir() / offer.name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                maps.append(_map(descriptor, nbytes))
            finally:
                os.close(descriptor)
    except (OSError, ValueError) as error:
        return maps, f"cannot map rank {len(maps)}'s segment: {error}"
    return maps, ""


def _exchange(rendezvous: Rendezvous, offer: _Offer, purpose: str) -> list[_Offer]:
    answers = rendezvous.exchange(msgspec.msgpack.encode(offer), purpose)
    return [msgspec.msgpack.decode(answer, type=_Offer) for answer in answers]


def _raise_for(offers: list[_Offer], purpose: str) -> None:
    problems = [
        f"rank {rank}: {offer.problem}" for rank, offer in enumerate(offers) if offer.problem
    ]
    if problems:
        raise SymmetricMemoryError(f"cannot {purpose}. " + "; ".join(problems))
    if len({offer.nbytes for offer in offers}) > 1:
        sizes = ", ".join(f"rank {rank}: {offer.nbytes}" for rank, offer in enumerate(offers))
        raise SymmetricMemoryError(
            f"cannot {purpose}: ranks ask for different sizes ({sizes} bytes). Sizes in symmetric "
            f"memory must come from numbers that are equal on all ranks, such as max_rank_len."
        )


def _in_words(error: OSError, nbytes: int, ranks: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.ENOMEM):
        return (
            f"{shm_dir()} is full: it has {free_bytes()} bytes free, and {ranks} rank(s) need "
            f"{nbytes} bytes each. Make it larger (docker run --shm-size=2g), gather less, "
            f"or set CPKIT_SHM_DIR to a larger tmpfs"
        )
    return f"cannot create a segment in {shm_dir()}: {error}"
