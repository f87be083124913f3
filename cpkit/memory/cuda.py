"""Symmetric memory on CUDA: torch.distributed._symmetric_memory, synchronized on the stream.

Ranks may each have a GPU of their own, or share one (TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES, set
here where it is needed). Nothing waits for the GPU on the host: `enter` and `leave` are a kernel
that signals every peer and waits for every peer's signal, so they can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._symmetric_memory as symm_mem

from cpkit.devices import is_capturing, loaded_nccl_version, raw_stream
from cpkit.group import CPGroup
from cpkit.kernels import launch as cuda_launch
from cpkit.kernels.gather_kernel import MAX_RANKS, PAGE_WORDS
from cpkit.kernels.launch import launch_entry, launch_exit
from cpkit.memory.collective import plain_all_gather
from cpkit.sync.barrier import BarrierTimeout
from cpkit.sync.exchange import deadline_s
from cpkit.sync.offers import Offer, SymmetricMemoryError, agree

_Launch = Callable[[cuda_launch.Signals], None]
_MAX_DEFAULT_BYTES = 4 << 30  # upstream's (SGLang, arg_groups/memory_hook.py, #19082)


class _Owner:
    """Memory that torch sees through the array interface; it lives as long as a tensor over it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
        self.segment: CudaSegment | None = None


class CudaSegment:
    """One allocation on every rank, mapped by all: a tensor in a memory pool of its own.

    With its own pool, memory that has been dropped goes back to the GPU and is never handed out
    again. From one pool for all, two free segments of a size could be taken in another order on
    another rank, and peers would be paired wrongly (pytorch#178138).
    """

    def __init__(
        self, buffer: torch.Tensor, pool: torch.cuda.MemPool, handle: Any, device: torch.device
    ) -> None:
        self._buffer, self._pool, self.handle, self._device = buffer, pool, handle, device
        self.nbytes = buffer.numel()
        self._shift = buffer.data_ptr() - handle.buffer_ptrs[handle.rank]
        self.addresses = [pointer + self._shift for pointer in handle.buffer_ptrs]
        self.peers = torch.tensor(self.addresses, dtype=torch.int64, device="cpu").to(device)

    def view(self, rank: int, offset: int, nbytes: int) -> torch.Tensor:
        """Bytes of a rank's memory: uint8 `[nbytes]`."""
        start = self._shift + offset
        view: torch.Tensor = self.handle.get_buffer(rank, [nbytes], torch.uint8, start)
        return view

    def block(self, offset: int, nbytes: int, release: Callable[[], object]) -> torch.Tensor:
        """Own bytes; calls `release` when the last tensor over them has gone."""
        owner = _Owner(self._buffer.data_ptr() + offset, nbytes)
        owner.segment = self  # a held block keeps its memory, also when its pool has been replaced
        weakref.finalize(owner, release).atexit = False
        return torch.as_tensor(owner, device=self._device)


