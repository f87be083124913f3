"""Which rank owns which token. Pure: no processes, no devices.

One permutation decides everything: `rank_rows(rank)`, the token index of each row that a rank
holds, in the order it holds them. Over all ranks it is a bijection onto `range(total_tokens)`.

    lengths=[8], cp_size=2
    zigzag       rank 0: 0 1 6 7     rank 1: 2 3 4 5     blocks 0,3 | 1,2  (causal work balanced)
    interleave   rank 0: 0 2 4 6     rank 1: 1 3 5 7     token t -> rank t mod 2
    contiguous   rank 0: 0 1 2 3     rank 1: 4 5 6 7     one block per rank

A layout is computed with numpy, without a Python loop over tokens or sequences, because a serving
engine lays out a new batch for every forward pass. Cached values are returned as tuples, read-only
arrays or copies, so that no caller can change the layout of another. "Upstream" is SGLang.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch

from cpkit.batch import STRATEGIES, Batch, Integers, can_cp_split, checked_batch
from cpkit.eager import eager_only

__all__ = [
    "STRATEGIES",
    "ContextParallelMetadata",
    "Integers",
    "Runs",
    "can_cp_split",
    "prepare_context_parallel_metadata",
    "shard",
]


class Runs(NamedTuple):
    """Arithmetic runs of a rank's rows; each field is an int64 array `[runs]`.

    Rows `row .. row+length` of the rank are tokens `token, token+step, …`.
    """

    row: Integers
    token: Integers
    step: Integers
    length: Integers

    def cut(self, max_rows: int) -> Runs:
        """Return the same rows in runs of at most `max_rows` rows.

        row 0, token 4, step 1, length 5, cut at 2 → lengths 2, 2, 1 at rows 0, 2, 4, tokens 4, 6, 8
        """
        pieces = -(-self.length // max_rows)
        run = np.repeat(np.arange(len(pieces)), pieces)
        done: Integers = max_rows * (np.arange(len(run)) - (np.cumsum(pieces) - pieces)[run])
        return Runs(
            self.row[run] + done,
            self.token[run] + done * self.step[run],
            self.step[run],
            np.minimum(max_rows, self.length[run] - done),
        )


@eager_only
def prepare_context_parallel_metadata(
    lengths: Sequence[int], cp_size: int, strategy: str = "zigzag"
) -> ContextParallelMetadata:
    """Lay out a batch of sequences over the ranks of a context-parallel group.

    `lengths` are tokens per sequence. Raises ValueError for an empty batch, lengths below 1, a
    cp_size below 1, an unknown strategy, and, for more than one rank, zigzag sequences shorter than
    2·cp tokens.

        >>> prepare_context_parallel_metadata([8], 2).rank_rows(0)
        tensor([0, 1, 6, 7])
    """
    return _cached_metadata(*checked_batch(lengths, cp_size, strategy))


@dataclass(frozen=True)
class ContextParallelMetadata(Batch):
    """The layout of one batch. Made by `prepare_context_parallel_metadata`."""

    @eager_only
    def rank_rows(self, rank: int) -> torch.Tensor:
        """Return the token index of each row that `rank` holds, in its order: int64 `[rows]`."""
        row, token, step, length = self.runs(rank)
        rows = np.arange(int(length.sum()))
        tokens = np.repeat(token - row * step, length) + rows * np.repeat(step, length)
        return torch.from_numpy(tokens)

    @eager_only
    def runs(self, rank: int) -> Runs:
        """Return `rank_rows` as arithmetic runs: a gather copies one slice per run."""
        _check_rank(rank, self.cp_size)
        if rank not in self._runs:
            self._runs[rank] = _merge(*self._pieces(rank))
        return self._runs[rank]

    @cached_property
    def _runs(self) -> dict[int, Runs]:
        """Runs by rank, computed on demand: a gather needs those of its own rank only."""
        return {}

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First token of each sequence in the flattened batch."""
        return tuple(self._starts.tolist())

    @eager_only
    def owners(self) -> torch.Tensor:
        """Return the rank that holds each token: int64 `[total_tokens]`."""
        owner = np.empty(self.total_tokens, dtype=np.int64)
        for rank in range(self.cp_size):
            owner[self.rank_rows(rank).numpy()] = rank
        return torch.from_numpy(owner)

    def sequence_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the sequence that each token belongs to; `tokens` index the flattened batch."""
        ends = torch.tensor(self.lengths, dtype=torch.int64, device="cpu").cumsum(0)
        return torch.searchsorted(ends, tokens, right=True)

    @property
    def rank_order(self) -> torch.Tensor:
        """Token index of each row in rank order: rank 0's rows, rank 1's rows …"""
        return torch.cat([self.rank_rows(rank) for rank in range(self.cp_size)])

    @property
    def token_order(self) -> torch.Tensor:
        """Inverse of `rank_order`: the position in rank order of token t (`x[token_order]`)."""
        order = self.rank_order.numpy()
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return torch.from_numpy(inverse)

    # ------------------------------------------------------- upstream's zigzag lists

    @cached_property
    def split_list(self) -> tuple[int, ...]:
        """Block sizes in token order: 2·cp blocks of sequence 0, then of sequence 1 …"""
        self._only_zigzag("split_list")
        return tuple(self._block_sizes.flatten().tolist())

    def zigzag_index(self, rank: int) -> tuple[int, ...]:
        """Return the indices in `split_list` of a rank's blocks: all first, then all second."""
        self._only_zigzag("zigzag_index")
        _check_rank(rank, self.cp_size)
        return tuple(self._zigzag_blocks[rank].tolist())

    @cached_property
    def reverse_split_len(self) -> tuple[int, ...]:
        """Block sizes in rank order, to cut the stripped gather into blocks."""
        self._only_zigzag("reverse_split_len")
        return tuple(self._block_sizes.flatten()[self._zigzag_blocks.flatten()].tolist())

    @cached_property
    def cp_reverse_index(self) -> tuple[int, ...]:
        """Position in rank order of each block of token order: the order to `cat` them in."""
        self._only_zigzag("cp_reverse_index")
        return tuple(self._zigzag_blocks.flatten().argsort().tolist())

    @property
    def _block_sizes(self) -> Integers:
        """Tokens per block, `[sequences, 2·cp]`: the first `length % (2·cp)` have one more."""
        size, longer = np.divmod(self._lengths[:, None], 2 * self.cp_size)
        return size + (np.arange(2 * self.cp_size) < longer)

    @property
    def _zigzag_blocks(self) -> Integers:
        """Blocks of each rank, `[cp_size, 2·sequences]`."""
        blocks = 2 * self.cp_size
        firsts = np.arange(len(self.lengths)) * blocks
        rank = np.arange(self.cp_size)[:, None]
        return np.concatenate([firsts + rank, firsts + blocks - 1 - rank], axis=1)

    def _only_zigzag(self, name: str) -> None:
        if self.strategy != "zigzag":
            raise ValueError(
                f"{name} describes zigzag blocks, and this layout is {self.strategy!r}: "
                f"use rank_rows(rank), which every strategy has"
            )


