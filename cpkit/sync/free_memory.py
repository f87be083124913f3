"""How much memory can still be used, and what limits it.

A segment in /dev/shm is memory too, and a container's limit is often far below the free space
there. A process that exceeds that limit is killed, so the limits are read before memory is used:

    file system   the free space of shm_dir(), for segments only
    cgroups       limit − usage + reclaimable file cache, at every level that this process sees
    machine       what can be used without swapping

Ranks that share a limit add up. A key identifies a limit on all ranks that it applies to.
"""

from __future__ import annotations

import errno
import os
import platform
import resource
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from cpkit.settings import shm_dir

_MIB, _GIB = 1 << 20, 1 << 30
_UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes "no limit" as a number just below 2^63
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")


class Limit(NamedTuple):
    """One limit of the memory: its identity, what is left of it, how to say so, and what to do."""

    key: str
    free_bytes: int
    words: str
    advice: str


def memory_limits(proc: Path = Path("/proc/self")) -> list[Limit]:
    """Return the limits of this process's memory: those of its cgroups, then the machine's."""
    return [*_cgroup_limits(proc), _machine_limit()]


def segment_limits() -> list[Limit]:
    """Return the limits of segments: the file system's, then those of memory if it is there."""
    file_system = _file_system_limit()
    return [*([file_system] if file_system else []), *(memory_limits() if _is_in_memory() else [])]


def tightest() -> Limit:
    """Return the limit of this process's memory with the fewest free bytes."""
    return min(memory_limits(), key=lambda limit: limit.free_bytes)


def shortage(ranks_by_limit: Mapping[str, int], shared: int, ordinary: int) -> str:
    """Return why memory does not fit; empty if it does.

    Each rank needs `shared` bytes in segments and `ordinary` bytes of its own. `ranks_by_limit` is
    how many ranks share each limit, by its key; a limit that is new since then applies to all ranks
    of this machine.
    """
    file_system = _file_system_limit() if shared else None
    if file_system and (problem := _exceeded(file_system, ranks_by_limit, shared)):
        return problem
    needed = ordinary + (shared if shared and _is_in_memory() else 0)
    limits = memory_limits() if needed else []
    return next(filter(None, (_exceeded(limit, ranks_by_limit, needed) for limit in limits)), "")


def explain_refusal(error: Exception) -> str:
    """Return why the system refused memory, and what to do; empty if that is not the error."""
    number = getattr(error, "errno", None)
    if number == errno.EFBIG:
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        return f"a file has at most {size(most)} here: raise the limit with ulimit -f"
    is_refusal = isinstance(error, MemoryError) or number == errno.ENOMEM
    if not is_refusal and "allocate memory" not in str(error):
        return ""
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most != resource.RLIM_INFINITY:
        return (
            f"the system refused the memory: the address space of this process is limited to "
            f"{size(most)}; raise the limit with ulimit -v, or gather less"
        )
    limit = tightest()
    return (
        f"the system refused the memory: {limit.words}. {limit.advice}; if that is enough, the "
        f"kernel's vm.overcommit_memory or vm.max_map_count is the limit"
    )


def explain_refusal_of(nbytes: int) -> str:
    """Return why this process cannot allocate so many bytes; empty if it can."""
    try:
        # numpy allocates, because inside `use_symmetric_memory` torch.empty allocates in a pool.
        np.empty(nbytes, dtype=np.uint8)
    except MemoryError as error:
        return f"{size(nbytes)} cannot be allocated: {explain_refusal(error)}"
    return ""


def size(nbytes: int) -> str:
    """Return a number of bytes for a message: `900.0 MiB (943718400 bytes)`."""
    short = f"{nbytes / _GIB:.1f} GiB" if nbytes >= 10 * _GIB else f"{nbytes / _MIB:.1f} MiB"
    return f"{short} ({nbytes} bytes)"


def _exceeded(limit: Limit, ranks_by_limit: Mapping[str, int], nbytes: int) -> str:
    ranks = ranks_by_limit.get(limit.key) or ranks_by_limit[_machine_key()]
    if nbytes * ranks <= limit.free_bytes:
        return ""
    return f"{limit.words}, and {ranks} rank(s) need {size(nbytes)} each. {limit.advice}"


# ------------------------------------------------------------------ file system, machine


def _file_system_limit() -> Limit | None:
    """Return the limit of `shm_dir()`; None where no file can be stored, as in /proc."""
    directory = shm_dir()
    try:
        stat, device = os.statvfs(directory), directory.stat().st_dev
    except OSError:
        return None  # making the segment explains it
    if not stat.f_blocks:
        return None
    free = stat.f_bavail * stat.f_frsize
    return Limit(
        f"{_machine()}/file system {device}",
        free,
        f"{directory} is too full: it has {size(free)} free",
        "Make it larger (docker run --shm-size), gather less, or set CPKIT_SHM_DIR to a larger "
        "tmpfs",
    )


