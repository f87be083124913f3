"""Launching the gather kernel: how many blocks, how large its tiles, with which words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, Protocol

import torch

from cpkit.group import CPGroup
from cpkit.kernels import gather_kernel
from cpkit.rendezvous import deadline_s

SYNC = True  # tests switch it off, to see that they notice


class Shape(NamedTuple):
    """How a launch is cut: units of a tile, warps of a block, blocks for each multiprocessor.

    All blocks of all ranks must be resident at once, since they wait for each other: if the first
    ranks' blocks took all places, the last rank's signal would never come.
    """

    tile: int
    warps: int
    blocks: int


# Large tiles are some percent faster where the rows take long; small ones start sooner.
_SMALL, _LARGE = Shape(2048, 8, 4), Shape(8192, 16, 1)
_LARGE_FROM_BYTES = 4 << 20
_REGISTERS = 65536  # of a multiprocessor, compute capability 7.0 to 12.x
NARROW = {1: "int8", 4: "int32"}


class Signals(Protocol):
    """What of a backend a launch needs."""

    group: CPGroup
    device: torch.device
    pages: torch.Tensor
    late: torch.Tensor


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
    import triton.language as tl

    group = signals.group
    gather_kernel[(_blocks(signals, len(tiles), shape),)](
        tuple(sources),
        tuple(targets),
        tuple(bases),
        signals.pages if slots is None else slots,
        tiles,
        len(tiles),
        signals.pages,
        signals.late,
        int(deadline_s() * 1e9),
        group.rank,
        TENSORS=len(sources),
        CP=group.size,
        BLOCK=shape.tile,
        NARROW=getattr(tl, NARROW[narrow_bytes]) if narrow_bytes else None,
        SLOTS=slots is not None,
        SYNC=SYNC,
        ENTRY=SYNC and entry,
        THREADS=shape.warps * 32,
        num_warps=shape.warps,
        maxnreg=_REGISTERS // (32 * shape.warps * shape.blocks),  # so that all blocks fit
    )


def launch_barrier(signals: Signals) -> None:
    """Wait, on the current stream, until every rank's stream has come here."""
    launch_gather(signals, signals.pages[:0], [0], [0], [0])


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
