"""The symmetric pool of a group: an arena that every rank allocated alike, and the books over it.

A block that does not fit *spills*: it makes another segment at run time, which is a hidden
collective, counted and timed. `meet()` is the one synchronization before data moves: there the
ranks check that they are in the same call with the same books, and agree on which blocks are free
again. The backend (cpkit.memory.backend) provides the memory. On CUDA, blocks are reused in
stream order: use one stream for a group's gathers and for what reads them, or make the others
wait. What is allocated during a capture stays: replays write there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import msgspec
import torch

from cpkit.devices import growth_problem, is_capturing
from cpkit.group import CPGroup
from cpkit.memory.allocator import MAX_BLOCKS, Block, BlockAllocator, explain_divergence, rounded
from cpkit.memory.backend import Backend, Segment, make_backend
from cpkit.memory.collective import describe, gather_problem, plain_all_gather, register_segment
from cpkit.memory.path import BufferPair, PathReport, decide, unsafe_for_nccl, without_windows
from cpkit.memory.prealloc import agree_on_prealloc, warm_up_bytes, warm_up_problem
from cpkit.memory.statistics import PoolHistory, PoolStatistics
from cpkit.memory.where import place_of, register
from cpkit.provenance import POISON_BYTE
from cpkit.stages import stage
from cpkit.sync.offers import SymmetricMemoryError

_SPILL_GRANULE_BYTES = 2 << 20
_MASK_BYTES = MAX_BLOCKS // 8
_BOOKS_BYTES = _MASK_BYTES + 4
_captured: list[torch.Tensor] = []  # what replays of graphs write to, whatever becomes of its pool


class SymmetricPool:
    """The symmetric memory of one group on one kind of device; becomes the group's pool there.

    `prealloc` is the arena in bytes; by default `CPKIT_SYMM_PREALLOC_GB`, else 4 GiB on CUDA (at
    most an eighth of the free memory for each rank of the GPU) and 64 MiB on the CPU (at most an
    eighth of the free shared memory). `device` is "cpu" or "cuda"; default: torch's default device.
    Collective. Raises SymmetricMemoryError on every rank when there is no room, ValueError for a
    group that spans machines or a size below 1.
    """

    def __init__(
        self, group: CPGroup, prealloc: int | None = None, device: str | None = None
    ) -> None:
        if group.spans_hosts:
            alone = "which cannot share memory. Use a cp_size that fits on one machine"
            raise ValueError(f"group {group.ranks} spans machines, {alone}")
        kind = device or torch.get_default_device().type
        group.meet(f"make a symmetric pool on {kind}", growth_problem(kind))
        self.group = group
        old = group.pools.get(kind)
        kept = old.backend if isinstance(old, SymmetricPool) else None
        self.backend: Backend = kept or make_backend(group, kind)
        self.device = self.backend.device
        self._allocator = BlockAllocator()
        self._segments: list[Segment] = []
        self.history = PoolHistory()
        offer = self.backend.default_prealloc() if prealloc is None else 0
        self._arena_bytes = agree_on_prealloc(group.rendezvous, prealloc, offer)
        self._grow(self._arena_bytes, "preallocate the symmetric pool")
        register(self)
        group.pools[self.device.type] = self

    # -------------------------------------------------------------------- allocation

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor; the same call on every rank gives the same offset.

        Its bytes return to the pool once every rank has dropped the tensor and a collective has
        told them so. Collective only when it spills.
        """
        count = math.prod(shape)
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        nbytes = count * dtype.itemsize
        block = self._allocator.place(nbytes) or self._place_after_meeting(nbytes)
        self.history.note(self._allocator)
        ledger, slot = self._allocator, block.slot
        memory = self._segments[block.segment].block(
            block.offset, nbytes, lambda: ledger.release(slot)
        )
        if is_capturing(self.device.type):
            _captured.append(memory)
        return memory.view(dtype).view(tuple(shape))

    def peer_view(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """The same tensor in a peer's memory. Raises ValueError for one not from this pool."""
        segment, offset = self.place_of(tensor)
        nbytes = tensor.numel() * tensor.element_size()
        memory = self._segments[segment].view(rank, offset, nbytes)
        return memory.view(tensor.dtype).view(tensor.shape)

    def locate(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """(segment, byte offset) of a tensor's first element, or None when it lives elsewhere."""
        address = tensor.data_ptr()
        for number, segment in enumerate(self._segments):
            offset = address - segment.addresses[self.group.rank]
            if 0 <= offset < segment.nbytes:
                return number, offset
        return None

    def peer_addresses(self, tensor: torch.Tensor) -> list[int]:
        """Where the same tensor of each rank is in this process, by rank.

        Raises ValueError for one not from this pool.
        """
        segment, offset = self.place_of(tensor)
        return [start + offset for start in self._segments[segment].addresses]

    def place_of(self, tensor: torch.Tensor) -> tuple[int, int]:
        """(segment, byte offset) of a contiguous tensor of this pool; ValueError for any other."""
        place = self.locate(tensor)
        if place is None or not tensor.is_contiguous():
            raise ValueError(
                f"{describe(tensor)} is not a contiguous tensor of this group's pool; make it "
                f"inside `with use_symmetric_memory(group)`"
            )
        return place

    def segment(self, number: int) -> Segment:
        """One of its segments."""
        return self._segments[number]

    def _place_after_meeting(self, nbytes: int) -> Block:
        """No room: free what all ranks have dropped; spill when that is not enough."""
        self.meet(
            f"allocate {nbytes} symmetric bytes (no room in the pool)",
            growth_problem(self.device.type),
        )
        block = self._allocator.place(nbytes)
        if block is None and self._allocator.is_full():
            raise ValueError(
                f"{MAX_BLOCKS} symmetric tensors are alive; drop some, or copy them. Those that a "
                f"CUDA graph captured stay for its replays: gather into= caches there"
            )
        while block is None:
            granules = -(-rounded(nbytes) // _SPILL_GRANULE_BYTES)
            self.history.spilled(
                self._grow(granules * _SPILL_GRANULE_BYTES, "grow the symmetric pool")
            )
            block = self._allocator.place(nbytes)
        return block

    def _grow(self, nbytes: int, purpose: str) -> float:
        """Make one more segment, together; the milliseconds that it took."""
        start = time.perf_counter()
        segment = self.backend.make_segment(nbytes, purpose)
        register_segment(segment, self.group.rank)
        self._segments.append(segment)
        self._allocator.add_segment(nbytes)
        took_ms = (time.perf_counter() - start) * 1e3
        self.history.registered(took_ms)
        self.history.note(self._allocator)
        return took_ms

    # ------------------------------------------------------------------ collectives

    def meet(self, call: str, problem: str = "", extra: bytes = b"") -> list[bytes]:
        """Synchronize before a collective; returns everybody's `extra`.

        Raises on every rank: ValueError when one has a problem or is in another call,
        SymmetricMemoryError when they have not allocated the same, BarrierTimeout when one is late.
        """
        books = self._allocator.released().to_bytes(_MASK_BYTES, "little")
        books += self._allocator.digest.to_bytes(4, "little")
        late = self.backend.late_words()
        try:
            answers = self.group.meet(call, late or problem, books + extra)
        except ValueError:
            self.backend.check()  # peers hear of it as well, and need not wait for this rank
            raise
        if len({answer[_MASK_BYTES:_BOOKS_BYTES] for answer in answers}) > 1:
            self._raise_divergence()
        masks = {answer[:_MASK_BYTES] for answer in answers}  # mostly one
        released_everywhere = (1 << MAX_BLOCKS) - 1
        for mask in masks:
            released_everywhere &= int.from_bytes(mask, "little")
        if released_everywhere:
            self._allocator.settle(released_everywhere)
            self.history.note(self._allocator)
        return [answer[_BOOKS_BYTES:] for answer in answers]

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Gather equal shards by the best path that the buffers of all ranks allow. Collective."""
        problem = gather_problem(output, input, self.group.size)
        if not problem:
            output, input = output.detach(), input.detach().resolve_conj().resolve_neg()
        call = "" if problem else f"gather {describe(output, input)}"
        with stage("agree"):
            places = self._agree_on_places(call, problem, input, output)
            path = self._decide(places)
        with stage("wire"):
            self._move(path, places, output, input)
        self.group.last_path = path

    def agree_on_path(
        self, call: str, problem: str, send: torch.Tensor, recv: torch.Tensor, transport: str = ""
    ) -> PathReport:
        """Meet, and hear where everybody's buffers are. Raises as `meet` does. Collective."""
        places = self._agree_on_places(call, problem, send, recv)
        return decide(places, self.group.rank, transport) if transport else self._decide(places)

    def _agree_on_places(
        self, call: str, problem: str, send: torch.Tensor, recv: torch.Tensor
    ) -> list[BufferPair]:
        place = place_of(send, recv, self.group)
        notes = self.meet(call, problem, msgspec.msgpack.encode(place))
        return [msgspec.msgpack.decode(note, type=BufferPair) for note in notes]

    def _decide(self, places: list[BufferPair]) -> PathReport:
        report = decide(places, self.group.rank, self.backend.transport())
        return without_windows(report, self.backend.window_problem())

    def _move(
        self, path: PathReport, places: list[BufferPair], output: torch.Tensor, input: torch.Tensor
    ) -> None:
        """Move shards that all have agreed on. Complete on return; on CUDA in stream order."""
        if path.path == "fallback" or self.backend.transport().startswith("nccl"):
            unsafe_send, unsafe_recv = unsafe_for_nccl(places)
            # Where a rank could not register the pool, the others may have windows all the same.
            windows = not self.backend.window_problem()
            plain_all_gather(
                output,
                input,
                self.group,
                symmetric_send=windows and not unsafe_send,
                symmetric_recv=windows and not unsafe_recv,
            )
            return
        self.backend.enter()
        if path.path == "symmetric":
            self.push_shard(output, input)
        else:
            self.pull_shards(output, input)
        self.backend.leave()

    def push_shard(self, output: torch.Tensor, shard: torch.Tensor) -> None:
        """Store this rank's shard into every peer's symmetric output. Not synchronized.

        Ranks start at different peers, so that they do not all write to the same memory at once.
        """
        rank, size, rows = self.group.rank, self.group.size, shard.shape[0]
        for peer in ((rank + step) % size for step in range(size) if shard.numel()):
            self.peer_view(output, peer)[rank * rows : (rank + 1) * rows].copy_(shard)

    def pull_shards(self, output: torch.Tensor, shard: torch.Tensor) -> None:
        """Load every peer's symmetric shard into an output of any kind. Not synchronized."""
        rank, size, rows = self.group.rank, self.group.size, shard.shape[0]
        for peer in ((rank + step) % size for step in range(size) if shard.numel()):
            output[peer * rows : (peer + 1) * rows].copy_(self.peer_view(shard, peer))

    def _raise_divergence(self) -> None:
        """Say on every rank what each of them allocated last."""
        said = self.group.exchange(msgspec.msgpack.encode(list(self._allocator.recent)))
        recent = [msgspec.msgpack.decode(answer, type=list[int]) for answer in said]
        raise SymmetricMemoryError(explain_divergence(recent))

    # ------------------------------------------------------------------------- life

    def configure(self, prealloc: int | None = None) -> SymmetricPool:
        """Start over with another arena; returns the new pool. Collective.

        Tensors of the old pool stay valid until they are dropped, but are ordinary to this group.
        """
        return SymmetricPool(self.group, prealloc, self.device.type)

    def warm_up(
        self,
        max_tokens: int,
        trailing_shape: Sequence[int] = (8, 128),
        dtype: torch.dtype = torch.bfloat16,
        tensors: int = 2,
        sequences: int = 1,
    ) -> None:
        """Make room for the largest batch now, so that no gather up to it spills. Collective.

        At most `max_tokens` tokens in at most `sequences` sequences; see `warm_up_bytes`.
        """
        problem = warm_up_problem(max_tokens, trailing_shape, dtype, tensors, sequences)
        shape = [] if problem else list(trailing_shape)
        self.meet(f"warm_up({max_tokens}, {shape}, {dtype}, {tensors}, {sequences})", problem)
        row_bytes = math.prod(trailing_shape) * dtype.itemsize
        needed = tensors * warm_up_bytes(max_tokens, row_bytes, self.group.size, sequences)
        if self._allocator.largest_free() < needed:
            self._make_room(needed, f"warm the symmetric pool up for {max_tokens} tokens")

    def _make_room(self, needed: int, purpose: str) -> None:
        """One arena if possible: while nobody holds a block, a larger one replaces all."""
        if self._allocator.blocks:
            self._grow(needed, purpose)
            self._arena_bytes += needed
            return
        larger = max(needed, self._arena_bytes)
        self._allocator, self._segments, self._arena_bytes = BlockAllocator(), [], 0
        self._grow(larger, purpose)
        self._arena_bytes = larger

    def check(self) -> None:
        """See Backend.check."""
        self.backend.check()

    def stats(self) -> PoolStatistics:
        """What the pool has and has had. Local."""
        sizes = [each.nbytes for each in self._segments]
        return self.history.statistics(self._allocator, sizes, self._arena_bytes)

    def poison_free(self) -> None:
        """Poison all free memory of this rank, so that unwritten results show. Local."""
        for segment, arena in zip(self._segments, self._allocator.arenas, strict=True):
            for offset, nbytes in arena.free_ranges():
                segment.view(self.group.rank, offset, nbytes).fill_(POISON_BYTE)
