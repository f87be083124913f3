"""The allocator: blocks never overlap, and equal calls on all ranks give equal blocks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cpkit.memory.allocator import (
    ALIGNMENT_BYTES,
    MASK_BYTES,
    MAX_BLOCKS,
    BlockAllocator,
    FreeList,
    rounded,
)

Steps = list[tuple[str, int]]
steps = st.lists(st.tuples(st.sampled_from(["place", "drop"]), st.integers(1, 5000)), max_size=60)


def dropped(allocator: BlockAllocator) -> int:
    return int.from_bytes(allocator.record()[:MASK_BYTES], "little")


@given(steps)
def test_blocks_never_overlap_and_free_ranges_are_merged(script: Steps) -> None:
    arena, live = FreeList(32768), []
    for what, number in script:
        if what == "place":
            size = rounded(number)
            offset = arena.allocate(size)
            if offset is not None:
                assert offset % ALIGNMENT_BYTES == 0
                assert all(offset + size <= o or o + s <= offset for o, s in live)
                live.append((offset, size))
        elif live:
            arena.free(*live.pop(number % len(live)))
        assert arena.used_bytes == sum(size for _, size in live)
        assert arena.used_bytes + sum(size for _, size in arena.free_ranges) == arena.nbytes
    for block in live:
        arena.free(*block)
    assert arena.free_ranges == [(0, 32768)]


@given(steps, st.lists(st.integers(0, 3), min_size=60, max_size=60))
def test_ranks_that_release_at_different_times_keep_equal_blocks(
    script: Steps, delays: list[int]
) -> None:
    """Rank 1 releases every block later than rank 0. The offsets stay equal."""
    ranks = [BlockAllocator(), BlockAllocator()]
    for allocator in ranks:
        allocator.add_segment(32768)
    live: list[int] = []
    late: list[tuple[int, int]] = []
    for moment, (what, number) in enumerate(script):
        if what == "place":
            blocks = [allocator.place(number) for allocator in ranks]
            assert blocks[0] == blocks[1]
            if blocks[0]:
                live.append(blocks[0].bit)
        elif live:
            bit = live.pop(number % len(live))
            ranks[0].dropped.append(bit)
            late.append((moment + delays[moment % 60], bit))
        for due, bit in [entry for entry in late if entry[0] <= moment]:
            ranks[1].dropped.append(bit)
            late.remove((due, bit))
        both = dropped(ranks[0]) & dropped(ranks[1])
        for allocator in ranks:
            allocator.free(both)
        assert ranks[0].digest == ranks[1].digest
        assert ranks[0].blocks == ranks[1].blocks


def test_different_blocks_have_different_digests() -> None:
    allocators = [BlockAllocator(), BlockAllocator()]
    for allocator, size in zip(allocators, (256, 512), strict=True):
        allocator.add_segment(4096)
        allocator.place(size)
    assert allocators[0].digest != allocators[1].digest


def test_a_block_is_free_only_after_all_ranks_released_it() -> None:
    allocator = BlockAllocator()
    allocator.add_segment(256)
    block = allocator.place(100)
    allocator.dropped.append(block.bit)
    allocator.free(0)  # a peer still holds it
    assert allocator.place(100) is None
    allocator.free(dropped(allocator))
    assert allocator.place(100) is not None


def test_a_dropped_segment_gets_no_blocks_and_the_others_keep_their_numbers() -> None:
    allocator = BlockAllocator()
    for nbytes in (256, 4096, 8192):
        allocator.add_segment(nbytes)
    digest = allocator.digest
    allocator.drop_segment(1)
    assert allocator.digest != digest
    assert (allocator.total_bytes, allocator.largest_free()) == (256 + 8192, 8192)
    assert allocator.place(4096).segment == 2


def test_the_number_of_blocks_is_limited() -> None:
    allocator = BlockAllocator()
    allocator.add_segment(ALIGNMENT_BYTES * (MAX_BLOCKS + 1))
    for _ in range(MAX_BLOCKS):
        assert allocator.place(1)
    assert allocator.is_full()
    assert allocator.place(1) is None
