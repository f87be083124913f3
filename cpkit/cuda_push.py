"""How a CUDA rank stores its rows at their final place in every peer's memory: one kernel launch.

The readable reference with the same signature is `cpkit.steps.push_all_reference`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from cpkit.cuda_backend import CudaBackend, CudaSegment
from cpkit.cuda_launch import launch_gather, shape_for
from cpkit.devices import is_capturing
from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata
from cpkit.pool import SymmetricPool
from cpkit.tiles import WIDE_BYTES, tile_table, unit_bytes

_MAX_TABLES = 64
_Key = tuple[object, ...]
_tables: OrderedDict[_Key, torch.Tensor] = OrderedDict()
_captured: dict[_Key, torch.Tensor] = {}


def push_all(
    rows: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    pool: SymmetricPool,
    slots: torch.Tensor | None = None,
    *,
    entry: bool = True,
) -> None:
    """Store this rank's rows, `[rows, lanes]` each, into every peer's outputs. In stream order.

    Outputs, `[total_tokens, lanes]` each, are in the pool, at one offset on all ranks. With `slots`
    (int64 `[total_tokens]`, on the device) token t goes to row `slots[t]`, and nowhere if that is
    -1. Entry and exit synchronization are inside; without `entry` the caller knows that all
    outputs are free (see cpkit.plan). Source: the idea of vLLM #49517 (each rank stores
    final rows into every peer's cache).
    """
    present = [(x, y) for x, y in zip(rows, outputs, strict=True) if y.numel()]
    if not present:
        pool.backend.leave()
        return
    row_bytes = tuple(x.shape[1] * x.element_size() for x, _ in present)
    units = [
        unit_bytes(nbytes, x.data_ptr() | y.data_ptr())
        for nbytes, (x, y) in zip(row_bytes, present, strict=True)
    ]
    narrow = min((unit for unit in units if unit < WIDE_BYTES), default=0)
    wide = tuple(unit == WIDE_BYTES for unit in units)
    shape = shape_for(sum(x.numel() * x.element_size() for x, _ in present))
    launch_gather(
        _signals(pool),
        _table(metadata, pool, row_bytes, wide, narrow, shape.tile, mapped=slots is not None),
        [x.data_ptr() for x, _ in present],
        [y.data_ptr() for _, y in present],
        [_segment_table(y, pool) for _, y in present],
        slots,
        narrow,
        shape=shape,
        entry=entry,
    )


@dataclass
class _Shared:
    """What the pushes of one plan know together: whether a caller's graph has captured one."""

    captured: bool = False


class PreparedPush:
    """`push_all` as a CUDA graph of one kernel, for outputs that a plan takes in turns.

    Making one is collective: the kernel runs once, since it can't be compiled during capture. Once
    a caller's graph has captured a push, nobody knows which outputs its replays fill when, and
    every push of the plan has its entry synchronization from then on.
    """

    def __init__(
        self,
        rows: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        metadata: ContextParallelMetadata,
        pool: SymmetricPool,
        shared: _Shared,
    ) -> None:
        self._launch = partial(push_all, rows, outputs, metadata, pool)
        self._pool, self._shared = pool, shared
        self._graphs = {entry: self._captured(entry) for entry in (True, False)}

    def _captured(self, entry: bool) -> torch.cuda.CUDAGraph:
        self._launch(entry=entry)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._launch(entry=entry)
        return graph

    def __call__(self) -> None:
        """Gather, in stream order. Raises BarrierTimeout when an earlier call was given up."""
        self._pool.backend.check()
        if is_capturing(self._pool.device.type):
            self._shared.captured = True
            self._launch(entry=True)
        else:
            self._graphs[self._shared.captured].replay()


def prepare_pushes(
    rows: Sequence[torch.Tensor],
    outputs: Sequence[Sequence[torch.Tensor]],
    metadata: ContextParallelMetadata,
    pool: SymmetricPool,
) -> list[PreparedPush]:
    """One push for each set of outputs. Collective."""
    shared = _Shared()
    return [PreparedPush(rows, each, metadata, pool, shared) for each in outputs]


def capture_problem(
    tensors: Sequence[torch.Tensor],
    metadata: ContextParallelMetadata,
    group: CPGroup,
    *,
    mapped: bool,
) -> str:
    """Why a gather of this layout can't be captured in a CUDA graph yet; empty when it can."""
    row_bytes = tuple(
        size for x in tensors if x.numel() and (size := x[0].numel() * x.element_size())
    )
    for known, rank, _, known_bytes, *_, known_mapped in _tables:
        if (known, rank, known_bytes, known_mapped) == (metadata, group.rank, row_bytes, mapped):
            return ""
    return (
        "this gather is captured in a CUDA graph before it has run: run it once (same lengths, "
        "same tensors) before torch.cuda.graph, so that pool, kernel and tables are there"
    )


def _segment_table(output: torch.Tensor, pool: SymmetricPool) -> int:
    """Address of the table of the ranks' segments that this output lies in."""
    segment = pool.segment(pool.place_of(output)[0])
    assert isinstance(segment, CudaSegment)
    return segment.peers.data_ptr()


def _signals(pool: SymmetricPool) -> CudaBackend:
    assert isinstance(pool.backend, CudaBackend)
    return pool.backend


def _table(
    metadata: ContextParallelMetadata,
    pool: SymmetricPool,
    row_bytes: tuple[int, ...],
    wide: tuple[bool, ...],
    narrow: int,
    tile: int,
    *,
    mapped: bool,
) -> torch.Tensor:
    """The tiles on the device: made once for a layout, kept for ever where a graph reads them."""
    rank = pool.group.rank
    key = (metadata, rank, pool.device, row_bytes, wide, narrow, tile, mapped)
    table = _tables.pop(key, _captured.get(key))
    if table is None:
        runs = metadata.runs(rank)
        made = tile_table(runs, row_bytes, wide, narrow or 1, tile, mapped=mapped)
        table = made.to(pool.device)
    _tables[key] = table
    while len(_tables) > _MAX_TABLES:
        _tables.popitem(last=False)
    if is_capturing(pool.device.type):
        _captured[key] = table
    return table
