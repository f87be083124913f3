"""Launch the gather kernel: number of blocks, size and table of tiles, signal words.

Where ranks share a GPU, or two groups gather at once, blocks that wait for a peer can occupy the
multiprocessors that the peer's blocks need, or those of the other group. So one block waits there,
in a launch of its own, and the blocks that copy start when the outputs are free:

    GPU for one group   rank 0   │ every block waits ─ copies ─ the last one waits │
    shared GPU          rank 0   │ one block waits │ every block copies ─ the last one waits │
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch

from cpkit.devices import is_capturing, keep_for_replays
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
Addresses = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # sources, targets, bases
Flags = tuple[bool, bool, bool]  # SLOTS, ENTRY, EXIT
_NO_ADDRESSES: Addresses = ((0,), (0,), (0,))


class Signals(Protocol):
    """The part of a backend that a launch uses."""

    group: CPGroup
    device: torch.device
    page: int
    pages: torch.Tensor
    report: torch.Tensor
    kernels: dict[object, Compiled]  # by what Triton specializes on

    def enter(self) -> None:
        """Run `launch_entry` on the stream."""

    def in_order(self) -> int:
        """Make the current stream wait for this rank's launches on other streams; return it."""


def launch_entry(signals: Signals) -> None:
    """Wait on the current stream until all ranks' streams arrive. `launch_exit` must follow."""
    _launch_without_tiles(signals, (False, SYNC, False))


def launch_exit(signals: Signals) -> None:
    """Wait on the current stream until all ranks' streams arrive."""
    _launch_without_tiles(signals, (False, False, SYNC))


def _launch_without_tiles(signals: Signals, flags: Flags) -> None:
    tiles = signals.pages[:0]
    kernel = compiled(signals, tiles, _NO_ADDRESSES, None, 0, _SMALL, flags)
    launch(signals, PreparedLaunch(kernel, TileTable(tiles)), _NO_ADDRESSES)


def enter_alone(signals: Signals) -> bool:
    """Launch the entry alone where blocks must not wait for a peer; return True if so."""
    if SYNC and (signals.group.shares_gpu or signals.group.overlaps):
        signals.enter()
        return True
    return False


def launch(
    signals: Signals,
    prepared: PreparedLaunch,
    addresses: Addresses,
    slots: torch.Tensor | None = None,
    tag: int = 0,
) -> None:
    """Launch a variant of the kernel over its tiles on the current stream."""
    kernel, table = prepared
    wait_ns = int(deadline_s() * 1e9)
    stream = signals.in_order()
    table.keep_for(stream)
    kernel.run(
        *(min(table.n_tiles, kernel.most_blocks) or 1, 1, 1, stream, *kernel.options),
        *(*addresses, kernel.words[1] if slots is None else slots, table.address, table.n_tiles),
        *(*kernel.words, wait_ns, signals.group.rank, tag, *kernel.constants),
    )


def compiled(
    signals: Signals,
    tiles: torch.Tensor,
    addresses: Addresses,
    slots: torch.Tensor | None,
    narrow_bytes: int,
    shape: Shape,
    flags: Flags,
) -> Compiled:
    """Return the variant of the kernel for these arguments, compiled at the first call."""
    # Triton's launch finds out at each call which variant of the kernel its arguments need, which
    # takes three times as long as the launch. What it looks at is the key here.
    aligned = tuple([a & 15 if a else None for each in addresses for a in each])
    key = aligned, narrow_bytes, flags, shape
    kernel = signals.kernels.get(key)
    if kernel is None:
        kernel = _compile(signals, tiles, addresses, slots, narrow_bytes, shape, flags)
        signals.kernels[key] = kernel
    return kernel


class Compiled(NamedTuple):
    """A variant of the kernel: its launch by Triton, and what is equal in all its launches."""

    run: Callable[..., object]
    options: tuple[Any, ...]  # the kernel on this GPU, its launch options, no hooks
    most_blocks: int
    words: tuple[int, int, int]  # the addresses of `page`, `pages` and `report`
    constants: tuple[Any, ...]


def _compile(
    signals: Signals,
    tiles: torch.Tensor,
    addresses: Addresses,
    slots: torch.Tensor | None,
    narrow_bytes: int,
    shape: Shape,
    flags: Flags,
) -> Compiled:
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
    return Compiled(run, options, _most_blocks(signals, shape), words, constants)


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


