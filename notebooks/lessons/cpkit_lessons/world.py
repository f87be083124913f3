"""The world of a notebook: how many ranks gather, and by how much its sizes must shrink to fit."""

from __future__ import annotations

from dataclasses import dataclass

from cpkit.control.results import StatusResult
from cpkit.sync.free_memory import segment_limits
from cpkit_lessons.capabilities import CPU, ONE_GPU, capabilities_of

CP_SIZES = (2, 4, 8)
# What the largest cells need of each rank: in shared memory, and by the limit of one request.
SHARED_BYTES, REQUEST_BYTES = 200_000_000, 480 << 20
_MOST_SHRINK = 64


@dataclass(frozen=True)
class World:
    """The ranks of each gather, their device, and the power of two that divides the usual sizes."""

    cp_size: int = 4
    shrink: int = 1
    on_gpu: bool = False
    shares_gpu: bool = False

    def of(self, usual: int) -> int:
        """Return the size that this world uses in place of a usual one."""
        return usual // self.shrink

    def requests_mb(self) -> tuple[float, list[float]]:
        """Return an arena and the requests to it, in MB, two of which are a new largest one.

        A spill adds at least 2 MiB, so smaller requests would not show the second spill.
        """
        shrink = min(self.shrink, 16)
        return 16 / shrink, [mb / shrink for mb in (2, 4, 8, 24, 4, 24, 48, 24, 48)]

    def sizes(self) -> list[int]:
        """Return five sizes of a sweep in bytes, from 16 KiB to 64 MiB, or less.

        A token has 2 KiB, and zigzag needs 2·cp tokens: 32 KiB on 8 ranks.
        """
        least = max(16, 4 * self.cp_size) << 10
        doublings = (self.of(64 << 20) // least).bit_length() - 1
        return [least << round(doublings * step / 4) for step in range(5)]

    def __str__(self) -> str:
        ranks = f"Each gather uses {self.cp_size} ranks: cp = {self.cp_size}."
        if self.shrink == 1:
            return ranks
        return (
            f"{ranks}\nLittle memory is free, so the sizes below are 1/{self.shrink} of the usual "
            f"ones: on the CPU, the usual ones need {self.cp_size * SHARED_BYTES / 1e6:.0f} MB of "
            f"shared memory (docker run --shm-size=2g)."
        )


def world_of(status: StatusResult) -> World:
    """Return the world of running workers. Raises ValueError if none of CP_SIZES is possible."""
    fitting = [size for size in CP_SIZES if size in status.cp_sizes]
    if not fitting:
        raise ValueError(
            f"the notebooks need groups of 2, 4 or 8 ranks, and {status.world_size} rank(s) can "
            f"form groups of {', '.join(map(str, status.cp_sizes))}: stop these workers with "
            f"`./launch_workers.sh stop --name {status.name}`, and start others with "
            f"`./launch_workers.sh --name {status.name} --nproc 4`"
        )
    cp_size, machine = fitting[-1], capabilities_of(status)
    limits = [limit.free_bytes for limit in segment_limits()] if machine is CPU else []
    shrink = shrink_to(cp_size, min(limits, default=None), status.memory_limit_bytes)
    return World(cp_size, shrink, machine is not CPU, machine is ONE_GPU)


def shrink_to(cp_size: int, shared_bytes: int | None, request_bytes: int) -> int:
    """Return the least power of two, up to 64, by which sizes must shrink to fit this memory.

    `shared_bytes` are free for segments (None: unknown), and a request may use `request_bytes`.
    """
    needs = [(cp_size * REQUEST_BYTES, request_bytes)]
    if shared_bytes is not None:
        needs.append((cp_size * SHARED_BYTES, shared_bytes))
    shrink = 1
    while shrink < _MOST_SHRINK and any(need > shrink * room for need, room in needs):
        shrink *= 2
    return shrink
