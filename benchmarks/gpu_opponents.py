"""The opponents of `make bench-gpu`, in plain torch: no agreement, buffers allocated once.

    seed …           pad, collective, strip, reorder, as SGLang writes it (cp_utils.py)
    NCCL …           the collective alone, into a buffer in rank order
    … recv, … both   with the receive buffer, or both buffers, in memory that NCCL has a window on
    low-contention   torch's _low_contention_all_gather, then strip, reorder
    copy engine      copies into the peers' symmetric buffers, then strip, reorder (pytorch#191407)
    peer copies      every rank copies its shard to each other rank: the floor of the link

There is no NCCL where ranks share a GPU, so the seed's wire is the copies of `copy engine` there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
import torch.nn.functional as F  # noqa: N812 - its usual name

from cpkit.group import CPGroup
from cpkit.layout import ContextParallelMetadata
from cpkit.symm import SymmetricPool

Call = Callable[[], torch.Tensor]
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
Finish = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """One batch on this rank: its rows `[tokens, …]`, and the pool for symmetric buffers."""

    mine: torch.Tensor
    metadata: ContextParallelMetadata
    group: CPGroup
    pool: SymmetricPool

    @property
    def padded_rows(self) -> int:
        """Rows of a padded shard."""
        return self.metadata.max_rank_len[0]

    def buffer(self, shards: int, *, symmetric: bool) -> torch.Tensor:
        """Return an empty buffer for this many padded shards."""
        shape = (self.padded_rows * shards, *self.mine.shape[1:])
        if symmetric:
            return self.pool.empty(shape, self.mine.dtype)
        return self.mine.new_empty(shape)


def pipelines(batch: Batch) -> dict[str, Call]:
    """Return the calls that gather all rows in token order."""
    finish = _strip_and_reorder(batch.metadata)
    gathers = {f"seed{name}": _pad_and_gather(*each) for name, each in _wires(batch)}
    gathers |= {
        "copy engine": _copy_engine(batch),
        "low-contention": _low_contention(batch),
    }
    if not batch.group.has_nccl:
        gathers["seed"] = gathers["copy engine"]
    return {name: _then(finish, gather) for name, gather in gathers.items()}


def collectives(batch: Batch) -> dict[str, Call]:
    """Return NCCL's all-gather of the padded shards alone, by the buffers in symmetric memory."""
    return {f"NCCL{name}": wire.gather for name, (_, wire) in _wires(batch)}


def peer_copies(batch: Batch) -> Call:
    """Return copies of this rank's shard into the memory of every other rank."""
    inbox = batch.buffer(batch.group.size, symmetric=True)
    targets = [_part(batch, inbox, peer) for peer in batch.pool.peer_order[1:]]

    def call() -> torch.Tensor:
        for target in targets:
            target.copy_(batch.mine)
        return inbox

    return call


def _then(finish: Finish, gather: Call) -> Call:
    return lambda: finish(gather())


@dataclass(frozen=True)
class _Wire:
    """NCCL's all-gather from `send` `[P, …]` into `recv` `[W·P, …]`."""

    send: torch.Tensor
    recv: torch.Tensor
    group: CPGroup
    send_is_symmetric: bool

    def gather(self, shard: torch.Tensor | None = None) -> torch.Tensor:
        shard = self.send if shard is None else shard
        _all_gather(self.recv, shard, group=self.group.process_group)
        return self.recv


def _wires(batch: Batch) -> Iterator[tuple[str, tuple[torch.Tensor, _Wire]]]:
    if not batch.group.has_nccl:
        return
    for name, send, recv in (("", False, False), (" recv", False, True), (" both", True, True)):
        buffers = batch.buffer(1, symmetric=send), batch.buffer(batch.group.size, symmetric=recv)
        yield name, (batch.mine, _Wire(*buffers, batch.group, send))


def _pad_and_gather(mine: torch.Tensor, wire: _Wire) -> Call:
    """Pad this rank's rows, into `send` if that is symmetric, and gather all shards."""
    missing = len(wire.send) - len(mine)

    def call() -> torch.Tensor:
        if wire.send_is_symmetric:
            wire.send[: len(mine)].copy_(mine)
            return wire.gather()
        no_change = (0, 0) * (mine.ndim - 1)
        return wire.gather(F.pad(mine, (*no_change, 0, missing)) if missing else mine)

    return call


def _strip_and_reorder(metadata: ContextParallelMetadata) -> Finish:
    """Return a function from padded rank order `[W·P, …]` to token order `[T, …]`."""
    rows, counts = metadata.max_rank_len[0], metadata.per_rank_actual_token
    blocks, order = list(metadata.reverse_split_len), list(metadata.cp_reverse_index)

    def finish(gathered: torch.Tensor) -> torch.Tensor:
        parts = [gathered[rank * rows : rank * rows + n] for rank, n in enumerate(counts)]
        pieces = torch.cat(parts).split(blocks)
        return torch.cat([pieces[position] for position in order])

    return finish


def _part(batch: Batch, buffer: torch.Tensor, peer: int) -> torch.Tensor:
    """Return the rows of this rank in a peer's buffer of padded shards."""
    first = batch.group.rank * batch.padded_rows
    return batch.pool.peer_view(buffer, peer)[first : first + len(batch.mine)]


def _copy_engine(batch: Batch) -> Call:
    """Copy this rank's rows into every rank's receive buffer, between two barriers."""
    recv = batch.buffer(batch.group.size, symmetric=True)
    targets = [_part(batch, recv, peer) for peer in batch.pool.peer_order]
    backend = batch.pool.backend

    def call() -> torch.Tensor:
        backend.enter()
        for target in targets:
            target.copy_(batch.mine)
        backend.leave()
        return recv

    return call


def _low_contention(batch: Batch) -> Call:
    shape, name = (batch.padded_rows, *batch.mine.shape[1:]), batch.group.process_group.group_name
    shard = symm_mem.empty(*shape, dtype=batch.mine.dtype, device=batch.mine.device)
    symm_mem.rendezvous(shard, name)
    shard[: len(batch.mine)].copy_(batch.mine)

    def call() -> Any:
        gathered = torch.ops.symm_mem._low_contention_all_gather(shard, name)
        return torch.ops._c10d_functional.wait_tensor(gathered)

    return call
