"""The block allocator of a symmetric pool: where the next block goes, and when a block is free.

Pure arithmetic, the same on every rank. Two rules keep the allocators of all ranks equal, so that
an offset means the same block on each of them:

* blocks are placed first-fit, with sizes that are equal on all ranks;
* a block is free only when *every* rank has dropped it, which the ranks determine at the next
  collective. A rank that keeps a tensor longer than its peers costs memory, not correctness.

`digest` summarizes the history: ranks compare it before they rely on each other's offsets.
"""

from __future__ import annotations

import heapq
import zlib
from bisect import bisect
from collections import deque
from typing import NamedTuple

ALIGNMENT_BYTES = 256
MAX_BLOCKS = 1024
MASK_BYTES = MAX_BLOCKS // 8
MAX_BYTES = 1 << 60  # per segment; a larger size is a mistake, and would not fit into a message


class FreeList:
    """First-fit allocator over `range(nbytes)`; offsets and sizes are multiples of 256."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.used_bytes = 0
        self.free_ranges = [(0, nbytes)]  # (offset, size), by offset

    def allocate(self, nbytes: int) -> int | None:
        """Return the lowest offset with room, or None."""
        for index, (offset, size) in enumerate(self.free_ranges):
            if size >= nbytes:
                rest = [(offset + nbytes, size - nbytes)] if size > nbytes else []
                self.free_ranges[index : index + 1] = rest
                self.used_bytes += nbytes
                return offset
        return None

    def free(self, offset: int, nbytes: int) -> None:
        """Free a block and join it with its free neighbours."""
        self.used_bytes -= nbytes
        ranges = self.free_ranges
        index = bisect(ranges, (offset, nbytes))
        if index < len(ranges) and ranges[index][0] == offset + nbytes:
            nbytes += ranges.pop(index)[1]
        if index and sum(ranges[index - 1]) == offset:
            index -= 1
            offset, before = ranges.pop(index)
            nbytes += before
        ranges.insert(index, (offset, nbytes))


class Block(NamedTuple):
    """An allocation: its bit in the release masks, its segment's number, its offset in bytes."""

    bit: int
    segment: int
    offset: int
    nbytes: int


class BlockAllocator:
    """All blocks of a pool, in all its segments."""

    def __init__(self) -> None:
        self.free_lists: list[FreeList] = []
        self.blocks: dict[int, Block] = {}
        self._free_bits = list(range(MAX_BLOCKS))  # a heap
        self.released = 0  # a bit per block that this rank has dropped, until it is free
        # The bits of blocks dropped since. Finalizers append to it at any moment, in any thread.
        self.dropped: deque[int] = deque()
        self.total_bytes, self.used_bytes = 0, 0  # of all segments; in blocks that are not free
        self.peak_bytes = 0
        self.digest = 0
        self.recent: deque[int] = deque(maxlen=8)

    def add_segment(self, nbytes: int) -> None:
        """Add a segment to place blocks in."""
        self.free_lists.append(FreeList(nbytes))
        self.total_bytes += nbytes
        self.digest = zlib.crc32(b"segment %d" % nbytes, self.digest)

    def drop_segment(self, segment: int) -> None:
        """Place no more blocks in a segment, which has none."""
        self.total_bytes -= self.free_lists[segment].nbytes
        self.free_lists[segment] = FreeList(0)
        self.digest = zlib.crc32(b"drop segment %d" % segment, self.digest)

    def place(self, nbytes: int) -> Block | None:
        """Place a block; return None when no segment has room or MAX_BLOCKS are placed."""
        if not self._free_bits:
            return None
        size = rounded(nbytes)
        for segment, free_list in enumerate(self.free_lists):
            offset = free_list.allocate(size)
            if offset is not None:
                block = Block(heapq.heappop(self._free_bits), segment, offset, size)
                self.blocks[block.bit] = block
                self.used_bytes += size
                self.peak_bytes = max(self.peak_bytes, self.used_bytes)
                self.recent.append(size)
                self.digest = zlib.crc32(b"block %d" % size, self.digest)
                return block
        return None

    def record(self) -> bytes:
        """Return what the ranks exchange: a bit per block that this rank dropped, then the digest.

        The first MASK_BYTES are the bits, of blocks that are not free yet; 4 bytes follow.
        """
        while self.dropped:
            self.released |= 1 << self.dropped.popleft()
        return self.released.to_bytes(MASK_BYTES, "little") + self.digest.to_bytes(4, "little")

    def free(self, released_everywhere: int) -> None:
        """Free the blocks that all ranks have dropped (the AND of all ranks' bits)."""
        bits = released_everywhere
        while bits:
            lowest = bits & -bits
            bits ^= lowest
            bit = lowest.bit_length() - 1
            block = self.blocks.pop(bit)
            self.free_lists[block.segment].free(block.offset, block.nbytes)
            heapq.heappush(self._free_bits, bit)
            self.used_bytes -= block.nbytes
            self.digest = zlib.crc32(b"free %d" % bit, self.digest)
        self.released &= ~released_everywhere

    def largest_free(self) -> int:
        """Return the bytes of the largest block that fits into any segment."""
        sizes = (size for free_list in self.free_lists for _, size in free_list.free_ranges)
        return max(sizes, default=0)

    def is_full(self) -> bool:
        """Return True when MAX_BLOCKS blocks are placed."""
        return not self._free_bits


def rounded(nbytes: int) -> int:
    """Return the bytes that a block of `nbytes` occupies."""
    return -(-max(nbytes, 1) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def explain_divergence(recent: list[list[int]]) -> str:
    """Explain that the allocators differ; `recent` are the bytes of each rank's latest blocks."""
    lists = "; ".join(f"rank {rank}: {sizes}" for rank, sizes in enumerate(recent))
    return (
        f"the ranks have not made the same symmetric allocations, so an offset would not "
        f"mean the same block on each of them. Bytes of the latest blocks, {lists}. Every "
        f"rank has to allocate the same sizes in the same order; derive them from "
        f"max_rank_len, never from this rank's own rows. After an interrupt inside a "
        f"gather, start again with cpkit.group.forget_groups() on every rank."
    )
