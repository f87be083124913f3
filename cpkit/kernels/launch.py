"""Launching the gather kernel: how many blocks, how large its tiles, with which words.

Where ranks share a GPU, blocks that wait for a peer may take the room that the peer's own blocks
need. So one block waits there, in a launch of its own, and the blocks that copy start when the
outputs are free:

    own GPUs      rank 0   │ every block waits ─ copies ─ the last one waits │
    shared GPU    rank 0   │ one block waits │ every block copies ─ the last one waits │
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, Protocol

import torch

from cpkit.group import CPGroup
from cpkit.kernels.gather_kernel import gather_kernel
from cpkit.sync.exchange import deadline_s

SYNC = True  # tests switch it off, to see that they notice


class Shape(NamedTuple):
    """How a launch is cut: units of a tile, warps of a block, blocks for each multiprocessor.

    A rank has as many blocks as find room at once beside those of the ranks that share its GPU:
    each takes tile after tile, so more would only wait for a place.
    """

    tile: int
    warps: int
    blocks: int


# Large tiles are some percent faster where the rows take long; small ones start sooner.
_SMALL, _LARGE = Shape(2048, 8, 4), Shape(4096, 16, 2)
_LARGE_FROM_BYTES = 4 << 20
_REGISTERS = 65536  # of a multiprocessor, compute capability 7.0 to 12.x
NARROW = {1: "int8", 4: "int32"}
_Addresses = tuple[int, ...]
_NO_PLACES: tuple[_Addresses, _Addresses, _Addresses] = ((0,), (0,), (0,))


class Signals(Protocol):
    """What of a backend a launch needs."""

    group: CPGroup
    device: torch.device
    pages: torch.Tensor
    late: torch.Tensor

    def enter(self) -> None:
        """On the stream: `launch_entry`."""

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
    shape: Shape = _SMALL,
    entry: bool = True,
) -> None:
    """Start `gather_kernel` on the current stream; its arguments are explained there."""
    if entry and SYNC and signals.group.shares_gpu:
        signals.enter()
        entry = False
    places = tuple(sources), tuple(targets), tuple(bases)
    _launch(signals, tiles, places, slots, narrow_bytes, shape, entry=entry)


def launch_entry(signals: Signals) -> None:
    """Wait, on the current stream, until every rank's stream has come here. An exit follows."""
    _launch(signals, signals.pages[:0], _NO_PLACES, leave=False)


def launch_exit(signals: Signals) -> None:
    """Wait, on the current stream, until every rank's stream has come here."""
    _launch(signals, signals.pages[:0], _NO_PLACES, entry=False)


def _launch(
    signals: Signals,
    tiles: torch.Tensor,
    places: tuple[_Addresses, _Addresses, _Addresses],
    slots: torch.Tensor | None = None,
    narrow_bytes: int = 0,
    shape: Shape = _SMALL,
    *,
    entry: bool = True,
    leave: bool = True,
) -> None:
    import triton.language as tl

    group = signals.group
    signals.in_order()
    gather_kernel[(_blocks(signals, len(tiles), shape),)](
        *places,
        signals.pages if slots is None else slots,
        tiles,
        len(tiles),
        signals.pages,
        signals.late,
        int(deadline_s() * 1e9),
        group.rank,
        TENSORS=len(places[0]),
        CP=group.size,
        BLOCK=shape.tile,
        NARROW=getattr(tl, NARROW[narrow_bytes]) if narrow_bytes else None,
        SLOTS=slots is not None,
        ENTRY=SYNC and entry,
        EXIT=SYNC and leave,
        THREADS=shape.warps * 32,
        num_warps=shape.warps,
        maxnreg=_REGISTERS // (32 * shape.warps * shape.blocks),  # so that all blocks fit
    )


def shape_for(own_bytes: int) -> Shape:
    """For a rank that stores so many bytes of its own to every peer."""
    return _LARGE if own_bytes >= _LARGE_FROM_BYTES else _SMALL


def _blocks(signals: Signals, tiles: int, shape: Shape) -> int:
    """As many blocks as fit on the GPU beside those of the other ranks that share it."""
    ranks = max(1, signals.group.ranks_on_gpu)
    return max(1, min(tiles, _processors(signals.device) * shape.blocks // ranks))


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
