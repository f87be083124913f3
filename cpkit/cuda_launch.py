"""Launching the gather kernel: how many blocks, how large its tiles, with which words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch

from cpkit.group import CPGroup
from cpkit.kernels import gather_kernel
from cpkit.rendezvous import deadline_s

WARPS = 8
SYNC = True  # tests switch it off, to see that they notice
# Units of a tile, and blocks a multiprocessor. All blocks of all ranks must be resident at once,
# since they wait for each other. Large tiles in few blocks are a few percent faster where the rows
# take long; small ones start sooner.
_SMALL, _LARGE = (2048, 4), (4096, 2)
_LARGE_FROM_BYTES = 4 << 20
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
    tile: int = _SMALL[0],
    entry: bool = True,
) -> None:
    """Start `gather_kernel` on the current stream; its arguments are explained there."""
    import triton.language as tl

    group = signals.group
    gather_kernel[(_blocks(signals, len(tiles), tile),)](
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
        BLOCK=tile,
        NARROW=getattr(tl, NARROW[narrow_bytes]) if narrow_bytes else None,
        SLOTS=slots is not None,
        SYNC=SYNC,
        ENTRY=entry,
        THREADS=WARPS * 32,
        num_warps=WARPS,
    )


def launch_barrier(signals: Signals) -> None:
    """Wait, on the current stream, until every rank's stream has come here."""
    launch_gather(signals, signals.pages[:0], [0], [0], [0])


def tile_units(own_bytes: int) -> int:
    """Units of a tile for a rank that stores so many bytes of its own to every peer."""
    return (_LARGE if own_bytes >= _LARGE_FROM_BYTES else _SMALL)[0]


def _blocks(signals: Signals, tiles: int, tile: int) -> int:
    """As many blocks as fit on the GPU beside those of the other ranks that share it."""
    per_processor = dict((_SMALL, _LARGE))[tile]
    ranks = max(1, signals.group.ranks_on_gpu)
    return max(1, min(tiles, _processors(signals.device) * per_processor // ranks))


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
