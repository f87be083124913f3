"""Symmetric memory on CUDA: torch.distributed._symmetric_memory, synchronized on the stream.

Ranks can each have a GPU, or share one (TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES, set here where it
is needed). The host never waits for the GPU: `enter` and `leave` launch a kernel that signals every
peer and waits for every peer's signal, so they can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.distributed._symmetric_memory as symm_mem

from cpkit.devices import Replay, is_capturing, keep_for_replays, raw_stream
from cpkit.group import CPGroup
from cpkit.kernels import launch
from cpkit.kernels.gather_kernel import DIFFERS, MAX_RANKS, PAGE_WORDS, TAG_BITS
from cpkit.kernels.launch import Cut, TileTables, launch_entry, launch_exit
from cpkit.kernels.tiles import WIDE_BYTES
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.backend import (
    SHARDS_MOVED,
    STORED_IN_PLACE,
    Place,
    Pool,
    Prepared,
    Repeated,
    bytes_per_row,
    row_stride,
)
from cpkit.memory.cuda_segment import CudaSegment
from cpkit.memory.path import PathReport
from cpkit.settings import deadline_s
from cpkit.stages import stage
from cpkit.sync.barrier import BarrierTimeout, CallsDiffer
from cpkit.sync.exchange import SegmentOffer, agree_on_segment

_Launch = Callable[[launch.Signals], None]
_MAX_DEFAULT_BYTES = 4 << 30  # upstream's (SGLang, arg_groups/memory_hook.py, #19082)
_STAGED = PathReport(
    "staged",
    "NCCL does not support two ranks on one GPU, so each rank copied its shard into the pool, and "
    "its peers pulled it from there into ordinary memory",
    "a copy in the pool",
    "ordinary memory",
)


class CudaBackend:
    """Memory that peers' kernels store into. Making one is collective over the group.

    `page` is the address of this rank's page of signal words, and `pages` holds those of all ranks
    (see cpkit.kernels.gather_kernel). `report` is a word of host memory in which a kernel names the
    rank that did not arrive in time, or that is in another call.
    """

    name = "torch.distributed._symmetric_memory"

    def __init__(self, group: CPGroup) -> None:
        if group.size > MAX_RANKS:
            raise ValueError(f"cp_size is {group.size}; kernels signal at most {MAX_RANKS} ranks")
        self.group = group
        self.device = torch.device("cuda", torch.cuda.current_device())
        if group.shares_gpu:
            os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        self.report = torch.zeros(1, dtype=torch.int32, device="cpu").pin_memory()
        self._report = self.report.numpy()  # read at every call: a tensor's item takes microseconds
        # All ranks push in the same order, so equal numbers mean the same call (0 is for barriers).
        self.tags = cycle(range(1, 1 << TAG_BITS))
        self._page = self.make_segment(PAGE_WORDS * 8, "make the signal pages")
        self._page.view(group.rank, 0, PAGE_WORDS * 8).zero_()
        torch.cuda.synchronize()
        group.exchange(b"")  # so that no rank signals into a page before it is zeroed
        self.page, self.pages = self._page.addresses[group.rank], self._page.peers
        self.tables = TileTables(group.rank, self.device)
        self.kernels: dict[object, launch.Compiled] = {}
        self._stream, self._raw_stream = torch.cuda.current_stream(), raw_stream()
        self._replays: dict[tuple[_Launch, float], Replay[None]] = {}
        launch_entry(self)  # compiles both now, not while a peer waits or a graph is captured
        launch_exit(self)

    # ------------------------------------------------------------------- moving rows

    def all_gather(
        self,
        pool: Pool,
        shards: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        *,
        symmetric_send: bool,
        symmetric_recv: bool,
    ) -> PathReport:
        """Push into symmetric outputs, pull from symmetric shards, or stage in the pool.

        As PosixBackend does, in stream order. The host's agreement does not order the streams, so
        `enter` waits until the stream of every rank is done with its buffers.
        """
        if not (symmetric_send or symmetric_recv):
            return self._gather_staged(pool, shards, outputs)
        move = pool.push_shard if symmetric_recv else pool.pull_shards
        with stage("wire"):
            self.enter()
            for output, shard in zip(outputs, shards, strict=True):
                move(output, shard)
        with stage("exit"):
            self.leave()
        return SHARDS_MOVED[symmetric_send, symmetric_recv]

    def _gather_staged(
        self, pool: Pool, shards: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> PathReport:
        """Gather into ordinary memory where ranks share a GPU: pull from the peers' stages.

            rank 0   shard → stage 0 │ barrier │ pull stage 0, stage 1 │ barrier │ stage 0 is free
            rank 1   shard → stage 1 │ barrier │ pull stage 1, stage 0 │ barrier │ stage 1 is free

        Only this rank writes to its stage, so the copy into it needs no barrier.
        """
        with stage("wire"):
            stages = [pool.empty(shard.shape, shard.dtype) for shard in shards]
            for staged, shard in zip(stages, shards, strict=True):
                staged.copy_(shard)
            self.leave()
            for output, staged in zip(outputs, stages, strict=True):
                pool.pull_shards(output, staged)
        with stage("exit"):
            self.leave()
        return _STAGED

    def push(
        self,
        pool: Pool,
        rows: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        metadata: ContextParallelMetadata,
        slots: torch.Tensor | None = None,
    ) -> PathReport:
        """Launch one kernel, which includes the entry and exit synchronization.

        Source of the idea: vLLM #49517 (each rank stores final rows into every peer's cache).
        """
        with stage("wire"):
            self._launch_push(next(self.tags), pool, rows, outputs, metadata, slots)
        return STORED_IN_PLACE

    def _launch_push(
        self,
        tag: int,
        pool: Pool,
        rows: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        metadata: ContextParallelMetadata,
        slots: torch.Tensor | None = None,
        *,
        entry: bool = True,
    ) -> None:
        """Launch the kernel; `entry=False` where all outputs are known to be free (cpkit.plan)."""
        present = [(x, y) for x, y in zip(rows, outputs, strict=True) if y.numel()]
        if not present:
            self.leave()
            return
        sources = tuple([x.data_ptr() for x, _ in present])
        targets = tuple([y.data_ptr() for _, y in present])
        addresses = sources, targets, tuple([_segment_table(pool, y) for y in targets])
        row_bytes = [bytes_per_row(x) for x, _ in present]
        pitches = () if slots is None else [y.stride(0) * y.element_size() for _, y in present]
        entry = entry and not launch.enter_alone(self)
        prepared = self.tables.prepare(
            self, metadata, addresses, row_bytes, pitches, slots, entry=entry
        )
        launch.launch(self, prepared, addresses, slots, tag)

    def repeat(self, metadata: ContextParallelMetadata, row_bytes: Sequence[int]) -> Repeated:
        """Return a launch that finds its kernel and tiles by the alignment of the rows."""
        return _RepeatedPush(self, metadata, row_bytes)

    def prepare(
        self,
        pool: Pool,
        rows: Sequence[torch.Tensor],
        output_sets: Sequence[Sequence[torch.Tensor]],
        metadata: ContextParallelMetadata,
    ) -> tuple[list[Prepared], PathReport]:
        """Make one CUDA graph per set of outputs."""
        capture = _Capture()
        pushes: list[Prepared] = []
        for outputs in output_sets:
            run = partial(self._launch_push, next(self.tags), pool, rows, outputs, metadata)
            pushes.append(_PreparedPush(self, run, capture))
        return pushes, STORED_IN_PLACE

    def can_capture(
        self,
        tensors: Sequence[torch.Tensor],
        metadata: ContextParallelMetadata,
        into: Sequence[torch.Tensor] | None,
    ) -> bool:
        """Return True when kernel and table exist: capture allows neither to be made."""
        sizes = [math.prod(x.shape[1:]) * x.element_size() for x in tensors]
        # Buffers allocated here, outputs and dense copies of strided rows, are 16-byte aligned.
        sources = [x.data_ptr() if x.is_contiguous() else 0 for x in tensors]
        targets, pitches, present = [0] * len(sizes), [], [i for i, n in enumerate(sizes) if n]
        if into is not None:
            present = [i for i in present if into[i].numel()]
            targets = [cache.data_ptr() for cache in into]
            pitches = [row_stride(into[i]) * into[i].element_size() for i in present]
        cut = Cut.of(
            metadata.max_rank_len[0],
            [sizes[i] for i in present],
            [(sources[i], targets[i]) for i in present],
            pitches,
        )
        return not present or self.tables.has(metadata, cut)

    # ------------------------------------------------------------------------- memory

    def default_prealloc(self) -> int:
        """Return 4 GiB as upstream, at most an eighth of the free memory per rank on this GPU."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(min(free // (8 * max(1, self.group.ranks_on_gpu)), _MAX_DEFAULT_BYTES))

    def make_segment(self, nbytes: int, purpose: str) -> CudaSegment:
        """Allocate from torch's symmetric memory and map the peers'. Collective.

        rank 0   allocate ─ all allocated? ─ rendezvous ─ all mapped? ─ continue
        rank 1   allocate ─ all allocated? ─ rendezvous ─ all mapped? ─ continue
                            ↑ out of memory on one: all ranks raise, so none waits at rendezvous
        """
        exchange = self.group.store_exchange
        pool, buffer, problem = self._allocate(nbytes)
        agree_on_segment(exchange, SegmentOffer("", nbytes, problem), purpose)
        assert buffer is not None
        handle, problem = self._map(buffer)
        mapping = f"{purpose} (map the peers' memory)"
        agree_on_segment(exchange, SegmentOffer("", nbytes, problem), mapping)
        return CudaSegment(buffer, pool, handle, self.device)

    def _allocate(self, nbytes: int) -> tuple[torch.cuda.MemPool, torch.Tensor | None, str]:
        """Allocate symmetric memory in a new pool; return pool, memory, and why that failed.

        The options are those of `symm_mem.get_mem_pool`: blocks are not split, and other tensors
        cannot use the pool when memory runs out.
        """
        allocator = symm_mem.get_mempool_allocator(self.device)
        pool = torch.cuda.MemPool(allocator, use_on_oom=False, no_split=True)
        try:
            with torch.cuda.use_mem_pool(pool):
                return pool, torch.empty(nbytes, dtype=torch.uint8, device=self.device), ""
        except RuntimeError as error:  # out of memory has more than one type
            return pool, None, self._no_room(nbytes, error)

    def _no_room(self, nbytes: int, error: Exception) -> str:
        free, total = torch.cuda.mem_get_info(self.device)
        return (
            f"{self.device} has {free} of {total} bytes free, and {nbytes} were requested, "
            f"with {self.group.ranks_on_gpu} rank(s) on this GPU. Ask for less "
            f"(SymmetricPool(group, prealloc=…), CPKIT_SYMM_PREALLOC_GB), or use fewer ranks. "
            f"torch says: {str(error).splitlines()[0]}"
        )

    def _map(self, buffer: torch.Tensor) -> tuple[Any, str]:
        try:
            return symm_mem.rendezvous(buffer, self.group.process_group), ""
        except RuntimeError as error:
            return None, (
                f"cannot map the peers' memory: {error}. (With a GPU per rank, every rank must see "
                f"all GPUs: if CUDA_VISIBLE_DEVICES names one each, torch mistakes them for one.)"
            )

    # ---------------------------------------------------------------- synchronization

    def enter(self) -> None:
        """Wait on the stream until the outputs of all ranks are free. `leave` must follow."""
        self._replay(launch_entry)

    def leave(self) -> None:
        """Wait on the stream until the earlier stores of all ranks have arrived."""
        self._replay(launch_exit)

    def in_order(self) -> int:
        """Make the current stream wait for this rank's launches on other streams; return it.

        A rank has one page of counters, so its launches must not overlap. Replays of a graph that a
        caller captured are ordered by the caller.
        """
        stream = raw_stream()
        if stream != self._raw_stream and not is_capturing("cuda"):
            before, self._stream = self._stream, torch.cuda.current_stream()
            self._stream.wait_stream(before)
            self._raw_stream = stream
        return stream

    def _replay(self, run: _Launch) -> None:
        """Replay a graph of one kernel, which costs the host a tenth of a launch by Triton."""
        if is_capturing("cuda") or not launch.SYNC:
            run(self)
            return
        key = run, deadline_s()
        if key not in self._replays:
            self._replays[key] = Replay(partial(run, self))
        self.in_order()
        self._replays[key]()

    def put_signal(self, peer: int) -> None:
        """Signal on the stream, by torch's own kernel, which traps after the deadline."""
        self._page.handle.put_signal(peer, 0, int(deadline_s() * 1e3))

    def wait_signal(self, peer: int) -> None:
        """Wait on the stream, by torch's own kernel; the host does not wait."""
        self._page.handle.wait_signal(peer, 0, int(deadline_s() * 1e3))

    @property
    def failure(self) -> BarrierTimeout | CallsDiffer | None:
        """What a kernel reported: a rank that was late, or in another call; None if nothing."""
        found = int(self._report[0])
        if not found:
            return None
        cp_size, rank = self.group.size, self.group.rank
        since = "The group has been out of step since then: restart the job."
        if found > DIFFERS:
            return CallsDiffer(
                f"cp_size {cp_size}: rank {rank} and rank {found - 1 - DIFFERS} were in different "
                f"gathers: they called different plans, or replayed different graphs. The results "
                f"of this call and of later ones are incomplete. Every rank has to make the same "
                f"calls in the same order. {since}"
            )
        return BarrierTimeout(
            f"cp_size {cp_size}: a kernel of rank {rank} waited {deadline_s():g} s for rank "
            f"{found - 1}, which did not launch its gather, died in it, or replayed its graph a "
            f"different number of times. {since}"
        )

    def check(self) -> None:
        """Raise BarrierTimeout or CallsDiffer when a kernel reported a rank."""
        failure = self.failure
        if failure:
            raise failure

    def transport(self) -> str:
        """Return "cuda": the ranks push over peer access, or inside one GPU."""
        return "cuda"

    def window_problem(self) -> str:
        """Return "": NCCL does not move these rows."""
        return ""


