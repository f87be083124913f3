"""Launch the gather kernel: number of blocks, size and table of tiles, signal words.

Where ranks share a GPU, or two groups gather at once, blocks that wait for a peer can occupy the
multiprocessors that the peer's blocks need, or those of the other group. So one block waits there,
in a launch of its own, and the blocks that copy start when the outputs are free:

    GPU for one group   rank 0   │ every block waits ─ copies ─ the last one waits │
    shared GPU          rank 0   │ one block waits │ every block copies ─ the last one waits │
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch

from cpkit.devices import is_capturing, keep_for_replays, raw_stream
from cpkit.group import CPGroup
from cpkit.kernels.gather_kernel import gather_kernel
from cpkit.kernels.tiles import WIDE_BYTES, tile_table, unit_bytes
from cpkit.layout import ContextParallelMetadata
from cpkit.settings import deadline_s

SYNC = True  # tests switch it off to show that they fail without it


class Shape(NamedTuple):
    """Units per tile, warps per block, blocks per multiprocessor.

    A rank launches as many blocks as fit beside those of the ranks that share its GPU. Each takes
    tile after tile, so more blocks would only wait to be scheduled.
    """

    tile: int
    warps: int
    blocks: int


# Large tiles are a few percent faster for long copies; small ones start sooner.
_SMALL, _LARGE = Shape(1024, 4, 4), Shape(4096, 16, 2)
_LARGE_FROM_BYTES = 16 << 20
_REGISTERS = 65536  # per multiprocessor, compute capability 7.0 to 12.x
NARROW = {1: "int8", 4: "int32"}
_Addresses = tuple[int, ...]
_NO_ADDRESSES: tuple[_Addresses, _Addresses, _Addresses] = ((0,), (0,), (0,))


class Signals(Protocol):
    """The part of a backend that a launch uses."""

    group: CPGroup
    device: torch.device
    page: int
    pages: torch.Tensor
    report: torch.Tensor
    kernels: dict[object, _Compiled]  # by what Triton specializes on

    def enter(self) -> None:
        """Run `launch_entry` on the stream."""

    def in_order(self) -> None:
        """Make the current stream wait for this rank's launches on other streams."""


def launch_gather(
    signals: Signals,
    tiles: torch.Tensor,
    sources: Sequence[int],
    targets: Sequence[int],
    bases: Sequence[int],
    slots: torch.Tensor | None = None,
    narrow_bytes: int = 0,
    *,
    tag: int = 0,
    shape: Shape = _SMALL,
    entry: bool = True,
) -> None:
    """Launch `gather_kernel` on the current stream; see its docstring for the arguments."""
    if entry and SYNC and (signals.group.shares_gpu or signals.group.overlaps):
        signals.enter()
        entry = False
    addresses = tuple(sources), tuple(targets), tuple(bases)
    _launch(signals, tiles, addresses, slots, narrow_bytes, shape, tag=tag, entry=entry)


def launch_entry(signals: Signals) -> None:
    """Wait on the current stream until all ranks' streams arrive. `launch_exit` must follow."""
    _launch(signals, signals.pages[:0], _NO_ADDRESSES, leave=False)


def launch_exit(signals: Signals) -> None:
    """Wait on the current stream until all ranks' streams arrive."""
    _launch(signals, signals.pages[:0], _NO_ADDRESSES, entry=False)


def _launch(
    signals: Signals,
    tiles: torch.Tensor,
    addresses: tuple[_Addresses, _Addresses, _Addresses],
    slots: torch.Tensor | None = None,
    narrow_bytes: int = 0,
    shape: Shape = _SMALL,
    *,
    tag: int = 0,
    entry: bool = True,
    leave: bool = True,
) -> None:
    signals.in_order()
    flags = slots is not None, SYNC and entry, SYNC and leave
    # Triton's launch finds out at each call which variant of the kernel its arguments need, which
    # takes three times as long as the launch. What it looks at is the key here.
    aligned = tuple([a & 15 if a else None for each in addresses for a in each])
    key = aligned, narrow_bytes, flags, shape
    kernel = signals.kernels.get(key)
    if kernel is None:
        kernel = _compile(signals, tiles, addresses, slots, narrow_bytes, shape, flags)
        signals.kernels[key] = kernel
    n_tiles = tiles.shape[0]
    kernel.run(
        *(min(n_tiles, kernel.most_blocks) or 1, 1, 1, raw_stream(), *kernel.options),
        *(*addresses, kernel.words[1] if slots is None else slots, tiles.data_ptr(), n_tiles),
        *(*kernel.words, int(deadline_s() * 1e9), signals.group.rank, tag, *kernel.constants),
    )


class _Compiled(NamedTuple):
    """A variant of the kernel: its launch by Triton, and what is equal in all its launches."""

    run: Callable[..., object]
    options: tuple[Any, ...]  # the kernel on this GPU, its launch options, no hooks
    most_blocks: int
    words: tuple[int, int, int]  # the addresses of `page`, `pages` and `report`
    constants: tuple[Any, ...]


