"""The symmetric pool of a group on one machine: an arena of POSIX shared memory.

A block that does not fit *spills*: it makes another segment at run time, which is a hidden
collective, counted and timed. `meet()` is the one synchronization before data moves: there the
ranks check that they are in the same call with the same books, and agree on which blocks are free
again.
"""

from __future__ import annotations

import math
import mmap
import time
import weakref
from collections.abc import Sequence

import msgspec
import torch

from cpkit.arena import MAX_BLOCKS, Block, Ledger, PoolStatistics, rounded
from cpkit.group import (
    CPGroup,
    describe,
    gather_problem,
    plain_all_gather,
)
from cpkit.path import PathReport, Place, Where, decide
from cpkit.prealloc import agree_on_prealloc
from cpkit.provenance import POISON_BYTE
from cpkit.shm import Segment, SymmetricMemoryError, make_segment
from cpkit.stages import stage

_SPILL_GRANULE_BYTES = 2 << 20
_MASK_BYTES = MAX_BLOCKS // 8
_BOOKS_BYTES = _MASK_BYTES + 4
_pools: weakref.WeakSet[SymmetricPool] = weakref.WeakSet()


class SymmetricPool:
    """The symmetric memory of one group on the ranks of one machine; becomes the group's pool.

    `prealloc` is the arena in bytes; by default a fraction of the free shared memory, at most 64
    MiB, or `CPKIT_SYMM_PREALLOC_GB`. Making a pool is collective. Raises SymmetricMemoryError on
    every rank when shared memory is full, ValueError for a group that spans machines or a size
    below 1.
    """

    def __init__(self, group: CPGroup, prealloc: int | None = None) -> None:
        if group.spans_hosts:
            raise ValueError(
                f"group {group.ranks} spans machines, which cannot share memory: its gathers "
                f"go through torch.distributed. For symmetric memory use a cp_size that fits on "
                f"one machine."
            )
        self.group = group
        self._ledger = Ledger()
        self._segments: list[Segment] = []
        self._bases: list[list[int]] = []  # address of each rank's memory, by segment
        self._spills = 0
        self._registering_s = 0.0
        self._arena_bytes = agree_on_prealloc(group.rendezvous, prealloc)
        self._grow(self._arena_bytes, "preallocate the symmetric pool")
        _pools.add(self)
        group.transport = self

    # -------------------------------------------------------------------- allocation

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor; the same call on every rank gives the same offset.

        Its bytes return to the pool once every rank has dropped the tensor and a collective has
        told them so. Collective only when it spills.
        """
        count = math.prod(shape)
        if count == 0:
            return torch.empty(0, dtype=dtype).view(tuple(shape))
        nbytes = count * dtype.itemsize
        block = self._ledger.place(nbytes) or self._place_after_meeting(nbytes)
        own = self._segments[block.segment].maps[self.group.rank]
        # The tensor's storage keeps this view alive; when the view goes, the last tensor has gone.
        memory = memoryview(own)[block.offset : block.offset + nbytes]
        weakref.finalize(memory, self._ledger.release, block.slot).atexit = False
        return torch.frombuffer(memory, dtype=dtype, count=count).view(tuple(shape))

    def peer_view(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """The same tensor in a peer's memory. Raises ValueError for one not from this pool."""
        segment, offset = self._place_of(tensor)
        memory = self._segments[segment].maps[rank]
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        return flat.view(tensor.shape)

    def locate(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """(segment, byte offset) of a tensor's first element, or None when it lives elsewhere."""
        address = tensor.data_ptr()
        for number, (bases, segment) in enumerate(zip(self._bases, self._segments, strict=True)):
            offset = address - bases[self.group.rank]
            if 0 <= offset < segment.nbytes:
                return number, offset
        return None

    def peer_addresses(self, tensor: torch.Tensor) -> list[int]:
        """Where the same tensor of each rank is in this process, by rank.

        Raises ValueError for one not from this pool.
        """
        segment, offset = self._place_of(tensor)
        return [base + offset for base in self._bases[segment]]

    def _place_of(self, tensor: torch.Tensor) -> tuple[int, int]:
        place = self.locate(tensor)
        if place is None or not tensor.is_contiguous():
            raise ValueError(
                f"{describe(tensor)} is not a contiguous tensor of this group's pool; make it "
                f"inside `with use_symmetric_memory(group)`"
            )
        return place

    def _place_after_meeting(self, nbytes: int) -> Block:
        """No room: free what all ranks have dropped; spill when that is not enough."""
        self.meet(f"allocate {nbytes} symmetric bytes (no room in the pool)")
        block = self._ledger.place(nbytes)
        if self._ledger.is_full():
            raise ValueError(
                f"{MAX_BLOCKS} symmetric tensors are alive; drop some, or copy what you keep"
            )
        while block is None:
            granules = -(-rounded(nbytes) // _SPILL_GRANULE_BYTES)
            self._grow(granules * _SPILL_GRANULE_BYTES, "grow the symmetric pool")
            self._spills += 1
            block = self._ledger.place(nbytes)
        return block

    def _grow(self, nbytes: int, purpose: str) -> None:
        start = time.perf_counter()
        segment = make_segment(self.group.rendezvous, nbytes, purpose)
        self._segments.append(segment)
        self._bases.append([_address(memory) for memory in segment.maps])
        self._ledger.add_segment(nbytes)
        self._registering_s += time.perf_counter() - start

    # ------------------------------------------------------------------ collectives

    def meet(self, call: str, problem: str = "", extra: bytes = b"") -> list[bytes]:
        """Synchronize before a collective; returns everybody's `extra`.

        Raises on every rank: ValueError when one has a problem or is in another call,
        SymmetricMemoryError when they have not allocated the same.
        """
        books = self._ledger.released().to_bytes(_MASK_BYTES, "little")
        books += self._ledger.digest.to_bytes(4, "little")
        answers = self.group.meet(call, problem, books + extra)
        if len({answer[_MASK_BYTES:_BOOKS_BYTES] for answer in answers}) > 1:
            self._raise_divergence()
        released_everywhere = (1 << MAX_BLOCKS) - 1
        for answer in answers:
            released_everywhere &= int.from_bytes(answer[:_MASK_BYTES], "little")
        if released_everywhere:
            self._ledger.settle(released_everywhere)
        return [answer[_BOOKS_BYTES:] for answer in answers]

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Gather equal shards by the best path that the buffers of all ranks allow. Collective."""
        problem = gather_problem(output, input, self.group.size)
        if not problem:
            output, input = output.detach(), input.detach().resolve_conj().resolve_neg()
        call = "" if problem else f"gather {describe(output, input)}"
        place = Place(locate(input, self.group), locate(output, self.group))
        with stage("agree"):
            notes = self.meet(call, problem, msgspec.msgpack.encode(place))
        places = [msgspec.msgpack.decode(note, type=Place) for note in notes]
        path = decide(places, self.group.rank)
        with stage("wire"):
            self._move(path, output, input)
        self.group.last_path = path

    def _move(self, path: PathReport, output: torch.Tensor, input: torch.Tensor) -> None:
        """Move shards that all ranks have agreed on; complete on return."""
        if path.path == "fallback":
            plain_all_gather(output, input, self.group)
            return
        if path.path == "symmetric":
            self.push_shard(output, input)
        else:
            self._pull_shards(output, input)
        self.group.barrier()

    def push_shard(self, output: torch.Tensor, shard: torch.Tensor) -> None:
        """Store this rank's shard into its place of every peer's symmetric output. Not
        synchronized.

        Ranks start at different peers, so that they do not all write to the same memory at once.
        """
        rank, size, rows = self.group.rank, self.group.size, shard.shape[0]
        for peer in ((rank + step) % size for step in range(size) if shard.numel()):
            self.peer_view(output, peer)[rank * rows : (rank + 1) * rows].copy_(shard)

    def _pull_shards(self, output: torch.Tensor, shard: torch.Tensor) -> None:
        rank, size, rows = self.group.rank, self.group.size, shard.shape[0]
        for peer in ((rank + step) % size for step in range(size) if shard.numel()):
            output[peer * rows : (peer + 1) * rows].copy_(self.peer_view(shard, peer))

    def _raise_divergence(self) -> None:
        """Say on every rank what each of them allocated last."""
        said = self.group.exchange(msgspec.msgpack.encode(list(self._ledger.recent)))
        recent = [msgspec.msgpack.decode(answer, type=list[int]) for answer in said]
        lists = "; ".join(f"rank {rank}: {sizes}" for rank, sizes in enumerate(recent))
        raise SymmetricMemoryError(
            f"the ranks have not made the same symmetric allocations, so an offset would not "
            f"mean the same block on each of them. Bytes of the latest blocks, {lists}. Every "
            f"rank has to allocate the same sizes in the same order; derive them from "
            f"max_rank_len, never from this rank's own rows."
        )

    # ------------------------------------------------------------------------- life

    def configure(self, prealloc: int | None = None) -> SymmetricPool:
        """Start over with another arena; returns the new pool. Collective.

        Tensors of the old pool stay valid until they are dropped, but are ordinary to this group.
        """
        return SymmetricPool(self.group, prealloc)

    def warm_up(
        self,
        max_tokens: int,
        trailing_shape: Sequence[int] = (8, 128),
        dtype: torch.dtype = torch.bfloat16,
        tensors: int = 2,
        sequences: int = 1,
    ) -> None:
        """Make room for the largest batch now, so that no gather up to it spills. Collective.

        The largest batch has `max_tokens` tokens in at most `sequences` sequences, each of which
        can make the longest rank two rows longer. Counts what the neediest algorithm has alive, a
        receive buffer and a padded shard for each tensor, twice: blocks return to the pool only at
        the next call.
        """
        whole = all(isinstance(n, int) and n > 0 for n in (max_tokens, tensors, sequences))
        problem = f"{max_tokens=}, {tensors=}, {sequences=}: each must be a number, 1 or more"
        self.meet(
            f"warm_up({max_tokens}, {list(trailing_shape)}, {dtype}, {tensors}, {sequences})",
            "" if whole else problem,
        )
        row_bytes = math.prod(trailing_shape) * dtype.itemsize
        padded_rows = -(-max_tokens // self.group.size) + 2 * sequences
        recv_bytes = rounded(padded_rows * self.group.size * row_bytes)
        needed = 2 * tensors * (recv_bytes + rounded(padded_rows * row_bytes))
        if max(arena.largest_free() for arena in self._ledger.arenas) < needed:
            self._grow(needed, f"warm the symmetric pool up for {max_tokens} tokens")
            self._arena_bytes += needed

    def stats(self) -> PoolStatistics:
        """What the pool has and has had. Local."""
        total = sum(segment.nbytes for segment in self._segments)
        return PoolStatistics(
            segments=len(self._segments),
            arena_bytes=self._arena_bytes,
            spill_bytes=total - self._arena_bytes,
            used_bytes=self._ledger.used_bytes,
            peak_bytes=self._ledger.peak_bytes,
            live_blocks=len(self._ledger.blocks),
            spills=self._spills,
            registrations=len(self._segments),
            registering_ms=self._registering_s * 1e3,
        )

    def poison_free(self) -> None:
        """Poison all free memory of this rank, so that unwritten results show. Local."""
        for segment, arena in zip(self._segments, self._ledger.arenas, strict=True):
            memory = torch.frombuffer(segment.maps[self.group.rank], dtype=torch.uint8)
            for offset, nbytes in arena.free_ranges():
                memory[offset : offset + nbytes].fill_(POISON_BYTE)


def locate(tensor: torch.Tensor, group: CPGroup) -> Where:
    """Where a buffer is, seen from a group."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        return Where(other="no ordinary tensor")
    pool = group.transport
    if isinstance(pool, SymmetricPool):
        place = pool.locate(tensor)
        if place and tensor.is_contiguous():
            return Where(*place)
        if place:
            return Where(other="in the pool but not contiguous")
    for other in _pools:
        if other.locate(tensor):
            return Where(
                other=f"in the pool of another group (ranks {list(other.group.ranks)}), "
                f"or in one that was configured away"
            )
    return Where(other="ordinary memory")


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