def shard(x: torch.Tensor, metadata: ContextParallelMetadata, rank: int) -> torch.Tensor:
    """Copy the rows of `x` (token order, `[total_tokens, …]`) that `rank` holds: `[rows, …]`.

    Raises ValueError when `x` does not have `total_tokens` rows.
    """
    if x.ndim < 1 or x.shape[0] != metadata.total_tokens:
        raise ValueError(
            f"x has shape {list(x.shape)}; its first dimension must be the batch's "
            f"{metadata.total_tokens} tokens (lengths {list(metadata.lengths)})"
        )
    return x[metadata.rank_rows(rank).to(x.device)]


@lru_cache(maxsize=256)
def _cached_metadata(
    lengths: tuple[int, ...], cp_size: int, strategy: str
) -> ContextParallelMetadata:
    return ContextParallelMetadata(lengths, cp_size, strategy)


def _merge(token: Integers, step: int, length: Integers) -> Runs:
    """Drop empty pieces, join adjacent ones, and number the rows.

    token 0 4 8, step 1, length 4 0 2 → runs (row 0, token 0, length 4), (row 4, token 8, length 2)
    """
    token, length = token[length > 0], length[length > 0]
    starts_run = np.ones(len(token), dtype=bool)
    starts_run[1:] = token[1:] != token[:-1] + step * length[:-1]
    if len(token):
        length = np.add.reduceat(length, np.flatnonzero(starts_run))
    token = token[starts_run]
    runs = Runs(np.cumsum(length) - length, token, np.full_like(token, step), length)
    for field in runs:
        field.setflags(write=False)
    return runs


def _check_rank(rank: int, cp_size: int) -> None:
    if not 0 <= rank < cp_size:
        raise ValueError(f"rank is {rank}; this layout has ranks 0 to {cp_size - 1}")
