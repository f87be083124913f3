"""Times that others measured and published, with their source. Never mixed with measured ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """One collective over total bytes on one machine: NCCL's ring, and its symmetric kernels."""

    source: str
    machine: str
    sizes_bytes: tuple[int, ...]
    before_us: tuple[float, ...]
    after_us: tuple[float, ...]


_MIB = 1 << 20
SYMMETRIC = Comparison(
    source="Megatron-LM#5596",
    machine="8 × H100, NVLink",
    sizes_bytes=(2 * _MIB, 8 * _MIB, 32 * _MIB, 128 * _MIB),
    before_us=(20.2, 43.4, 118.9, 385.3),
    after_us=(10.9, 27.4, 95.3, 363.2),
)