def _is_in_memory() -> bool:
    """Return True unless `shm_dir()` is known to be on a disk."""
    try:
        device = shm_dir().stat().st_dev
        mounts = list(_mounts(Path("/proc/self")))
    except OSError:
        return True
    number = f"{os.major(device)}:{os.minor(device)}"
    types = {mount.type for mount in mounts if mount.device == number}
    return not types or bool(types.intersection(_IN_MEMORY))


def _machine_limit() -> Limit:
    available = int(psutil.virtual_memory().available)
    return Limit(
        _machine_key(),
        available,
        f"this machine has {size(available)} of memory available",
        "Gather less, or end other programs",
    )


def _machine_key() -> str:
    return f"{_machine()}/memory"


@cache
def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else platform.node()


# ------------------------------------------------------------------------------ cgroups


class _Mount(NamedTuple):
    """A line of /proc/self/mountinfo."""

    device: str
    root: str  # the directory of the file system that is mounted
    point: Path
    type: str
    options: str


class _Version(NamedTuple):
    """The names of a cgroup version's files, and of the reclaimable bytes in memory.stat."""

    limit: str
    usage: str
    reclaimable: tuple[str, ...]


# The lists of file pages do not contain shared memory, which is not reclaimable.
_VERSIONS = {
    "cgroup2": _Version("memory.max", "memory.current", ("inactive_file", "active_file")),
    "cgroup": _Version(
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}


def _cgroup_limits(proc: Path) -> Iterator[Limit]:
    """Yield the memory limits of this process's cgroups, the innermost first."""
    try:
        paths = _cgroup_paths(proc)
        mounts = [m for m in _mounts(proc) if m.type in paths and _has_memory(m)]
    except (OSError, ValueError):  # not Linux, or /proc is not there
        return
    for mount in mounts:
        for directory in _levels(mount, paths[mount.type]):
            try:
                limit = _cgroup_limit(directory, _VERSIONS[mount.type])
            except (OSError, ValueError):  # this level has no memory controller
                continue
            if limit:
                yield limit


def _cgroup_paths(proc: Path) -> dict[str, str]:
    """Return the path of this process's memory cgroup, by type of file system.

    `4:memory:/docker/3f` is of version 1, `0::/docker/3f` of version 2; a system can have both.
    """
    paths = {}
    for line in (proc / "cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            paths["cgroup"] = path
        elif number == "0" and not controllers:
            paths["cgroup2"] = path
    return paths


def _mounts(proc: Path) -> Iterator[_Mount]:
    for line in (proc / "mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        _, _, device, root, point, *_ = left.split()
        kind, _, options = right.split(" ", 2)
        yield _Mount(device, root, Path(point.replace("\\040", " ")), kind, options)


def _has_memory(mount: _Mount) -> bool:
    return mount.type == "cgroup2" or "memory" in mount.options.split(",")


def _levels(mount: _Mount, path: str) -> Iterator[Path]:
    """Yield the directories of a cgroup and of its parents, as far as they are mounted.

    In a cgroup namespace the path can lead out of the mount; the mount is then the only level.
    """
    root = mount.root.rstrip("/")
    below = path[len(root) :] if f"{path}/".startswith(f"{root}/") else ""
    directory = mount.point if ".." in below.split("/") else mount.point / below.strip("/")
    yield directory
    while directory != mount.point:
        directory = directory.parent
        yield directory


def _cgroup_limit(directory: Path, version: _Version) -> Limit | None:
    """Return the limit of one cgroup; None without one."""
    text = (directory / version.limit).read_text().strip()
    if text == "max" or int(text) >= _UNLIMITED_BYTES:
        return None
    most, used = int(text), int((directory / version.usage).read_text())
    stat = dict(line.split(" ", 1) for line in (directory / "memory.stat").read_text().splitlines())
    reclaimable = sum(int(stat.get(name, 0)) for name in version.reclaimable)
    free = max(0, most - used + min(reclaimable, used))
    where = directory.stat()
    return Limit(
        f"{_machine()}/cgroup {where.st_dev}:{where.st_ino}",
        free,
        f"the memory limit of this container is {size(most)} ({directory / version.limit}), of "
        f"which {size(free)} are free",
        "Raise it (docker run --memory, resources.limits.memory in Kubernetes, systemd's "
        "MemoryMax), gather less, or start fewer ranks",
    )