class TileTable:
    """One tile table on the GPU, its key in the cache, the streams that may still read it."""

    def __init__(self, tiles: torch.Tensor, key: object = None) -> None:
        self.tiles, self.key = tiles, key
        self.address, self.n_tiles = tiles.data_ptr(), tiles.shape[0]
        self.readers: set[int] = set()
        self.last_use = 0

    def keep_for(self, stream: int) -> None:
        """Keep the memory until the current stream, `stream`, has read it."""
        if stream not in self.readers and not is_capturing("cuda"):
            self.tiles.record_stream(torch.cuda.current_stream())
            self.readers.add(stream)


class PreparedLaunch(NamedTuple):
    """What a launch needs besides addresses: the compiled kernel and the tiles."""

    kernel: Compiled
    table: TileTable


class TileTables:
    """A rank's tile tables on its GPU: one per layout and cut, the latest MAX_TABLES of them.

    A table that a CUDA graph captured is kept for its replays, by `devices.keep_for_replays`.
    """

    MAX_TABLES = 64

    def __init__(self, rank: int, device: torch.device) -> None:
        self._rank, self._device = rank, device
        self._tables: dict[object, TileTable] = {}
        self._captured = WeakValueDictionary[object, TileTable]()
        self._uses = 0
        self._prepared: dict[object, PreparedLaunch] = {}

    def has(self, metadata: ContextParallelMetadata, cut: Cut) -> bool:
        """Return True when the table of this gather is already on the GPU."""
        key = metadata, cut
        return key in self._tables or key in self._captured

    def prepared(self, key: object) -> PreparedLaunch | None:
        """Return what was kept under this key, unless its table was dropped; not for capture."""
        found = self._prepared.get(key)
        if found is not None:
            self._uses = found.table.last_use = self._uses + 1
        return found

    def keep(self, key: object, prepared: PreparedLaunch) -> None:
        """Keep a prepared launch under another key, as long as its table."""
        self._prepared[key] = prepared

    def prepare(
        self,
        signals: Signals,
        metadata: ContextParallelMetadata,
        addresses: Addresses,
        row_bytes: Sequence[int],
        pitch_bytes: Sequence[int],
        slots: torch.Tensor | None,
        *,
        entry: bool,
    ) -> PreparedLaunch:
        """Return the compiled kernel and the tiles of a gather; a similar one finds them at once.

        Both depend on addresses modulo WIDE_BYTES only.
        """
        flags = slots is not None, SYNC and entry, SYNC
        low_bits = [a % WIDE_BYTES if a else None for each in addresses for a in each]
        key = metadata, flags, *low_bits, *row_bytes, *pitch_bytes
        prepared = self._prepared.get(key)
        if prepared is None:
            pairs = list(zip(addresses[0], addresses[1], strict=True))
            cut = Cut.of(metadata.max_rank_len[0], row_bytes, pairs, pitch_bytes)
            table = self._get(metadata, cut)
            kernel = compiled(signals, table.tiles, addresses, slots, cut.narrow, cut.shape, flags)
            prepared = self._prepared[key] = PreparedLaunch(kernel, table)
        self._use(prepared.table)
        return prepared

    def _get(self, metadata: ContextParallelMetadata, cut: Cut) -> TileTable:
        """Return the table, made at the first call; drop the one whose last use is oldest."""
        key = metadata, cut
        table = self._tables.get(key) or self._captured.get(key)
        if table is None:
            runs, narrow = metadata.runs(self._rank), cut.narrow or 1
            made = tile_table(
                runs, cut.row_bytes, cut.wide, narrow, cut.shape.tile, cut.pitch_bytes
            )
            table = TileTable(made.to(self._device), key)
        if key not in self._tables and len(self._tables) >= self.MAX_TABLES:
            oldest = min(self._tables.values(), key=lambda each: each.last_use)
            del self._tables[oldest.key]
            self._prepared = {k: v for k, v in self._prepared.items() if v.table is not oldest}
        self._tables[key] = table
        return table

    def _use(self, table: TileTable) -> None:
        """Keep a table longer than those that were used before, and for replays if captured."""
        self._uses = table.last_use = self._uses + 1
        if is_capturing("cuda"):
            keep_for_replays("cuda", table)
            self._captured[table.key] = table
