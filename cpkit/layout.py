"""Who owns which token. Pure: no processes, no devices.

One permutation decides everything: `rank_rows(rank)`, the token index of each row that a rank
holds, in the order it holds them. Over all ranks it is a bijection onto `range(total_tokens)`.

    lengths=[8], cp_size=2
    zigzag       rank 0: 0 1 6 7     rank 1: 2 3 4 5     blocks 0,3 | 1,2  (causal work balanced)
    interleave   rank 0: 0 2 4 6     rank 1: 1 3 5 7     token t -> rank t mod 2
    contiguous   rank 0: 0 1 2 3     rank 1: 4 5 6 7     one block a rank
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import index
from typing import NamedTuple

import torch

STRATEGIES = ("zigzag", "interleave", "contiguous")


class Run(NamedTuple):
    """Rows that a rank holds side by side and that lie `step` apart in token order.

    Rows `row .. row+length` of the rank are tokens `token, token+step, …`.
    """

    row: int
    token: int
    step: int
    length: int


def can_cp_split(lengths: Sequence[int], cp_size: int, strategy: str = "zigzag") -> bool:
    """Whether upstream would split this batch over `cp_size` ranks at all; over one it never does.

    zigzag: every sequence has at least 2·cp tokens. interleave: the batch has at least cp tokens.
    contiguous: every sequence has at least cp tokens, one for each rank.
    Source: SGLang `layers/cp/{zigzag,interleave}.py`, `can_apply`.
    """
    sizes = _checked_lengths(lengths)
    _check_cp_size(cp_size)
    _check_strategy(strategy)
    if cp_size == 1:
        return False
    if strategy == "interleave":
        return sum(sizes) >= cp_size
    return min(sizes) >= (2 * cp_size if strategy == "zigzag" else cp_size)


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
    sizes = _checked_lengths(lengths)
    _check_cp_size(cp_size)
    _check_strategy(strategy)
    if strategy == "zigzag" and cp_size > 1 and not can_cp_split(sizes, cp_size, strategy):
        raise ValueError(
            f"zigzag over {cp_size} ranks cuts every sequence into {2 * cp_size} blocks, "
            f"and the shortest sequence has {min(sizes)} tokens. Upstream falls back to no split "
            f"then: do the same (cp_size=1), or use strategy 'interleave' or 'contiguous'."
        )
    return _cached_metadata(sizes, cp_size, strategy)


@dataclass(frozen=True)
class ContextParallelMetadata:
    """The layout of one batch. Made by `prepare_context_parallel_metadata`."""

    lengths: tuple[int, ...]
    cp_size: int
    strategy: str

    def __post_init__(self) -> None:
        """A list of lengths is as good; hashed it must be, to be a key of what is made of it."""
        object.__setattr__(self, "lengths", tuple(self.lengths))

    @cached_property
    def total_tokens(self) -> int:
        """Tokens of the whole batch."""
        return sum(self.lengths)

    @cached_property
    def per_rank_actual_token(self) -> list[int]:
        """Rows that each rank really holds."""
        return [sum(run.length for run in self.runs(rank)) for rank in range(self.cp_size)]

    @cached_property
    def max_rank_len(self) -> list[int]:
        """The padded length, cp_size times, as upstream keeps it."""
        return [max(self.per_rank_actual_token)] * self.cp_size

    def rank_rows(self, rank: int) -> torch.Tensor:
        """Token index of each row that `rank` holds, in the order it holds them: int64 `[rows]`."""
        parts = [
            torch.arange(run.length, dtype=torch.int64, device="cpu") * run.step + run.token
            for run in self.runs(rank)
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device="cpu")

    def runs(self, rank: int) -> tuple[Run, ...]:
        """`rank_rows` as few arithmetic runs: what a gather copies, one slice a run."""
        _check_rank(rank, self.cp_size)
        return self._runs[rank]

    @cached_property
    def _runs(self) -> tuple[tuple[Run, ...], ...]:
        pieces = {
            "zigzag": self._zigzag_pieces,
            "interleave": self._interleave_pieces,
            "contiguous": self._contiguous_pieces,
        }[self.strategy]
        return tuple(tuple(_merge(pieces(rank))) for rank in range(self.cp_size))

    @cached_property
    def starts(self) -> list[int]:
        """First token of each sequence in the flattened batch."""
        return [sum(self.lengths[:i]) for i in range(len(self.lengths))]

    def owners(self) -> torch.Tensor:
        """Rank that holds each token: int64 `[total_tokens]`."""
        owner = torch.empty(self.total_tokens, dtype=torch.int64, device="cpu")
        for rank in range(self.cp_size):
            owner[self.rank_rows(rank)] = rank
        return owner

    def sequence_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Sequence that each token (index into the flattened batch) belongs to: int64."""
        ends = torch.tensor(self.lengths, dtype=torch.int64, device="cpu").cumsum(0)
        return torch.searchsorted(ends, tokens, right=True)

    @cached_property
    def rank_order(self) -> torch.Tensor:
        """Token index of each row once padding is stripped: rank 0's rows, rank 1's rows …"""
        return torch.cat([self.rank_rows(rank) for rank in range(self.cp_size)])

    @cached_property
    def token_order(self) -> torch.Tensor:
        """Inverse of `rank_order`: where in rank order token t stands (`x[token_order]`)."""
        return self.rank_order.argsort()

    # ------------------------------------------------------- upstream's zigzag lists

    @cached_property
    def split_list(self) -> list[int]:
        """Block sizes in token order: 2·cp blocks of sequence 0, then of sequence 1 …"""
        self._only_zigzag("split_list")
        return [size for length in self.lengths for size in _block_sizes(length, 2 * self.cp_size)]

    def zigzag_index(self, rank: int) -> list[int]:
        """Blocks of `split_list` that `rank` holds: all first blocks, then all second blocks."""
        self._only_zigzag("zigzag_index")
        _check_rank(rank, self.cp_size)
        blocks = 2 * self.cp_size
        firsts = [sequence * blocks + rank for sequence in range(len(self.lengths))]
        seconds = [sequence * blocks + blocks - 1 - rank for sequence in range(len(self.lengths))]
        return firsts + seconds

    @cached_property
    def reverse_split_len(self) -> list[int]:
        """Block sizes in rank order: how to cut the stripped gather into blocks."""
        sizes = self.split_list
        return [sizes[block] for rank in range(self.cp_size) for block in self.zigzag_index(rank)]

    @cached_property
    def cp_reverse_index(self) -> list[int]:
        """Where in rank order the blocks of token order stand; `cat` them so to reorganize."""
        rank_order = [b for rank in range(self.cp_size) for b in self.zigzag_index(rank)]
        position = {block: place for place, block in enumerate(rank_order)}
        return [position[block] for block in range(len(rank_order))]

    # ------------------------------------------------------------------ the strategies

    def _zigzag_pieces(self, rank: int) -> Iterator[Run]:
        blocks = 2 * self.cp_size
        for block in (rank, blocks - 1 - rank):
            for start, length in zip(self.starts, self.lengths, strict=True):
                size, longer = divmod(length, blocks)
                yield Run(0, start + block * size + min(block, longer), 1, size + (block < longer))

    def _interleave_pieces(self, rank: int) -> Iterator[Run]:
        count = (self.total_tokens - rank + self.cp_size - 1) // self.cp_size
        yield Run(0, rank, self.cp_size, count)

    def _contiguous_pieces(self, rank: int) -> Iterator[Run]:
        for start, length in zip(self.starts, self.lengths, strict=True):
            first, stop = (length * edge // self.cp_size for edge in (rank, rank + 1))
            yield Run(0, start + first, 1, stop - first)

    def _only_zigzag(self, name: str) -> None:
        if self.strategy != "zigzag":
            raise ValueError(
                f"{name} describes zigzag blocks, and this layout is {self.strategy!r}: "
                f"use rank_rows(rank), which every strategy has"
            )


def shard(x: torch.Tensor, metadata: ContextParallelMetadata, rank: int) -> torch.Tensor:
    """The rows of `x` (token order, `[total_tokens, …]`) that `rank` holds: `[rows, …]`, a copy.

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


def _block_sizes(length: int, blocks: int) -> list[int]:
    """The first `length % blocks` blocks are one token longer."""
    size, longer = divmod(length, blocks)
    return [size + (block < longer) for block in range(blocks)]


def _merge(pieces: Iterable[Run]) -> Iterator[Run]:
    """Number the rows, drop empty pieces, join each piece that goes on where the last ended."""
    last: Run | None = None
    row = 0
    for _, token, step, length in pieces:
        if length <= 0:
            continue
        if last and last.step == step and token == last.token + last.length * step:
            last = last._replace(length=last.length + length)
        else:
            if last:
                yield last
            last = Run(row, token, step, length)
        row += length
    if last:
        yield last


def _checked_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(index(n) for n in lengths if not isinstance(n, bool))
    except TypeError:
        sizes = ()
    if not sizes or len(sizes) < len(lengths) or min(sizes) < 1:
        raise ValueError(
            f"lengths is {lengths!r}; it must hold the tokens of each sequence, "
            f"at least one sequence of at least one token, for example [4097, 812]"
        )
    return sizes


def _check_cp_size(cp_size: int) -> None:
    if not isinstance(cp_size, int) or isinstance(cp_size, bool) or cp_size < 1:
        raise ValueError(f"cp_size is {cp_size!r}; it must be a whole number of ranks, 1 or more")


def _check_strategy(strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; it must be one of {', '.join(STRATEGIES)}")


def _check_rank(rank: int, cp_size: int) -> None:
    if not 0 <= rank < cp_size:
        raise ValueError(f"rank is {rank}; this layout has ranks 0 to {cp_size - 1}")
