"""Modelled machines, with the source of every number.

    time   = start + wire + copies
    wire   = S · (cp-1)/cp / wire rate           the bytes that each GPU receives (see wire_us)
    copies = 2 · S · passes after the wire / memory rate

This is the time with symmetric memory. Without it the collective takes longer by `ring_factor`,
which depends on the size. Nothing here is measured: `modelled` is true in each preset, and figures
say so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COPY_PASSES = {"direct": 0, "padded_symm": 2, "padded_symm_recv": 2, "padded": 2}
# µs by NCCL's ring and by its symmetric kernels, by total bytes, on 8 H100.
# Source: NVIDIA/Megatron-LM#5596: the minimum over the ranks of the kernel's time, without waiting.
# The ring's times are not on a line, because NCCL selects its protocol by size.
RING_AND_SYMMETRIC_US = {
    2 << 20: (20.2, 10.9),
    8 << 20: (43.4, 27.4),
    32 << 20: (118.9, 95.3),
    128 << 20: (385.3, 363.2),
}


@dataclass(frozen=True)
class Preset:
    """A modelled machine; times in µs, rates in GB/s of 1e9 bytes."""

    name: str
    max_cp_size: int
    start_us: float
    wire_gbps: float
    memory_gbps: float
    sources: tuple[str, ...]
    node_size: int = 0  # GPUs per machine; 0 for a single machine
    network_gbps: float = 0.0  # per network adapter; one adapter per GPU
    modelled: bool = True

    def wire_us(self, total_bytes: int, cp_size: int) -> float:
        """Return the time of the transfer without the start.

        Over several machines the slower of two transfers counts: each adapter receives its part of
        the other machines' rows, while NVLink carries all other rows to each GPU.
        """
        self._check(total_bytes, cp_size)
        received_bytes = total_bytes * (cp_size - 1) / cp_size
        if not self.spans(cp_size):
            return received_bytes / self.wire_gbps / 1e3
        adapter_bytes = total_bytes * (cp_size - self.node_size) / cp_size / self.node_size
        inside_us = (received_bytes - adapter_bytes) / self.wire_gbps / 1e3
        return max(inside_us, adapter_bytes / self.network_gbps / 1e3)

    def spans(self, cp_size: int) -> bool:
        """Whether a group spans several machines; the model has no symmetric kernels there."""
        return bool(self.node_size) and cp_size > self.node_size

    def copies_us(self, total_bytes: int, passes: float) -> float:
        """Return the time of passes over the gathered tensor in a GPU's memory."""
        return passes * 2 * total_bytes / self.memory_gbps / 1e3

    def collective_us(self, total_bytes: int, cp_size: int, *, symmetric: bool) -> float:
        """Return the time of the gather without the passes before and after it."""
        time_us = self.start_us + self.wire_us(total_bytes, cp_size)
        return time_us if symmetric else time_us * self.symmetric_gain(total_bytes, cp_size)

    def predict_us(self, algorithm: str, total_bytes: int, cp_size: int) -> float:
        """Return the time of a gather. Raises ValueError for an unknown algorithm or cp_size."""
        if algorithm not in COPY_PASSES:
            raise ValueError(
                f"algorithm is {algorithm!r}; it must be one of {', '.join(COPY_PASSES)}"
            )
        symmetric = algorithm != "padded"
        copies_us = self.copies_us(total_bytes, COPY_PASSES[algorithm])
        return self.collective_us(total_bytes, cp_size, symmetric=symmetric) + copies_us

    def symmetric_gain(self, total_bytes: int, cp_size: int) -> float:
        """Return the speedup of the collective by symmetric memory, relative to a ring."""
        self._check(total_bytes, cp_size)
        return 1.0 if self.spans(cp_size) else ring_factor(total_bytes)

    def _check(self, total_bytes: int, cp_size: int) -> None:
        if not 1 <= cp_size <= self.max_cp_size or total_bytes < 0:
            raise ValueError(
                f"cp_size is {cp_size} and the size {total_bytes} bytes; {self.name} supports "
                f"cp_size 1 to {self.max_cp_size} and sizes from 0"
            )


def ring_factor(total_bytes: int) -> float:
    """Return ring time / symmetric time, interpolated over log(size)."""
    sizes = np.log(list(RING_AND_SYMMETRIC_US))
    factors = [ring_us / symmetric_us for ring_us, symmetric_us in RING_AND_SYMMETRIC_US.values()]
    return float(np.interp(np.log(max(total_bytes, 1)), sizes, factors))


_START = (
    "start and NVLink rate: a least-squares fit to NCCL's times in NVIDIA/Megatron-LM#5596 (8 "
    "H100, 2 to 128 MiB, symmetric, the fastest rank's kernel time), residual at most 1.1 %"
)
_GAIN = "gain of symmetric memory (ring time / symmetric time): the same table, measured there"
_NVLINK = "NVLink rate: as on 8 H100"
_TWICE = (
    f"{_NVLINK}, times 2: NCCL's cost model gives Blackwell's NVLink twice the rate of Hopper's "
    "(NCCL 2.30.7, sym_kernels.cc, nvlinkBws)"
)
_SHEET = "memory rate, read plus written: 0.9 of the data sheet's {}, assumed"

PRESETS = {
    preset.name: preset
    for preset in (
        Preset("8 H100, NVLink", 8, 5.3, 328, 3_000, (_START, _GAIN, _SHEET.format("3.35 TB/s"))),
        Preset(
            "NVL72 GB200",
            72,
            5.3,
            2 * 328,
            7_200,
            (
                _TWICE,
                "start and gain of symmetric memory: as on 8 H100, assumed",
                _SHEET.format("8 TB/s"),
            ),
        ),
        Preset(
            "2 nodes of 8 H100",
            16,
            30.0,
            328,
            3_000,
            (
                _NVLINK,
                "network: 0.9 (assumed) of one 400 Gb/s adapter per GPU (DGX H100 data sheet)",
                "start over the network: 30 µs, assumed",
            ),
            node_size=8,
            network_gbps=45.0,
        ),
    )
}
