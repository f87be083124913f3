"""What a gather must return, from the definitions in the docs. Pure: no cpkit, no collective.

    zigzag       each sequence is cut into 2·cp blocks; the first `length mod 2·cp` have one token
                 more. Rank r holds blocks r of all sequences, then blocks 2·cp-1-r of all
    interleave   rank r holds the tokens t of the batch with t mod cp = r
    contiguous   rank r holds the tokens from length·r // cp to length·(r+1) // cp of each sequence

The bytes of a row are a hash of (case, gather, tensor, group, token), so a row that is found in the
wrong place names the place that it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.fuzz.case import Case, Kind

POISON_BYTE = 0xDB
Bytes = npt.NDArray[np.uint8]
_MIX = tuple(np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def rows_by_rank(lengths: Sequence[int], cp_size: int, strategy: str) -> list[list[int]]:
    """Return the tokens that each rank holds, in its order."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    if strategy == "interleave":
        return [list(range(rank, sum(lengths), cp_size)) for rank in range(cp_size)]
    held: list[list[int]] = [[] for _ in range(cp_size)]
    if strategy == "contiguous":
        for start, length in zip(starts, lengths, strict=True):
            for rank in range(cp_size):
                first, stop = length * rank // cp_size, length * (rank + 1) // cp_size
                held[rank] += range(start + first, start + stop)
        return held
    for rank in range(cp_size):
        for block in (rank, 2 * cp_size - 1 - rank):
            for start, length in zip(starts, lengths, strict=True):
                held[rank] += _block(start, length, 2 * cp_size, block)
    return held


def _block(start: int, length: int, blocks: int, block: int) -> range:
    size, longer = divmod(length, blocks)
    first = start + block * size + min(block, longer)
    return range(first, first + size + (block < longer))


@dataclass(frozen=True)
class Oracle:
    """The expected bytes of one case in the group with this index."""

    case: Case
    group_index: int

    @cached_property
    def held(self) -> list[list[int]]:
        """Tokens by rank; in a gather of equal shards each rank has as many as the first."""
        case = self.case
        if case.call == "shards":
            rows = case.lengths[0]
            return [list(range(r * rows, (r + 1) * rows)) for r in range(case.cp_size)]
        return rows_by_rank(case.lengths, case.cp_size, case.strategy)

    @cached_property
    def total(self) -> int:
        """Number of tokens of the batch."""
        return sum(map(len, self.held))

    @cached_property
    def _owner(self) -> npt.NDArray[np.int64]:
        owner = np.empty(self.total, dtype=np.int64)
        for rank, tokens in enumerate(self.held):
            owner[tokens] = rank
        return owner

    def rows(self, gather: int, number: int, tokens: Sequence[int]) -> Bytes:
        """Return the bytes of these tokens in one tensor of one gather: `[tokens, row bytes]`."""
        kind = self.case.kinds[number]
        ids = np.asarray(tokens, dtype=np.int64)
        if kind.same == "rows":
            ids = self._owner[ids]
        key = f"{self.case.seed} {gather} {number} {self.group_index}"
        return _content(kind, ids, int.from_bytes(blake2b(key.encode(), digest_size=7).digest()))

    def mine(self, gather: int, number: int, rank: int) -> Bytes:
        """Return the rows that a rank passes."""
        return self.rows(gather, number, self.held[rank])

    def result(self, gather: int, number: int) -> Bytes:
        """Return the rows of a correct result, in the order that the call promises."""
        if self.case.call == "rank_order":
            return self.rows(gather, number, [t for tokens in self.held for t in tokens])
        return self.rows(gather, number, range(self.total))

    def slots(self) -> npt.NDArray[np.int64]:
        """Return the cache row of each token, or -1."""
        rng = np.random.default_rng(self.case.seed)
        slots = rng.permutation(self.cache_rows)[: self.total].astype(np.int64)
        slots[rng.random(self.total) < self.case.skipped] = -1
        return slots

    @cached_property
    def cache_rows(self) -> int:
        """Number of rows of a cache: more than there are tokens."""
        return self.total + 1 + self.total // 2

    def cache(self, gather: int, number: int) -> Bytes:
        """Return the bytes of a cache that was poisoned before."""
        rows, slots = self.result(gather, number), self.slots()
        cache = np.full((self.cache_rows, rows.shape[1]), poison_of(self.case.kinds[number]))
        cache[slots[slots >= 0]] = rows[slots >= 0]
        return cache

    def difference(self, got: Bytes, want: Bytes, number: int) -> str:
        """Return "" or the first wrong element, and which row is there instead."""
        if got.shape != want.shape:
            return f"{list(got.shape)} bytes; expected {list(want.shape)}"
        if np.array_equal(got, want):
            return ""
        wrong = np.flatnonzero((got != want).any(axis=1))
        row = int(wrong[0])
        size = self.case.kinds[number].dtype.itemsize
        element = int(np.flatnonzero(got[row] != want[row])[0]) // size
        part = slice(element * size, (element + 1) * size)
        return (
            f"row {row} element {element} is {got[row, part].tobytes().hex()}; expected "
            f"{want[row, part].tobytes().hex()}; the row is {self.origin(got[row])} "
            f"({len(wrong)} of {len(want)} rows differ)"
        )

    def origin(self, row: Bytes) -> str:
        """Describe where the bytes of a row come from."""
        if (row == POISON_BYTE).all():
            return "poison (never written)"
        if not row.any():
            return "zeros (padding?)"
        for gather in range(self.case.gathers):
            for number in range(len(self.case.kinds)):
                whole = self.rows(gather, number, range(self.total))
                if whole.shape[1] == len(row):
                    found = np.flatnonzero((whole == row).all(axis=1))
                    if len(found):
                        return f"token {found[0]} of tensor {number} of gather {gather}"
        return "no row of this case"


def poison_of(kind: Kind) -> np.uint8:
    """Return the byte that memory holds before a gather."""
    return np.uint8(1 if kind.dtype == torch.bool else POISON_BYTE)


def _content(kind: Kind, ids: npt.NDArray[np.int64], key: int) -> Bytes:
    items = math.prod(kind.trailing)
    repeats = kind.trailing[-1] if kind.same == "last" else 1
    row_bytes = (items // repeats if repeats else 0) * kind.dtype.itemsize
    if not row_bytes or not len(ids):
        return np.empty((len(ids), items * kind.dtype.itemsize), dtype=np.uint8)
    words = ids.astype(np.uint64)[:, None] * np.uint64(1 << 24)
    words = words + np.arange(-(-row_bytes // 8), dtype=np.uint64) + np.uint64(key)
    data = _mixed(words).view(np.uint8)[:, :row_bytes]
    if kind.dtype == torch.bool:
        data = data & 1
    data = np.ascontiguousarray(data)
    if kind.lazy and (kind.dtype.is_floating_point or kind.dtype.is_complex):
        component = kind.dtype.itemsize // (2 if kind.dtype.is_complex else 1)
        data[:, component - 1 :: component] &= 0xBF  # finite: a NaN may change when it is negated
    if repeats > 1:
        elements = data.reshape(len(ids), -1, kind.dtype.itemsize)
        data = np.repeat(elements, repeats, axis=1).reshape(len(ids), -1)
    return data


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return a hash of each word (splitmix64)."""
    words = words * _MIX[0]
    words = (words ^ (words >> np.uint64(30))) * _MIX[1]
    words = (words ^ (words >> np.uint64(27))) * _MIX[2]
    return words ^ (words >> np.uint64(31))
