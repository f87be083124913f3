"""How a CUDA rank stores its rows at their final place in every peer's memory: one kernel launch.

The readable reference is `cpkit.steps.push_all_reference`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from cpkit.devices import is_capturing, raw_stream
from cpkit.group import CPGroup
from cpkit.kernels.launch import Shape, launch_gather, shape_for
from cpkit.kernels.tiles import WIDE_BYTES, tile_table, unit_bytes
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.cuda import CudaBackend, CudaSegment
from cpkit.memory.pool import SymmetricPool

_MAX_TABLES = 64
_Key = tuple[object, ...]
_tables: OrderedDict[_Key, torch.Tensor] = OrderedDict()
_readers: dict[_Key, set[int]] = {}  # the streams that may read a table when it is forgotten
_captured: dict[_Key, torch.Tensor] = {}  # what graphs read: kept for ever
_captured_pushes: list[PreparedPush] = []  # and what their replays store into


class Cut(NamedTuple):
    """How a rank's rows are cut into tiles, and which variant of the kernel Triton makes for them:
    gathers of one layout with equal cuts have equal tables, and nothing is compiled for the second.
    """

    row_bytes: tuple[int, ...]
    wide: tuple[bool, ...]
    aligned: tuple[tuple[bool, bool], ...]  # a tensor and its output, to 16 bytes
    narrow: int
    shape: Shape

    @classmethod
    def of(cls, max_rows: int, row_bytes: Sequence[int], places: Sequence[tuple[int, int]]) -> Cut:
        """For at most `max_rows` rows a rank; a place is a tensor's address and its output's.

        All ranks cut alike, since blocks of different sizes may not fit on a shared GPU together.
        """
        units = [unit_bytes(n, x | y) for n, (x, y) in zip(row_bytes, places, strict=True)]
        return cls(
            tuple(row_bytes),
            tuple(unit == WIDE_BYTES for unit in units),
            tuple((x % 16 == 0, y % 16 == 0) for x, y in places),
            min((unit for unit in units if unit < WIDE_BYTES), default=0),
            shape_for(max_rows * sum(row_bytes)),
        )


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
    cut = Cut.of(
        metadata.max_rank_len[0],
        [x.shape[1] * x.element_size() for x, _ in present],
        [(x.data_ptr(), y.data_ptr()) for x, y in present],
    )
    launch_gather(
        _signals(pool),
        _table(metadata, pool, cut, mapped=slots is not None),
        [x.data_ptr() for x, _ in present],
        [y.data_ptr() for _, y in present],
        [_segment_table(y, pool) for _, y in present],
        slots,
        cut.narrow,
        shape=cut.shape,
        entry=entry,
    )


@dataclass
class _Shared:
    """What the pushes of one plan know together: whether a caller's graph has captured one."""

    captured: bool = False


class PreparedPush:
    """`push_all` as a CUDA graph of one kernel, for outputs that a plan takes in turns.

    Making one is collective: the kernel runs with and without its entry synchronization, since it
    can't be compiled during capture. Once a caller's graph has captured a push, nobody knows which
    outputs its replays fill when, and every push of the plan waits at its entry from then on.
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
        self._launch(entry=True)
        self._launch(entry=False)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._launch(entry=False)

    def __call__(self) -> None:
        """Gather, in stream order. Raises BarrierTimeout when an earlier call was given up."""
        self._pool.backend.check()
        if is_capturing(self._pool.device.type):
            self._shared.captured = True
            _captured_pushes.append(self)
        if self._shared.captured:
            self._launch(entry=True)
        else:
            _signals(self._pool).in_order()
            self._graph.replay()


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
    into: Sequence[torch.Tensor] | None,
) -> str:
    """Why a gather of this layout can't be captured in a CUDA graph yet; empty when it can."""
    sizes = [math.prod(x.shape[1:]) * x.element_size() for x in tensors]
    # What is made for the gather, an output or a dense copy of strided rows, is aligned.
    sources = [x.data_ptr() if x.is_contiguous() else 0 for x in tensors]
    targets = [0] * len(tensors) if into is None else [cache.data_ptr() for cache in into]
    places = list(zip(sources, targets, strict=True))
    present = [(n, place) for n, place in zip(sizes, places, strict=True) if n]
    longest = metadata.max_rank_len[0]
    cut = Cut.of(longest, [n for n, _ in present], [place for _, place in present])
    key = _key(metadata, group.rank, tensors[0].device, cut, mapped=into is not None)
    if not present or key in _tables or key in _captured:
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


def _key(
    metadata: ContextParallelMetadata, rank: int, device: torch.device, cut: Cut, *, mapped: bool
) -> _Key:
    return metadata, rank, device, cut, mapped


def _table(
    metadata: ContextParallelMetadata, pool: SymmetricPool, cut: Cut, *, mapped: bool
) -> torch.Tensor:
    """The tiles on the device: made once for a layout, kept for ever where a graph reads them."""
    key = _key(metadata, pool.group.rank, pool.device, cut, mapped=mapped)
    table = _tables.pop(key, _captured.get(key))
    if table is None:
        runs, narrow = metadata.runs(pool.group.rank), cut.narrow or 1
        made = tile_table(runs, cut.row_bytes, cut.wide, narrow, cut.shape.tile, mapped=mapped)
        table = made.to(pool.device)
    _tables[key] = table
    while len(_tables) > _MAX_TABLES:
        forgotten, _ = _tables.popitem(last=False)
        del _readers[forgotten]
    readers = _readers.setdefault(key, set())
    if is_capturing(pool.device.type):
        _captured[key] = table
    elif raw_stream() not in readers:
        table.record_stream(torch.cuda.current_stream())
        readers.add(raw_stream())
    return table
