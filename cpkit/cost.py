"""What a gather costs, counted from what it does: passes, bytes, synchronizations. Pure.

S = bytes of the gathered tensor, W = cp_size, P = S with padding. Bytes moved are bytes read plus
bytes written, by all ranks together:

    algorithm          pad        wire                           strip    reorder
    padded             2·P        W·(4·(W-1) + 2)·P/W  over TCP  2·W·S    2·W·S
    padded_symm_recv   2·P        (W+1)·P                        2·W·S    2·W·S
    padded_symm        2·P        (W+1)·P                        2·W·S    2·W·S
    direct             -          (W+1)·S                        -        -

A push reads each row once, and writes it W times: (W+1)·S is the least that any gather into W
separate outputs can move. Through a loopback TCP socket each received byte is copied into the
kernel and out of it.
"""

from __future__ import annotations

from dataclasses import dataclass

PASSES = {
    "padded": ("pad", "wire", "strip", "reorder"),
    "padded_symm_recv": ("pad", "wire", "strip", "reorder"),
    "padded_symm": ("wire", "strip", "reorder"),
    "direct": ("wire",),
}


@dataclass(frozen=True)
class Traffic:
    """Bytes read plus written by all ranks together."""

    wire_bytes: int
    copied_bytes: int

    @property
    def moved_bytes(self) -> int:
        """All of it."""
        return self.wire_bytes + self.copied_bytes


def traffic(
    algorithm: str, total_bytes: int, cp_size: int, padded_bytes: int | None = None
) -> Traffic:
    """What an algorithm moves to gather `total_bytes`, which padding makes `padded_bytes`.

    Raises ValueError for an unknown algorithm.

        >>> traffic("direct", 1000, 4).moved_bytes
        5000
    """
    if algorithm not in PASSES:
        raise ValueError(f"algorithm is {algorithm!r}; it must be one of {', '.join(PASSES)}")
    padded = total_bytes if padded_bytes is None else padded_bytes
    if algorithm == "direct":
        return Traffic((cp_size + 1) * total_bytes, 0)
    copies = 2 * padded + 2 * (2 * cp_size * total_bytes)
    wire = (cp_size + 1) * padded
    if algorithm == "padded":
        wire = (4 * (cp_size - 1) + 2) * padded
    return Traffic(wire, copies)
