"""How many rows of a batch each rank holds, and which tokens they are. Imports no torch.

A rank holds pieces: arithmetic runs of tokens. `cpkit.layout` makes tensors of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index

import numpy as np
import numpy.typing as npt

STRATEGIES = ("zigzag", "interleave", "contiguous")
_MAX_TOKENS = 1 << 48  # sizes in bytes still fit 64 bits
Integers = npt.NDArray[np.int64]


def can_cp_split(lengths: Sequence[int], cp_size: int, strategy: str = "zigzag") -> bool:
    """Return True when upstream would split this batch over `cp_size` ranks; False for one rank.

    zigzag: every sequence has at least 2·cp tokens. interleave: the batch has at least cp tokens.
    contiguous: every sequence has at least cp tokens, one per rank.
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


def checked_batch(
    lengths: Sequence[int], cp_size: int, strategy: str
) -> tuple[tuple[int, ...], int, str]:
    """Return the arguments with lengths as a tuple. Raises ValueError if there is no layout."""
    sizes = _checked_lengths(lengths)
    _check_cp_size(cp_size)
    _check_strategy(strategy)
    if strategy == "zigzag" and cp_size > 1 and not can_cp_split(sizes, cp_size, strategy):
        raise ValueError(
            f"zigzag over {cp_size} ranks cuts every sequence into {2 * cp_size} blocks, "
            f"and the shortest sequence has {min(sizes)} tokens. Use cp_size=1, as SGLang does for "
            f"such a batch, or strategy 'interleave' or 'contiguous'."
        )
    return sizes, cp_size, strategy


@dataclass(frozen=True)
class Batch:
    """The sequences of a batch, and the rows of each rank."""

    lengths: tuple[int, ...]
    cp_size: int
    strategy: str

    def __post_init__(self) -> None:
        """Check the fields, and convert the lengths to a tuple: a batch is a cache key."""
        object.__setattr__(self, "lengths", _checked_lengths(self.lengths))
        _check_cp_size(self.cp_size)
        _check_strategy(self.strategy)

    @cached_property
    def total_tokens(self) -> int:
        """Number of tokens of the whole batch."""
        return sum(self.lengths)

    @cached_property
    def per_rank_actual_token(self) -> tuple[int, ...]:
        """Number of rows that each rank holds, without padding, by rank."""
        return tuple(int(self._pieces(rank)[2].sum()) for rank in range(self.cp_size))

    @cached_property
    def max_rank_len(self) -> tuple[int, ...]:
        """The padded length, repeated cp_size times as upstream does."""
        return (max(self.per_rank_actual_token),) * self.cp_size

    @cached_property
    def _lengths(self) -> Integers:
        return np.array(self.lengths, dtype=np.int64)

    @cached_property
    def _starts(self) -> Integers:
        return np.cumsum(self._lengths) - self._lengths

    # ------------------------------------- the strategies: (first token, step, rows) of each piece

    def _pieces(self, rank: int) -> tuple[Integers, int, Integers]:
        strategies = {
            "zigzag": self._zigzag_pieces,
            "interleave": self._interleave_pieces,
            "contiguous": self._contiguous_pieces,
        }
        return strategies[self.strategy](rank)

    def _zigzag_pieces(self, rank: int) -> tuple[Integers, int, Integers]:
        blocks = 2 * self.cp_size
        size, longer = np.divmod(self._lengths, blocks)
        held = np.array([[rank], [blocks - 1 - rank]])
        tokens = self._starts + held * size + np.minimum(held, longer)
        return tokens.flatten(), 1, (size + (held < longer)).flatten()

    def _interleave_pieces(self, rank: int) -> tuple[Integers, int, Integers]:
        count = (self.total_tokens - rank + self.cp_size - 1) // self.cp_size
        return np.array([rank]), self.cp_size, np.array([count])

    def _contiguous_pieces(self, rank: int) -> tuple[Integers, int, Integers]:
        first, stop = (self._lengths * edge // self.cp_size for edge in (rank, rank + 1))
        return self._starts + first, 1, stop - first


def _checked_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    try:
        given = sizes = tuple(lengths)
        if set(map(type, sizes)) != {int}:  # such as numpy integers
            sizes = tuple(index(n) for n in given if not isinstance(n, bool))
    except TypeError:
        given = sizes = ()
    if not sizes or len(sizes) < len(given) or min(sizes) < 1 or sum(sizes) > _MAX_TOKENS:
        raise ValueError(
            f"lengths is {lengths!r:.200}; it must hold the number of tokens of each sequence, "
            f"at least one sequence of at least one token, at most 2**48 tokens in all, for "
            f"example [4097, 812]"
        )
    return sizes


def _check_cp_size(cp_size: int) -> None:
    if not isinstance(cp_size, int) or isinstance(cp_size, bool) or cp_size < 1:
        raise ValueError(
            f"cp_size is {cp_size!r:.80}; it must be a whole number of ranks, 1 or more"
        )


def _check_strategy(strategy: str) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r:.80}; it must be one of {', '.join(STRATEGIES)}")