class CudaBackend:
    """Memory that peers' kernels store into. Making one is collective over the group.

    `pages` holds the address of each rank's page of signal words (see
    cpkit.kernels.gather_kernel); `late` is a word of host memory in which a kernel stores which
    rank did not arrive in time.
    """

    name = "torch.distributed._symmetric_memory"

    def __init__(self, group: CPGroup) -> None:
        if group.size > MAX_RANKS:
            raise ValueError(f"cp_size is {group.size}; kernels signal at most {MAX_RANKS} ranks")
        self.group = group
        self.device = torch.device("cuda", torch.cuda.current_device())
        if group.shares_gpu:
            os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        self.late = torch.zeros(1, dtype=torch.int32, device="cpu").pin_memory()
        self._late = self.late.numpy()  # read at every call: a tensor's item takes microseconds
        self._windows = self._prepare_windows()
        self._page = self.make_segment(PAGE_WORDS * 8, "make the signal pages")
        self._page.view(group.rank, 0, PAGE_WORDS * 8).zero_()
        torch.cuda.synchronize()
        group.exchange(b"")  # nobody signals into a page that is not zero yet
        self.pages = self._page.peers
        self._stream, self._raw_stream = torch.cuda.current_stream(), raw_stream()
        self._graphs: dict[tuple[_Launch, float], torch.cuda.CUDAGraph] = {}
        launch_entry(self)  # both are compiled now, and not while a peer waits or a graph is made
        launch_exit(self)

    def default_prealloc(self) -> int:
        """4 GiB as upstream, but at most an eighth of the free memory for each rank on this GPU."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(min(free // (8 * max(1, self.group.ranks_on_gpu)), _MAX_DEFAULT_BYTES))

    def make_segment(self, nbytes: int, purpose: str) -> CudaSegment:
        """Allocate from torch's symmetric memory and map the peers'. Collective.

        rank 0   allocate ─ all have? ─ rendezvous ─ all have? ─ go on
        rank 1   allocate ─ all have? ─ rendezvous ─ all have? ─ go on
                            ↑ out of memory on one: every rank raises, nobody waits in the
                            rendezvous
        """
        meeting = self.group.rendezvous
        pool, buffer, problem = self._allocate(nbytes)
        agree(meeting, Offer("", nbytes, problem), purpose)
        assert buffer is not None
        handle, problem = self._map(buffer)
        agree(meeting, Offer("", nbytes, problem), f"{purpose} (map the peers' memory)")
        if self._uses_nccl and not self._windows:
            self._windows = self._register_window(pool)
        return CudaSegment(buffer, pool, handle, self.device)

    def enter(self) -> None:
        """On the stream: every rank has come here, so its buffers may be written. Then `leave`."""
        self._replay(launch_entry)

    def leave(self) -> None:
        """On the stream: every rank's stores before it have landed."""
        self._replay(launch_exit)

    def in_order(self) -> None:
        """Make the current stream wait for this rank's launches on other streams.

        A rank has one page of counters, so it has one launch at a time. Replays of a graph that a
        caller captured are the caller's to order.
        """
        if is_capturing("cuda") or raw_stream() == self._raw_stream:
            return
        before, self._stream = self._stream, torch.cuda.current_stream()
        self._stream.wait_stream(before)
        self._raw_stream = raw_stream()

    def _replay(self, launch: _Launch) -> None:
        """As a graph of one kernel: a replay is a tenth of what Triton's launch costs the host."""
        if is_capturing("cuda") or not cuda_launch.SYNC:
            launch(self)
            return
        key = launch, deadline_s()
        if key not in self._graphs:
            graph = self._graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                launch(self)
        self.in_order()
        self._graphs[key].replay()

    def put_signal(self, peer: int) -> None:
        """On the stream, by torch's own kernel, which traps when the deadline has passed."""
        self._page.handle.put_signal(peer, 0, int(deadline_s() * 1e3))

    def wait_signal(self, peer: int) -> None:
        """As `put_signal`; the host does not wait."""
        self._page.handle.wait_signal(peer, 0, int(deadline_s() * 1e3))

    def late_words(self) -> str:
        """Which rank a kernel waited for in vain, in words; empty when none did."""
        late = int(self._late[0])
        if not late:
            return ""
        return (
            f"cp_size {self.group.size}: a kernel of rank {self.group.rank} waited "
            f"{deadline_s():g} s for rank {late - 1}, which did not launch its gather, died in it, "
            f"or replayed its graph another number of times. The group is out of step since then: "
            f"start the job anew."
        )

    def check(self) -> None:
        """Raise BarrierTimeout when a kernel gave up waiting, with the rank that did not come."""
        late = self.late_words()
        if late:
            raise BarrierTimeout(late)

    def transport(self) -> str:
        """NCCL where each rank has a GPU of its own, else pushes over peer access."""
        if not self.group.has_nccl:
            return "cuda"
        return "nccl " + ".".join(map(str, loaded_nccl_version()))

    def window_problem(self) -> str:
        """Why NCCL does not know the pool's memory; empty when it does, or has no part in this."""
        return self._windows

    @property
    def _uses_nccl(self) -> bool:
        """A rank alone has nobody to gather from."""
        return self.group.has_nccl and self.group.size > 1

    def _prepare_windows(self) -> str:
        """Why NCCL can't have windows here; empty when it can, or has no part in this. Collective.

        NCCL wants a communicator that has run a collective already (pytorch#188567).
        """
        if not self._uses_nccl:
            return ""
        if self.group.shares_gpu:
            return "ranks share a GPU, and NCCL has no symmetric windows there"
        word = torch.zeros(1, dtype=torch.uint8, device=self.device)
        everybody = torch.empty(self.group.size, dtype=torch.uint8, device=self.device)
        plain_all_gather(everybody, word, self.group)
        torch.cuda.synchronize()
        return ""

    def _register_window(self, pool: torch.cuda.MemPool) -> str:
        """Have NCCL know a segment; on every rank why it does not, if so. Collective."""
        problem = ""
        try:
            nccl: Any = self.group.process_group._get_backend(self.device)
            nccl.register_mem_pool(pool, symm=True)
            _never_free(pool)
        except (RuntimeError, AttributeError, TypeError) as error:
            problem = f"NCCL did not register the pool: {str(error).splitlines()[0]}"[:200]
        answers = self.group.exchange(problem.encode())
        return next((answer.decode() for answer in answers if answer), "")

    def _allocate(self, nbytes: int) -> tuple[torch.cuda.MemPool, torch.Tensor | None, str]:
        """Memory of torch's symmetric allocator, or why there is none, and the pool that it is in.

        The pool is made as `symm_mem.get_mem_pool` makes its own: no splitting, no lending.
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
            f"{self.device} has {free} of {total} bytes free, and {nbytes} were asked for, "
            f"with {self.group.ranks_on_gpu} rank(s) on this GPU. Ask for less "
            f"(SymmetricPool(group, prealloc=…), CPKIT_SYMM_PREALLOC_GB), or use fewer ranks. "
            f"torch says: {str(error).splitlines()[0]}"
        )

    def _map(self, buffer: torch.Tensor) -> tuple[Any, str]:
        try:
            return symm_mem.rendezvous(buffer, self.group.process_group), ""
        except RuntimeError as error:
            return None, (
                f"cannot map the peers' memory: {error}. (Ranks with GPUs of their own must all "
                f"see them: with one in CUDA_VISIBLE_DEVICES each, torch takes them for the same.)"
            )


def _never_free(pool: torch.cuda.MemPool) -> None:
    """Keep a pool that NCCL knows, and its memory on the GPU, for as long as the process lives.

    NCCL's hook on it outlives the communicator: freeing the pool after `destroy_process_group` ends
    the process in std::terminate (~MemPool, torch 2.11).
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))


__all__ = ["CudaBackend", "CudaSegment", "SymmetricMemoryError"]
