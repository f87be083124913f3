"""The symmetric pool of a group: an arena of equal size on every rank, and its allocator.

A block that does not fit *spills*: it makes another segment at run time, which is a hidden
collective, counted and timed. The agreement before every collective is the only synchronization
before data moves. In it the ranks check that their allocators have the same history, and determine
which blocks are free on all of them. The backend (cpkit.memory.backend) provides the memory.

On CUDA, blocks are reused in stream order: use one stream for a group's gathers and for what reads
their results, or make the other streams wait. A block that is allocated during capture is never
released, because replays write to it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
import torch

from cpkit.devices import check_can_grow, check_stream, keep_for_replays, on_stream
from cpkit.eager import eager_only
from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.allocator import (
    MASK_BYTES,
    MAX_BLOCKS,
    Block,
    BlockAllocator,
    explain_divergence,
    rounded,
)
from cpkit.memory.backend import Backend, Place, Segment
from cpkit.memory.locate import check_plain_view, locate_pair, not_in_pool
from cpkit.memory.ordinary import ASYMMETRIC_BATCH, OrdinaryMemory
from cpkit.memory.path import Decision, PathReport, decide_from
from cpkit.memory.posix import PosixBackend
from cpkit.memory.sizing import agree_on_prealloc, check_warm_up, warm_up_bytes
from cpkit.memory.statistics import PoolHistory, PoolStatistics
from cpkit.provenance import POISON_BYTE
from cpkit.stages import stage
from cpkit.sync.agreement import Agreement, Signature
from cpkit.sync.collective import (
    check_gather,
    copyable,
    describe,
    extent,
    register_segment,
    torch_all_gather,
)
from cpkit.sync.exchange import SymmetricMemoryError

_SPILL_GRANULE_BYTES = 2 << 20
_STATE_BYTES = MASK_BYTES + 4


class SymmetricPool:
    """The symmetric memory of one group on one kind of device; becomes the group's pool there.

    `prealloc` is the arena in bytes; by default `CPKIT_SYMM_PREALLOC_GB`, otherwise 4 GiB on CUDA
    (at most an eighth of the free memory per rank on the GPU) and 64 MiB on the CPU (at most an
    eighth of the free shared memory). `device` is "cpu" or "cuda"; default: torch's default device.
    Collective. Raises SymmetricMemoryError on every rank when there is no room, ValueError for a
    group that spans machines or a size below 1.
    """

    is_symmetric = True

    def __init__(
        self, group: CPGroup, prealloc: int | None = None, device: str | None = None
    ) -> None:
        if group.spans_hosts:
            raise ValueError(
                f"group {group.ranks} spans machines, which cannot share memory. Use a cp_size "
                f"that fits on one machine"
            )
        kind = device or torch.get_default_device().type
        with Agreement(group.exchange) as call:
            check_can_grow(kind)
            call.must_match(Signature(f"make a symmetric pool on {kind}"))
        assert group.shm_barrier, "the ranks of one machine have a barrier in shared memory"
        self.group, self._exchange = group, group.shm_barrier.exchange
        # Ranks start at different peers, so that they do not all write to the same one.
        self.peer_order = [(group.rank + step) % group.size for step in range(group.size)]
        old = group.pools.get(kind)
        kept = old.backend if isinstance(old, SymmetricPool) else None
        with torch._C.DisableTorchFunction():  # also inside `use_symmetric_memory`
            self.backend: Backend = kept or _make_backend(group, kind)
        self.device = self.backend.device
        self._allocator = BlockAllocator()
        self._segments: dict[int, Segment] = {}  # by the number in the allocator
        self._spilled: set[int] = set()
        self.history = PoolHistory()
        self.repeated: dict[object, Any] = {}  # see cpkit.repeat
        self._arena_bytes = agree_on_prealloc(self.backend, group, prealloc)
        self._grow(self._arena_bytes, "preallocate the symmetric pool")
        group.pools[self.device.type] = self

    # -------------------------------------------------------------------- allocation

    @eager_only
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate an uninitialised contiguous tensor, at the same offset on every rank.

        Every rank makes the same calls. The bytes return to the pool at the first agreement after
        all ranks have dropped the tensor. Collective only when the pool has no room.
        """
        self.group.check_thread()
        shape = tuple(map(int, shape))  # torch.jit.trace has tensors in shapes
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype, device=self.device)
        _, memory = self.take(nbytes, shape, dtype)
        if self.device.type == "cuda":
            keep_for_replays("cuda", memory)
        return memory

    def take(
        self, nbytes: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Place, torch.Tensor]:
        """Return where a new block is, and a tensor over it; see `empty`."""
        block = self._allocator.place(nbytes) or self._place_after_freeing(nbytes)
        if self.group.samples_pools:
            self.history.sample(self._allocator)
        segment = self._segments[block.segment]
        release = partial(self._allocator.dropped.append, block.bit)
        return (segment, block.offset), segment.block(block.offset, shape, dtype, release)

    @eager_only
    def peer_view(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """Return the same tensor in a peer's memory, with the same strides.

        Raises ValueError for other memory, a conjugated or negated view, or a bad rank.
        """
        self.group.check_rank("rank", rank)
        segment, offset = self.offset_of(tensor)
        check_plain_view(tensor)
        start, stop = extent(tensor)
        memory = self._segments[segment].view(rank, offset, stop - start)
        return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())

    def peer_addresses(self, tensor: torch.Tensor) -> list[int]:
        """Return the address in this process of each rank's tensor at the same offset, by rank.

        Raises ValueError for a tensor that is not from this pool.
        """
        segment, offset = self.offset_of(tensor)
        return [start + offset for start in self._segments[segment].addresses]

    def locate(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """Return (segment, byte offset) of a tensor's first element; None outside this pool."""
        address, rank = tensor.data_ptr(), self.group.rank
        for number, segment in self._segments.items():
            if 0 <= (offset := address - segment.addresses[rank]) < segment.nbytes:
                return number, offset
        return None

    def offset_of(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Return `locate` of a tensor of this pool. Raises ValueError for others."""
        try:
            found = self.locate(tensor)
        except (RuntimeError, AttributeError) as error:  # it has no address
            raise not_in_pool(tensor) from error
        if found is None:
            raise not_in_pool(tensor)
        return found

    def segment_at(self, address: int) -> Segment | None:
        """Return the segment of an address in this rank's part of the pool; None for others."""
        rank, segments = self.group.rank, self._segments.values()
        return next((s for s in segments if 0 <= address - s.addresses[rank] < s.nbytes), None)

    def push_shard(self, output: torch.Tensor, shard: torch.Tensor) -> None:
        """Store this rank's shard into every peer's symmetric output. Not synchronized."""
        if shard.numel():
            found = self.locate(output)
            assert found, "symmetric outputs are in the pool"
            segment, offset = found[0], found[1] + self.group.rank * shard.nbytes
            for peer in self.peer_order:
                place = self._segments[segment].view(peer, offset, shard.nbytes)
                place.view(shard.dtype).view(shard.shape).copy_(shard)

    def pull_shards(self, output: torch.Tensor, shard: torch.Tensor) -> None:
        """Load every peer's symmetric shard into an output in any memory. Not synchronized."""
        rows = shard.shape[0]
        if shard.numel():
            for peer in self.peer_order:
                output[peer * rows : (peer + 1) * rows].copy_(self.peer_view(shard, peer))

    def _place_after_freeing(self, nbytes: int) -> Block:
        """Free what all ranks have dropped, then place the block; spill if that is not enough."""
        with self.agreement() as call:
            check_can_grow(self.device.type)
            call.must_match(Signature(f"allocate {nbytes} symmetric bytes (no room in the pool)"))
        block = self._allocator.place(nbytes)
        if block is None and self._allocator.is_full():
            raise ValueError(
                f"{MAX_BLOCKS} symmetric tensors are alive; drop some, or copy them. Tensors in a "
                f"captured CUDA graph are never released: gather into caches (into=) in graphs"
            )
        while block is None:
            granules = -(-rounded(nbytes) // _SPILL_GRANULE_BYTES)
            took_ms = self._grow(granules * _SPILL_GRANULE_BYTES, "grow the symmetric pool")
            self.history.add_spill(took_ms)
            self._spilled.add(max(self._segments))
            block = self._allocator.place(nbytes)
        return block

    def _grow(self, nbytes: int, purpose: str) -> float:
        """Add a segment on all ranks; return the milliseconds that this took."""
        start = time.perf_counter()
        with torch._C.DisableTorchFunction():  # `use_symmetric_memory` would allocate in this pool
            segment = self.backend.make_segment(nbytes, purpose)
        register_segment(segment, self.group.rank, self.group.ranks)
        self._segments[len(self._allocator.free_lists)] = segment
        self._allocator.add_segment(nbytes)
        took_ms = (time.perf_counter() - start) * 1e3
        self.history.add_registration(took_ms)
        if self.group.samples_pools:
            self.history.sample(self._allocator)
        return took_ms

    # ------------------------------------------------------------------ agreement

    def agreement(self) -> Agreement:
        """Return a `with` block for the checks before a collective (see CPGroup.agreement).

        At its end every rank also raises SymmetricMemoryError when the ranks' allocations differ,
        and this rank raises BarrierTimeout or CallsDiffer when a kernel of it has reported that.
        """
        self.group.check_thread()
        return Agreement(
            self._exchange, self._allocator.record, self._free_agreed, self.backend.failure
        )

    def agree_again(self, signature: Signature) -> None:
        """Agree on a call that this rank has checked before: `agreement`, in one step."""
        if self.backend.failure:
            with self.agreement():
                return  # the end of the block raises it
        mine = signature.passed + self._allocator.record()
        answers = self._exchange(mine)
        if answers.count(mine) < len(answers):
            call = self.agreement()
            call.must_match(signature)
            call.settle(mine, answers)
        elif self._allocator.released:
            self._free(self._allocator.released)

    def free_dropped(self, purpose: str) -> None:
        """Free the blocks that all ranks have dropped. Collective."""
        with self.agreement() as call:
            call.must_match(Signature(purpose))

    def trim(self) -> None:
        """Return the spilled segments without blocks to the system. Collective."""
        self.free_dropped("trim the pool")
        in_use = {block.segment for block in self._allocator.blocks.values()}
        for number in sorted(self._spilled - in_use):
            self._allocator.drop_segment(number)
            del self._segments[number]
        self._spilled &= in_use

    def _free_agreed(self, states: list[bytes]) -> None:
        """Free the blocks that all ranks have dropped: the AND of their masks."""
        released_everywhere = int.from_bytes(states[0][:MASK_BYTES], "little")
        if states.count(states[0]) < len(states):
            if len({state[MASK_BYTES:_STATE_BYTES] for state in states}) > 1:
                self._raise_divergence()
            for state in states:
                released_everywhere &= int.from_bytes(state[:MASK_BYTES], "little")
        if released_everywhere:
            self._free(released_everywhere)

    def _free(self, released_everywhere: int) -> None:
        self._allocator.free(released_everywhere)
        if self.group.samples_pools:
            self.history.sample(self._allocator)

    def _raise_divergence(self) -> None:
        """Raise on every rank, with what each of them allocated last."""
        answers = self._exchange(msgspec.msgpack.encode(list(self._allocator.recent)))
        recent = [msgspec.msgpack.decode(answer, type=list[int]) for answer in answers]
        raise SymmetricMemoryError(explain_divergence(recent))

    # ----------------------------------------------------------------- moving rows

    def all_gather(
        self,
        shards: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        *,
        symmetric_send: bool = False,
        symmetric_recv: bool = False,
    ) -> PathReport:
        """Gather equal shards; see Backend.all_gather. Collective."""
        return self.backend.all_gather(
            self, shards, outputs, symmetric_send=symmetric_send, symmetric_recv=symmetric_recv
        )

    def push(
        self,
        rows: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        metadata: ContextParallelMetadata,
        slots: torch.Tensor | None = None,
    ) -> PathReport:
        """Store this rank's rows into every peer's outputs; see Backend.push. Collective."""
        return self.backend.push(self, rows, outputs, metadata, slots)

    def all_gather_into_tensor(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        stream: torch.cuda.Stream | None = None,
        *,
        agreed: bool = False,
    ) -> PathReport:
        """Gather equal shards by the best path that the buffers of all ranks allow. Collective.

        See CPGroup.cp_all_gather_into_tensor_async.
        """
        if agreed:
            with on_stream(stream, output, input):
                if self.locate(output):
                    return self.all_gather([input], [output], symmetric_recv=True)
                memory = OrdinaryMemory(self.group, self.device, ASYMMETRIC_BATCH)
                return memory.all_gather([input], [output])
        with stage("agree"), self.agreement() as call:
            check_stream(stream)
            check_gather(output, input, self.group.rank, self.group.size)
            call.must_match(Signature(f"gather {describe(output, input)}"))
            call.state += msgspec.msgpack.encode(locate_pair(input, output, self.group))
        report, unsafe_send, unsafe_recv = self.decide(call)
        with on_stream(stream, output, input):
            if report.path == "fallback":
                # A rank that could not register the pool has no windows; others may have them.
                windows = not self.backend.window_problem()
                send, recv = windows and not unsafe_send, windows and not unsafe_recv
                with stage("wire"):
                    torch_all_gather(
                        output, input, self.group, symmetric_send=send, symmetric_recv=recv
                    )
            else:
                pushes = report.path == "symmetric"
                send = not (pushes and unsafe_send)
                shards, outputs = [copyable(input)], [copyable(output)]
                self.all_gather(shards, outputs, symmetric_send=send, symmetric_recv=pushes)
        return report

    def decide(self, call: Agreement, transport: str = "") -> Decision:
        """Decide from the buffer locations that all ranks added to an agreement's state.

        `transport` defaults to that of this pool.
        """
        locations = tuple([state[_STATE_BYTES:] for state in call.states])
        problem = "" if transport else self.backend.window_problem()
        kind = transport or self.backend.transport()
        return decide_from(locations, self.group.rank, kind, problem)

    # ------------------------------------------------------------------------- life

    def configure(self, prealloc: int | None = None) -> SymmetricPool:
        """Replace the pool by one with another arena; return the new pool. Collective.

        Tensors of the old pool stay valid, but gathers no longer treat them as symmetric.
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
        """Make room for the largest batch now, so that no gather up to that size spills.

        The largest batch has `max_tokens` tokens in `sequences` sequences, and `tensors` tensors
        per gather. Collective. Raises ValueError on every rank for arguments that are not sizes.
        """
        with self.agreement() as call:
            check_warm_up(max_tokens, trailing_shape, dtype, tensors, sequences)
            shape = list(trailing_shape)
            call.must_match(
                Signature(f"warm_up({max_tokens}, {shape}, {dtype}, {tensors}, {sequences})")
            )
        row_bytes = math.prod(trailing_shape) * dtype.itemsize
        needed = tensors * warm_up_bytes(max_tokens, row_bytes, self.group.size, sequences)
        if self._allocator.largest_free() < needed:
            self._make_room(needed, f"warm the symmetric pool up for {max_tokens} tokens")

    def _make_room(self, needed: int, purpose: str) -> None:
        """Add a segment; while no block is held, replace all segments by one larger arena."""
        if self._allocator.blocks:
            self._grow(needed, purpose)
            self._arena_bytes += needed
            return
        old_bytes, larger = self._arena_bytes, max(needed, self._arena_bytes)
        self._allocator, self._segments, self._spilled = BlockAllocator(), {}, set()
        try:
            self._grow(larger, purpose)
        except SymmetricMemoryError:  # on every rank
            self._grow(old_bytes, "make the old arena again")
            raise
        self._arena_bytes = larger

    def check(self) -> None:
        """Raise BarrierTimeout or CallsDiffer when a kernel of this rank has reported it. Local."""
        self.backend.check()

    def stats(self) -> PoolStatistics:
        """Return sizes, counts and times of the pool up to now. Local."""
        return self.history.statistics(self._allocator, self._arena_bytes, len(self._segments))

    def poison_free(self) -> None:
        """Poison all free memory of this rank, so that tests detect unwritten rows. Local."""
        for number, segment in self._segments.items():
            for offset, nbytes in self._allocator.free_lists[number].free_ranges:
                segment.view(self.group.rank, offset, nbytes).fill_(POISON_BYTE)


def _make_backend(group: CPGroup, device: str) -> Backend:
    """Return the backend for this kind of device. Collective.

    Raises ValueError for a device that has none.
    """
    if device == "cpu":
        return PosixBackend(group)
    if device == "cuda" and torch.cuda.is_available():
        from cpkit.memory.cuda import CudaBackend
        from cpkit.memory.nccl import NcclBackend

        return NcclBackend(group) if group.has_nccl else CudaBackend(group)
    raise ValueError(
        f"there is no symmetric memory on {device!r} here; use 'cpu'"
        + (", or 'cuda' on a machine where torch sees a GPU" if device == "cuda" else " or 'cuda'")
    )
