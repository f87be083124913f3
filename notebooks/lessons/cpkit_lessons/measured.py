"""What a reveal compares a guess with, if noise is part of it: an order, or a ratio."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise, permutations
from typing import TYPE_CHECKING

from cpkit.timing import Ratio

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from cpkit.control.measurements import ClockResult


@dataclass(frozen=True)
class Order:
    """Names, the smallest time first, and the pairs (smaller, larger) that clearly differ."""

    names: tuple[str, ...]
    clear: frozenset[tuple[str, str]]

    def allows(self, guess: Sequence[str]) -> bool:
        """Whether no pair of a guess contradicts a clear difference."""
        return not any((slow, fast) in self.clear for fast, slow in combinations(guess, 2))

    def verdict(self, guess: tuple[str, ...]) -> str:
        """Compare a guess with this order; empty if it contradicts a clear difference."""
        if not self.allows(guess):
            return ""
        is_exact = guess == self.names and self.clear.issuperset(pairwise(guess))
        return "exact" if is_exact else "no clear difference contradicts it"

    def __str__(self) -> str:
        signs = [" < " if pair in self.clear else " ≈ " for pair in pairwise(self.names)]
        return "".join(map("".join, zip(self.names, [*signs, ""], strict=True)))


def order(run: ClockResult, calls: Sequence[str]) -> Order:
    """Return the order of calls that were timed interleaved, by device time where there is one.

    A difference is clear if the ratio of the two has its 99 % interval on one side of 1. Raises
    ValueError for fewer than 8 iterations, which have no such interval.
    """

    def ratio(mine: str, other: str) -> Ratio:
        return _ratio(_slowest_us(run, mine), _slowest_us(run, other))

    clear = frozenset(pair for pair in permutations(calls, 2) if ratio(*pair).high < 1)
    return Order(tuple(sorted(calls, key=lambda call: ratio(call, calls[0]).value)), clear)


def order_of(ratios: Mapping[str, Ratio]) -> Order:
    """Return the order of ratios. A difference is clear if their 99 % intervals do not overlap."""
    clear = {pair for pair in permutations(ratios, 2) if ratios[pair[0]].high < ratios[pair[1]].low}
    return Order(tuple(sorted(ratios, key=lambda name: ratios[name].value)), frozenset(clear))


def call_ratio(run: ClockResult, slow: str, fast: str) -> Ratio:
    """Return by which factor one call takes longer than another, in call time, with its noise.

    Raises ValueError for fewer than 8 iterations.
    """
    return _ratio(run.slowest_us(slow), run.slowest_us(fast))


def _slowest_us(run: ClockResult, call: str) -> np.ndarray:
    device_us = run.device_us(call)  # [iterations, ranks]
    slowest: np.ndarray = device_us.max(axis=1) if device_us.size else run.slowest_us(call)
    return slowest


def _ratio(times_us: np.ndarray, references_us: np.ndarray) -> Ratio:
    ratio = Ratio.of_pairs(times_us.tolist(), references_us.tolist())
    if ratio is None:
        raise ValueError(f"{len(times_us)} iterations are too few: time at least 8, interleaved")
    return ratio
