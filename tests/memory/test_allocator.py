"""The pool's books: blocks never overlap, and ranks that do the same have the same books."""

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
def test_blocks_never_overlap_and_free_space_joins_again(script: Steps) -> None:
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
def test_ranks_that_drop_at_different_times_keep_equal_books(
    script: Steps, delays: list[int]
) -> None:
    """Rank 1 lets go of everything later than rank 0; offsets stay equal all the same."""
    ranks = [BlockAllocator(), BlockAllocator()]
    for ledger in ranks:
        ledger.add_segment(32768)
    live: list[int] = []
    late: list[tuple[int, int]] = []
    for moment, (what, number) in enumerate(script):
        if what == "place":
            blocks = [ledger.place(number) for ledger in ranks]
            assert blocks[0] == blocks[1]
            if blocks[0]:
                live.append(blocks[0].slot)
        elif live:
            slot = live.pop(number % len(live))
            ranks[0].dropped.append(slot)
            late.append((moment + delays[moment % 60], slot))
        for due, slot in [entry for entry in late if entry[0] <= moment]:
            ranks[1].dropped.append(slot)
            late.remove((due, slot))
        both = dropped(ranks[0]) & dropped(ranks[1])
        for ledger in ranks:
            ledger.free(both)
        assert ranks[0].digest == ranks[1].digest
        assert ranks[0].blocks == ranks[1].blocks


def test_different_books_have_different_digests() -> None:
    ledgers = [BlockAllocator(), BlockAllocator()]
    for ledger, size in zip(ledgers, (256, 512), strict=True):
        ledger.add_segment(4096)
        ledger.place(size)
    assert ledgers[0].digest != ledgers[1].digest


def test_a_block_is_free_only_when_everybody_dropped_it() -> None:
    ledger = BlockAllocator()
    ledger.add_segment(256)
    block = ledger.place(100)
    assert block is not None
    ledger.dropped.append(block.slot)
    ledger.free(0)  # a peer still holds it
    assert ledger.place(100) is None
    ledger.free(dropped(ledger))
    assert ledger.place(100) is not None


def test_the_books_have_an_end() -> None:
    ledger = BlockAllocator()
    ledger.add_segment(ALIGNMENT_BYTES * (MAX_BLOCKS + 1))
    for _ in range(MAX_BLOCKS):
        assert ledger.place(1)
    assert ledger.is_full()
    assert ledger.place(1) is None