def _compile(
    signals: Signals,
    tiles: torch.Tensor,
    addresses: tuple[_Addresses, _Addresses, _Addresses],
    slots: torch.Tensor | None,
    narrow_bytes: int,
    shape: Shape,
    flags: tuple[bool, bool, bool],
) -> _Compiled:
    """Compile the variant of the kernel for these arguments."""
    constants = (
        *(len(addresses[0]), signals.group.size, shape.tile, _narrow(narrow_bytes)),
        *(*flags, shape.warps * 32),
    )
    kernel: Any = gather_kernel.warmup(
        *(*addresses, signals.pages if slots is None else slots, tiles, 1),
        *(signals.page, signals.pages, signals.report, 1, 0, 0, *constants),
        grid=(1,),
        num_warps=shape.warps,
        maxnreg=_REGISTERS // (32 * shape.warps * shape.blocks),  # so that all blocks fit
    )
    run, no_hooks = kernel.run, (None, None, None)  # the kernel is on the GPU from here on
    words = signals.page, signals.pages.data_ptr(), signals.report.data_ptr()
    options = kernel.function, kernel.packed_metadata, *no_hooks
    return _Compiled(run, options, _most_blocks(signals, shape), words, constants)


@cache
def _narrow(nbytes: int) -> Any:
    """Return Triton's dtype for units of this many bytes; None for 0."""
    import triton.language as tl

    return getattr(tl, NARROW[nbytes]) if nbytes else None


def shape_for(own_bytes: int) -> Shape:
    """Return the shape for a rank that stores this many bytes to every peer."""
    return _LARGE if own_bytes >= _LARGE_FROM_BYTES else _SMALL


def _most_blocks(signals: Signals, shape: Shape) -> int:
    """Return how many blocks fit on the GPU together with those of the ranks that share it."""
    ranks = max(1, signals.group.ranks_on_gpu)
    return max(1, _processors(signals.device) * shape.blocks // ranks)


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# ----------------------------------------------------------------------- the tile tables


class Cut(NamedTuple):
    """How a rank's rows are cut into tiles, and which variant of the kernel Triton makes for them.

    Gathers of one layout with equal cuts share a table and a compiled kernel.
    """

    row_bytes: tuple[int, ...]
    pitch_bytes: tuple[int, ...]  # of the caches that rows are stored in by slots; otherwise empty
    wide: tuple[bool, ...]
    aligned: tuple[tuple[bool, bool], ...]  # to 16 bytes: each tensor, and its output
    narrow: int
    shape: Shape

    @classmethod
    def of(
        cls,
        max_rows: int,
        row_bytes: Sequence[int],
        pairs: Sequence[tuple[int, int]],
        pitch_bytes: Sequence[int] = (),
    ) -> Cut:
        """Cut up to `max_rows` rows per rank; a pair is the addresses of a tensor and its output.

        All ranks cut equally, because blocks of different sizes might not fit on a shared GPU.
        """
        low_bits = tuple([(x % WIDE_BYTES, y % WIDE_BYTES) for x, y in pairs])
        return _cut(max_rows, tuple(row_bytes), low_bits, tuple(pitch_bytes))


@lru_cache(maxsize=1024)
def _cut(
    max_rows: int,
    row_bytes: tuple[int, ...],
    low_bits: tuple[tuple[int, int], ...],
    pitch_bytes: tuple[int, ...],
) -> Cut:
    """Return `Cut.of`, from the addresses modulo WIDE_BYTES. It is needed in every gather."""
    positions = [x | y for x, y in low_bits]
    if pitch_bytes:
        positions = [a | pitch for a, pitch in zip(positions, pitch_bytes, strict=True)]
    units = [unit_bytes(n, a) for n, a in zip(row_bytes, positions, strict=True)]
    return Cut(
        row_bytes,
        pitch_bytes,
        tuple(unit == WIDE_BYTES for unit in units),
        tuple((x == 0, y == 0) for x, y in low_bits),
        min((unit for unit in units if unit < WIDE_BYTES), default=0),
        shape_for(max_rows * sum(row_bytes)),
    )


_Key = tuple[ContextParallelMetadata, Cut]


class TileTables:
    """A rank's tile tables on its GPU: one per layout and cut, the latest MAX_TABLES of them.

    A table that a CUDA graph captured is kept for its replays, by `devices.keep_for_replays`.
    """

    MAX_TABLES = 64

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._tables: OrderedDict[_Key, torch.Tensor] = OrderedDict()
        self._readers: dict[_Key, set[int]] = {}  # the streams that may still read a table
        self._captured = WeakValueDictionary[_Key, torch.Tensor]()

    def has(self, metadata: ContextParallelMetadata, cut: Cut) -> bool:
        """Return True when the table of this gather is already on the GPU."""
        key = metadata, cut
        return key in self._tables or key in self._captured

    def get(self, metadata: ContextParallelMetadata, cut: Cut) -> torch.Tensor:
        """Return the table, made at the first call."""
        key = metadata, cut
        table = self._tables.pop(key, self._captured.get(key))
        if table is None:
            runs, narrow = metadata.runs(self._rank), cut.narrow or 1
            made = tile_table(
                runs, cut.row_bytes, cut.wide, narrow, cut.shape.tile, cut.pitch_bytes
            )
            table = made.to(self._device)
        self._tables[key] = table
        while len(self._tables) > self.MAX_TABLES:
            dropped, _ = self._tables.popitem(last=False)
            del self._readers[dropped]
        readers = self._readers.setdefault(key, set())
        if is_capturing("cuda"):
            keep_for_replays("cuda", table)
            self._captured[key] = table
        elif raw_stream() not in readers:
            table.record_stream(torch.cuda.current_stream())
            readers.add(raw_stream())
        return table
