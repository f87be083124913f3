"""Times that others measured and published, with their source. Never mixed with measured ones."""

from __future__ import annotations

from dataclasses import dataclass

from cpkit_lessons.cost_presets import RING_AND_SYMMETRIC_US


@dataclass(frozen=True)
class Comparison:
    """One collective over total bytes on one machine: NCCL's ring, and its symmetric kernels."""

    source: str
    machine: str
    sizes_bytes: tuple[int, ...]
    before_us: tuple[float, ...]
    after_us: tuple[float, ...]


_BEFORE_US, _AFTER_US = zip(*RING_AND_SYMMETRIC_US.values(), strict=True)
SYMMETRIC = Comparison(
    source="Megatron-LM#5596",
    machine="8 × H100, NVLink",
    sizes_bytes=tuple(RING_AND_SYMMETRIC_US),
    before_us=_BEFORE_US,
    after_us=_AFTER_US,
)
