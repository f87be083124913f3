"""Published times from other machines, with their source. Never mixed with measured times."""

from __future__ import annotations

from dataclasses import dataclass

from cpkit_lessons.cost_presets import RING_AND_SYMMETRIC_US


@dataclass(frozen=True)
class Comparison:
    """Times of one collective by total bytes: NCCL's ring, and its symmetric kernels.

    A time is the minimum over the ranks of the kernel's time on the GPU, without waiting for a late
    rank. `speedups` are those of the source, which divided before it rounded.
    """

    source: str
    machine: str
    sizes_bytes: tuple[int, ...]
    ring_us: tuple[float, ...]
    symmetric_us: tuple[float, ...]
    speedups: tuple[float, ...]


_RING_US, _SYMMETRIC_US = zip(*RING_AND_SYMMETRIC_US.values(), strict=True)
SYMMETRIC = Comparison(
    source="Megatron-LM#5596",
    machine="8 × H100, NVLink",
    sizes_bytes=tuple(RING_AND_SYMMETRIC_US),
    ring_us=_RING_US,
    symmetric_us=_SYMMETRIC_US,
    speedups=(1.86, 1.59, 1.25, 1.06),
)
