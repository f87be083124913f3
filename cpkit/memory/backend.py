"""The interface between a gather and one kind of memory, and what its implementations share.

    ordinary   torch.distributed only                  groups that span machines
    posix      POSIX shared memory                     CPU ranks of one machine
    cuda       torch's symmetric memory, own kernels   GPUs with peer access, ranks that share a GPU
    nccl       the same, and NCCL's collectives        a GPU per rank

`all_gather`, `push` and `prepare` move rows, and each returns the path that the rows took.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from cpkit.layout import ContextParallelMetadata
from cpkit.memory.path import PathReport
from cpkit.sync.collective import copyable

ORDINARY_COLLECTIVE = PathReport(
    "fallback",
    "both buffers are in ordinary memory: the collective of torch.distributed moved the rows",
    "ordinary memory",
    "ordinary memory",
)
# By which buffers are symmetric: (send, recv).
SHARDS_MOVED = {
    (False, True): PathReport(
        "symmetric",
        "each rank stored its shard, padded in ordinary memory, into every peer's receive buffer",
        "ordinary memory",
        "in the pool",
    ),
    (True, True): PathReport(
        "symmetric",
        "each rank stored its padded shard into every peer's receive buffer",
        "in the pool",
        "in the pool",
    ),
    (True, False): PathReport(
        "staged",
        "each rank loaded its peers' shards from the symmetric send buffers",
        "in the pool",
        "ordinary memory",
    ),
}
STORED_IN_PLACE = PathReport(
    "symmetric",
    "each rank stored its rows at their final place in every peer's output",
    "ordinary memory (read in place)",
    "in the pool",
)
Prepared = Callable[[], None]  # one push, including its synchronization
Place = tuple["Segment", int]  # where a block is: its segment, and its offset in bytes
# One push, including its synchronization, from the addresses of the rows to these outputs.
Repeated = Callable[[Sequence[int], Sequence[Place]], None]


class Segment(Protocol):
    """One allocation of `nbytes` on every rank of a group.

    `addresses[rank]` is where that rank's memory is in this process.
    """

    nbytes: int
    addresses: list[int]

    def view(self, rank: int, offset: int, nbytes: int) -> torch.Tensor:
        """Return bytes of a rank's memory: uint8 `[nbytes]`."""

    def block(
        self,
        offset: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        release: Callable[[], object],
    ) -> torch.Tensor:
        """Return own memory; `release` is called when the last tensor over it is dropped."""


