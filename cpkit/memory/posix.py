"""Symmetric memory on the CPU: shared files that every rank maps, and copies into them.

How a rank stores its rows at their final place in every peer's output:

    for each tile of its rows        loaded from memory once ...
        for each peer, itself first  ... and stored to all of them while this core's cache holds it

A tile is 1 MiB, the size of a server core's second-level cache. Copies of whole blocks would load
the rows from memory once per peer, and small tiles would change pages too often; each costs up to
30 % at 134 MB. Dense tiles use C's memmove, which is 10 % faster than a loop of vector stores. Rows
that are not adjacent in token order (interleave) use torch's strided copy.

Tiles are cached per layout, so a gather does no work per row and little per tile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch

from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata, Runs
from cpkit.memory.backend import (
    ORDINARY_COLLECTIVE,
    SHARDS_MOVED,
    STORED_IN_PLACE,
    Place,
    Pool,
    Prepared,
    Repeated,
    as_rows,
    bytes_per_row,
    same_lanes,
)
from cpkit.memory.path import PathReport
from cpkit.stages import stage
from cpkit.sync.barrier import ShmBarrier
from cpkit.sync.collective import torch_all_gather
from cpkit.sync.shm import Segment, free_bytes, make_segment
from cpkit.sync.signals import ShmSignals

TILE_BYTES = 1 << 20
_MAX_DEFAULT_BYTES = 64 << 20
Copy = Callable[[], object]
Tiles = list[tuple[int, int, int]]  # place in the output, place in the rows, length, in bytes


class PosixBackend:
    """Shared files that every rank maps. Making one is collective; stores complete on return."""

    name = "POSIX shared memory"
    device = torch.device("cpu")
    failure: Exception | None = None  # a barrier that times out raises where it waits

    def __init__(self, group: CPGroup) -> None:
        assert group.shm_barrier, "the ranks of one machine have a barrier in shared memory"
        self.group, self._barrier = group, group.shm_barrier
        self._signals = ShmSignals(group.store_exchange)

    def all_gather(
        self,
        pool: Pool,
        shards: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        *,
        symmetric_send: bool,
        symmetric_recv: bool,
    ) -> PathReport:
        """Push into symmetric outputs, pull from symmetric shards, or use torch.distributed.

        push   agreement │ store into 0, into 1 │ barrier: all rows have arrived
        pull   agreement │ load from 0, from 1  │ barrier: the shards are free again
        """
        if not (symmetric_send or symmetric_recv):
            with stage("wire"):
                for output, shard in zip(outputs, shards, strict=True):
                    torch_all_gather(output, shard, self.group)
            return ORDINARY_COLLECTIVE
        move = pool.push_shard if symmetric_recv else pool.pull_shards
        try:
            with stage("wire"):
                for output, shard in zip(outputs, shards, strict=True):
                    move(output, shard)
            with stage("exit"):
                self._barrier.barrier()
        except Exception as error:
            self.group.report_failure(error)
            raise
        return SHARDS_MOVED[symmetric_send, symmetric_recv]

    def push(
        self,
        pool: Pool,
        rows: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        metadata: ContextParallelMetadata,
        slots: torch.Tensor | None = None,
    ) -> PathReport:
        """Store tile by tile; since the agreement before it, the outputs are free on all ranks."""
        with stage("wire"):
            for x, output in zip(rows, outputs, strict=True):
                if not output.numel():
                    continue
                if slots is None:
                    for copy in self._copies(pool, x, output, metadata):
                        copy()
                else:
                    self._push_into_slots(pool, x, output, metadata, slots)
        with stage("exit"):
            self._barrier.barrier()
        return STORED_IN_PLACE

    def prepare(
        self,
        pool: Pool,
        rows: Sequence[torch.Tensor],
        output_sets: Sequence[Sequence[torch.Tensor]],
        metadata: ContextParallelMetadata,
    ) -> tuple[list[Prepared], PathReport]:
        """Prepare the copies of every set of outputs. Each set's barrier has its own identity."""
        with torch.inference_mode(False):  # otherwise the copies would be valid in that mode only
            pushes = [
                partial(
                    _push_prepared,
                    [
                        copy
                        for x, output in zip(rows, outputs, strict=True)
                        if output.numel()
                        for copy in self._copies(pool, x, output, metadata)
                    ],
                    self._barrier,
                    self._barrier.new_call(number),
                )
                for number, outputs in enumerate(output_sets)
            ]
        return list(pushes), STORED_IN_PLACE

    def repeat(
        self, metadata: ContextParallelMetadata, row_bytes: Sequence[int]
    ) -> Repeated | None:
        """Return the copies of dense tiles, from their addresses."""
        dense = [dense_tiles(metadata, self.group.rank, nbytes) for nbytes in row_bytes]
        known = [each for each in dense if each is not None]
        if len(known) < len(dense):
            return None
        rank, size, barrier = self.group.rank, self.group.size, self._barrier
        return partial(_push_dense, known, [(rank + step) % size for step in range(size)], barrier)

    def can_capture(
        self,
        tensors: Sequence[torch.Tensor],
        metadata: ContextParallelMetadata,
        into: Sequence[torch.Tensor] | None,
    ) -> bool:
        """Return False: CUDA graphs do not capture CPU tensors."""
        return False

    def default_prealloc(self) -> int:
        """Return an eighth of the free shared memory over the number of ranks, at most 64 MiB."""
        return min(free_bytes() // (8 * self.group.size), _MAX_DEFAULT_BYTES)

    def make_segment(self, nbytes: int, purpose: str) -> Segment:
        """Make a segment of shared memory; see cpkit.sync.shm.make_segment."""
        return make_segment(self.group.store_exchange, nbytes, purpose)

    def enter(self) -> None:
        """Do nothing: since the agreement before a gather, all outputs are free."""

    def leave(self) -> None:
        """Wait at a barrier: stores before it are visible to all peers after it."""
        self._barrier.barrier()

    def put_signal(self, peer: int) -> None:
        """Signal a peer; see cpkit.sync.signals."""
        self._signals.put(peer)

    def wait_signal(self, peer: int) -> None:
        """Wait on the host for a peer's signal. Raises BarrierTimeout naming the peer."""
        self._signals.wait(peer)

    def check(self) -> None:
        """Do nothing: a barrier that times out raises where it waits."""

    def transport(self) -> str:
        """Return "posix": the ranks push."""
        return "posix"

    def window_problem(self) -> str:
        """Return "": NCCL does not move CPU tensors."""
        return ""

    # --------------------------------------------------------------------- the copies

    def _copies(
        self,
        pool: Pool,
        rows: torch.Tensor,
        output: torch.Tensor,
        metadata: ContextParallelMetadata,
    ) -> list[Copy]:
        """Return calls that copy this rank's rows, `[rows, …]`, into every peer's output.

        The caller keeps the memory of rows and outputs alive.
        """
        dense = dense_tiles(metadata, self.group.rank, bytes_per_row(rows))
        if dense is not None:
            addresses, source = pool.peer_addresses(output), rows.data_ptr()
            targets = [addresses[peer] for peer in pool.peer_order]
            return [
                partial(ctypes.memmove, target + to, source + start, nbytes)
                for to, start, nbytes in dense
                for target in targets
            ]
        pieces = tiles(metadata, self.group.rank, bytes_per_row(rows))
        rows, views = as_rows(rows), [pool.peer_view(output, peer) for peer in pool.peer_order]
        return _strided_copies([same_lanes(as_rows(view), rows) for view in views], pieces)

    def _push_into_slots(
        self,
        pool: Pool,
        rows: torch.Tensor,
        cache: torch.Tensor,
        metadata: ContextParallelMetadata,
        slots: torch.Tensor,
    ) -> None:
        """Store this rank's rows into their slots of every peer's `cache`, `[slots, lanes]`.

        rank 1 holds tokens 2 3, slots [7, -1, 0, 5]: its rows go to rows 0 and 5 of every cache
        """
        mine = slots[metadata.rank_rows(self.group.rank)]
        stored, rows = (mine >= 0).nonzero().flatten(), as_rows(rows)
        targets, chosen = mine[stored], rows if len(stored) == len(rows) else rows[stored]
        for peer in pool.peer_order:
            target, source = same_lanes(pool.peer_view(cache, peer), chosen)
            target.index_copy_(0, targets, source)


def _push_prepared(copies: Sequence[Copy], barrier: ShmBarrier, call: int) -> None:
    with stage("wire"):
        for copy in copies:
            copy()
    with stage("exit"):
        barrier.barrier(call)


def _push_dense(
    dense: Sequence[Tiles],
    peers: Sequence[int],
    barrier: ShmBarrier,
    sources: Sequence[int],
    places: Sequence[Place],
) -> None:
    for tiles_of_one, source, (segment, offset) in zip(dense, sources, places, strict=True):
        targets = [segment.addresses[peer] + offset for peer in peers]
        for to, start, nbytes in tiles_of_one:
            for target in targets:
                ctypes.memmove(target + to, source + start, nbytes)
    barrier.barrier()


@lru_cache(maxsize=256)
def tiles(
    metadata: ContextParallelMetadata, rank: int, row_bytes: int, tile_bytes: int = TILE_BYTES
) -> Runs:
    """Return the rows of a rank in pieces of at most `tile_bytes` and at least one row.

    lengths [8], cp_size 2, rows of 1 byte, tiles of 3 bytes: rank 1 holds tokens 2 3 4 5 as
    (row 0, token 2, length 3), (row 3, token 5, length 1)
    """
    return metadata.runs(rank).cut(max(1, tile_bytes // max(1, row_bytes)))


@lru_cache(maxsize=256)
def dense_tiles(metadata: ContextParallelMetadata, rank: int, row_bytes: int) -> Tiles | None:
    """Return the `tiles` of a rank as (place in the output, place in its rows, length) in bytes.

    None if the tokens of a tile are not adjacent (interleave).
    """
    pieces = tiles(metadata, rank, row_bytes)
    if not (pieces.step == 1).all():
        return None
    fields = (pieces.token, pieces.row, pieces.length)
    return list(zip(*((field * row_bytes).tolist() for field in fields), strict=True))


def _strided_copies(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], pieces: Runs) -> list[Copy]:
    """Return calls that copy into `[tokens, lanes]` from `[rows, lanes]`, at any token step."""
    return [
        partial(
            target[token : token + (length - 1) * step + 1 : step].copy_,
            rows[row : row + length],
        )
        for row, token, step, length in zip(*(field.tolist() for field in pieces), strict=True)
        for target, rows in pairs
    ]
