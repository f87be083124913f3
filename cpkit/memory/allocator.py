"""Book-keeping of a symmetric pool: where the next block goes, and when a block is free again.

Pure arithmetic, the same on every rank. Two rules keep the ranks' books equal, because equal books
are what makes an offset mean the same block everywhere:

* blocks are placed first-fit, from sizes that are equal on all ranks;
* a block that one rank has let go of is free only when *every* rank has, which they tell each other
  at the next collective. A rank that keeps a tensor longer than its peers costs memory, not
  correctness.

`digest` sums up all that happened: ranks compare it before they rely on each other's offsets.
"""

from __future__ import annotations

import zlib
from collections import deque
from typing import NamedTuple

ALIGNMENT_BYTES = 256
MAX_BLOCKS = 1024
MAX_BYTES = 1 << 60  # of a segment: more is a mistake, and would not fit a message


class Arena:
    """First-fit allocator over `range(nbytes)`; offsets and sizes are multiples of 256."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.used_bytes = 0
        self._free: list[tuple[int, int]] = [(0, nbytes)]  # (offset, size), by offset

    def allocate(self, nbytes: int) -> int | None:
        """Lowest offset with room, or None."""
        for place, (offset, size) in enumerate(self._free):
            if size >= nbytes:
                rest = [(offset + nbytes, size - nbytes)] if size > nbytes else []
                self._free[place : place + 1] = rest
                self.used_bytes += nbytes
                return offset
        return None

    def free(self, offset: int, nbytes: int) -> None:
        """Give a block back and join it with its free neighbours."""
        self.used_bytes -= nbytes
        place = 0
        while place < len(self._free) and self._free[place][0] < offset:
            place += 1
        self._free.insert(place, (offset, nbytes))
        for left in (place, place - 1):
            if 0 <= left < len(self._free) - 1:
                (a, a_size), (b, b_size) = self._free[left : left + 2]
                if a + a_size == b:
                    self._free[left : left + 2] = [(a, a_size + b_size)]

    def free_ranges(self) -> list[tuple[int, int]]:
        """(offset, bytes) of what is free."""
        return list(self._free)

    def largest_free(self) -> int:
        """Bytes of the largest block that still fits."""
        return max((size for _, size in self._free), default=0)


class Block(NamedTuple):
    """A placed allocation: `segment` numbers the pool's segments, `offset` is in bytes."""

    slot: int
    segment: int
    offset: int
    nbytes: int


class BlockAllocator:
    """All blocks of a pool over all its segments."""

    def __init__(self) -> None:
        self.arenas: list[Arena] = []
        self.blocks: dict[int, Block] = {}
        self._released = 0  # bit per slot: this rank has let go, as last published
        self._dropped: deque[int] = deque()  # slots let go since; finalizers append at any moment
        self.total_bytes, self.used_bytes = 0, 0  # of all segments; in blocks that are not free
        self.peak_bytes = 0
        self.digest = 0
        self.recent: deque[int] = deque(maxlen=8)

    def add_segment(self, nbytes: int) -> None:
        """A new segment is there to place blocks in."""
        self.arenas.append(Arena(nbytes))
        self.total_bytes += nbytes
        self._note("segment", nbytes)

    def place(self, nbytes: int) -> Block | None:
        """Place a block, or None when no segment has room or MAX_BLOCKS are placed."""
        size, slot = rounded(nbytes), self._free_slot()
        if slot is None:
            return None
        for segment, arena in enumerate(self.arenas):
            offset = arena.allocate(size)
            if offset is not None:
                block = Block(slot, segment, offset, size)
                self.blocks[block.slot] = block
                self.used_bytes += size
                self.peak_bytes = max(self.peak_bytes, self.used_bytes)
                self.recent.append(size)
                self._note("block", size)
                return block
        return None

    def release(self, slot: int) -> None:
        """This rank no longer needs the block. Safe from a finalizer, in any thread."""
        self._dropped.append(slot)

    def released(self) -> int:
        """The blocks that this rank has let go of and that are not free yet: a bit per slot."""
        while self._dropped:
            self._released |= 1 << self._dropped.popleft()
        return self._released

    def settle(self, released_everywhere: int) -> None:
        """Free the blocks that all ranks have let go of (the AND of everybody's `released`)."""
        for slot in sorted(self.blocks):
            if released_everywhere >> slot & 1:
                block = self.blocks.pop(slot)
                self.arenas[block.segment].free(block.offset, block.nbytes)
                self.used_bytes -= block.nbytes
                self._note("free", slot)
        self._released &= ~released_everywhere

    def largest_free(self) -> int:
        """Bytes of the largest block that any segment still has room for."""
        return max((arena.largest_free() for arena in self.arenas), default=0)

    def is_full(self) -> bool:
        """Whether there are as many blocks as the books have room for."""
        return len(self.blocks) >= MAX_BLOCKS

    def _free_slot(self) -> int | None:
        return next((slot for slot in range(MAX_BLOCKS) if slot not in self.blocks), None)

    def _note(self, event: str, value: int) -> None:
        self.digest = zlib.crc32(f"{event} {value}".encode(), self.digest)


def rounded(nbytes: int) -> int:
    """Bytes that a block of `nbytes` takes."""
    return -(-max(nbytes, 1) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def explain_divergence(recent: list[list[int]]) -> str:
    """In words: the ranks' books differ; `recent` are the bytes of each rank's latest blocks."""
    lists = "; ".join(f"rank {rank}: {sizes}" for rank, sizes in enumerate(recent))
    return (
        f"the ranks have not made the same symmetric allocations, so an offset would not "
        f"mean the same block on each of them. Bytes of the latest blocks, {lists}. Every "
        f"rank has to allocate the same sizes in the same order; derive them from "
        f"max_rank_len, never from this rank's own rows. After an exception in the midst of a "
        f"gather, start clean with cpkit.group.forget_groups() on every rank."
    )