class Pool(Protocol):
    """The part of a pool that its backend uses."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate at the same offset on every rank."""

    peer_order: list[int]  # all ranks, this one first

    def push_shard(self, output: torch.Tensor, shard: torch.Tensor) -> None:
        """Store this rank's shard into every peer's symmetric output. Not synchronized."""

    def pull_shards(self, output: torch.Tensor, shard: torch.Tensor) -> None:
        """Load every peer's symmetric shard into an output. Not synchronized."""

    def peer_view(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """Return the same tensor in a peer's memory."""

    def peer_addresses(self, tensor: torch.Tensor) -> list[int]:
        """Return the address of the same tensor of each rank, by rank."""

    def segment_at(self, address: int) -> Segment | None:
        """Return the segment of an address in this rank's part of the pool; None for others."""


class Backend(Protocol):
    """One kind of memory of one group."""

    name: str
    device: torch.device

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
        """Gather equal shards, `[rows, lanes]` each, into `[size · rows, lanes]` in rank order.

        `symmetric_send` and `symmetric_recv`: all ranks agreed that these buffers are in the pool,
        at one offset. Complete on return; on CUDA in stream order. Collective.
        """

    def push(
        self,
        pool: Pool,
        rows: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        metadata: ContextParallelMetadata,
        slots: torch.Tensor | None = None,
    ) -> PathReport:
        """Store this rank's rows, contiguous `[rows, …]` each, into every peer's outputs.

        Outputs, `[total_tokens, …]` each, are in the pool at one offset on all ranks. With `slots`
        (int64 `[total_tokens]`) outputs are caches, `[slots, lanes]`, whose rows may lie apart:
        token t goes to row `slots[t]`, and is dropped where that is -1. Complete on return; on CUDA
        in stream order. Collective.
        """

    def prepare(
        self,
        pool: Pool,
        rows: Sequence[torch.Tensor],
        output_sets: Sequence[Sequence[torch.Tensor]],
        metadata: ContextParallelMetadata,
    ) -> tuple[list[Prepared], PathReport]:
        """Return one prepared `push` per set of outputs, to be called many times. Collective."""

    def repeat(
        self, metadata: ContextParallelMetadata, row_bytes: Sequence[int]
    ) -> Repeated | None:
        """Return a `push` of contiguous rows of these sizes; None where it would not be faster.

        Local.
        """

    def can_capture(
        self,
        tensors: Sequence[torch.Tensor],
        metadata: ContextParallelMetadata,
        into: Sequence[torch.Tensor] | None,
    ) -> bool:
        """Return True when a push of this layout can be captured in a CUDA graph now."""

    # -------------------------------------------------------------------------- memory

    def default_prealloc(self) -> int:
        """Return the default size of the arena in bytes."""

    def make_segment(self, nbytes: int, purpose: str) -> Segment:
        """Allocate on every rank and map the peers' memory. Collective, with a deadline.

        Raises SymmetricMemoryError on every rank when one of them has no room.
        """

    # ----------------------------------------------------------------- synchronization

    def enter(self) -> None:
        """Wait until the outputs of all ranks are free to be written. Collective."""

    def leave(self) -> None:
        """Wait until the stores of all ranks have arrived. Collective."""

    def put_signal(self, peer: int) -> None:
        """Signal a peer that this rank's stores have arrived.

        Blocks until the peer has consumed the previous signal.
        """

    def wait_signal(self, peer: int) -> None:
        """Wait for a peer's signal, and consume it."""

    @property
    def failure(self) -> Exception | None:
        """What a kernel of this rank has reported: BarrierTimeout or CallsDiffer; usually None."""

    def check(self) -> None:
        """Raise `failure`, if there is one. Local."""

    def transport(self) -> str:
        """Return the transport of an equal-sized gather: see cpkit.memory.path."""

    def window_problem(self) -> str:
        """Return why NCCL has no window on this memory; empty if it has one or is not used."""


# ------------------------------------------------------------------------ rows as integers
#
# A lane is the widest integer whose size divides a row and its offset in memory. Rows are copied as
# `[rows, lanes]`, so that fp8 and bool are bit-exact like any other dtype.

LANES = (
    torch.int64, torch.uint8, torch.int16, torch.uint8,
    torch.int32, torch.uint8, torch.int16, torch.uint8,
)  # fmt: skip


def as_dense(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor with the bytes of `x`: itself, or a copy."""
    is_dense = x.is_contiguous() and not (x.is_conj() or x.is_neg())
    return x if is_dense and type(x) is torch.Tensor else copyable(x).contiguous()


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """View a tensor `[rows, …]` as `[rows, lanes]`; copy it first if it is not contiguous."""
    row_items = math.prod(x.shape[1:])
    row_bytes = row_items * x.element_size()
    if row_bytes == 0:
        return torch.empty(x.shape[0], 0, dtype=torch.uint8, device=x.device)
    dense = as_dense(x)
    if dense.requires_grad:
        dense = dense.detach()
    # A single row counts as contiguous with any strides, but the view below needs the usual ones.
    flat = dense.as_strided((x.shape[0], row_items), (row_items, 1))
    offset_bytes = int(flat.storage_offset()) * x.element_size()
    # An or is a multiple of 2, 4 or 8 only when all its terms are.
    return flat.view(LANES[(row_bytes | offset_bytes) % 8])


def from_rows(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """View `[rows, lanes]` with the dtype and the trailing shape of `like`."""
    if rows.shape[1] == 0:
        return rows.flatten().view(like.dtype).view(rows.shape[0], *like.shape[1:])
    return rows.view(like.dtype).view(rows.shape[0], *like.shape[1:])


def bytes_per_row(x: torch.Tensor) -> int:
    """Return the bytes of one row of `[rows, …]`."""
    return x.shape[1:].numel() * x.element_size()


def row_stride(cache: torch.Tensor) -> int:
    """Return the elements from one row of a cache, `[slots, …]`, to the next.

    A single row has any stride; this returns its length.
    """
    return cache.stride(0) if len(cache) > 1 else math.prod(cache.shape[1:])


def same_lanes(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """View two `[rows, lanes]` with the narrower of their lanes; rows have equal bytes."""
    lane = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return a.view(lane), b.view(lane)