@dataclass
class _Capture:
    """Whether a caller's graph has captured a push of one plan; shared by all its pushes."""

    happened: bool = False


class _PreparedPush:
    """`push` as a CUDA graph of one kernel, for one of the sets of outputs of a plan.

    Making one is collective: the kernel runs with and without its entry synchronization, because it
    cannot be compiled during capture. Once a caller's graph has captured a push, it is unknown when
    its replays fill which outputs, so every push of the plan waits at its entry from then on.
    """

    def __init__(self, backend: CudaBackend, run: Callable[..., None], capture: _Capture) -> None:
        self._backend, self._run, self._capture = backend, run, capture
        run(entry=True)
        run(entry=False)
        self._replay = Replay(partial(run, entry=False))

    def __call__(self) -> None:
        """Gather in stream order. Raises what an earlier call reported (`CudaBackend.check`)."""
        self._backend.check()
        with stage("wire"):
            if is_capturing("cuda"):
                self._capture.happened = True
                keep_for_replays("cuda", self)
            if self._capture.happened:
                self._run(entry=True)
            else:
                self._backend.in_order()
                self._replay()
        with stage("exit"):
            pass  # inside the kernel


class _RepeatedPush:
    """`push` from addresses; see cpkit.repeat."""

    def __init__(
        self, backend: CudaBackend, metadata: ContextParallelMetadata, row_bytes: Sequence[int]
    ) -> None:
        self._backend, self._rank = backend, backend.group.rank
        self._metadata, self._row_bytes = metadata, tuple(row_bytes)

    def __call__(self, sources: Sequence[int], places: Sequence[Place]) -> None:
        backend, targets, tables = self._backend, [], []
        tag = next(backend.tags)  # first, as in every push
        for segment, offset in places:
            assert isinstance(segment, CudaSegment)
            targets.append(segment.addresses[self._rank] + offset)
            tables.append(segment.table)
        addresses = tuple(sources), tuple(targets), tuple(tables)
        entry = not launch.enter_alone(backend)
        low_bits = [a % WIDE_BYTES if a else None for a in sources]
        key = "repeated", self._metadata, self._row_bytes, entry, launch.SYNC, *low_bits
        prepared = backend.tables.prepared(key)
        if prepared is None:
            prepared = backend.tables.prepare(
                backend, self._metadata, addresses, self._row_bytes, (), None, entry=entry
            )
            backend.tables.keep(key, prepared)
        launch.launch(backend, prepared, addresses, None, tag)


def _segment_table(pool: Pool, address: int) -> int:
    """Return the address of the table of the ranks' segments that an output is in."""
    segment = pool.segment_at(address)
    assert isinstance(segment, CudaSegment)
    return segment.table
