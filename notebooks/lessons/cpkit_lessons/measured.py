"""Measured results with their noise: an order, and a ratio. A reveal compares a guess with them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise, permutations, product
from typing import TYPE_CHECKING

from cpkit.timing import Ratio

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from cpkit.control.measurements import ClockResult


@dataclass(frozen=True)
class Order:
    """Names, the smallest value first, and the pairs (smaller, larger) that clearly differ."""

    names: tuple[str, ...]
    clear: frozenset[tuple[str, str]]

    def allows(self, guess: Sequence[str]) -> bool:
        """Whether no pair of a guess contradicts a clear difference."""
        return not self._contradicted(guess)

    def verdict(self, guess: tuple[str, ...]) -> str:
        """Compare a guess with this order: what it contradicts, or that it agrees."""
        if wrong := self._contradicted(guess):
            return f"your order reverses a clear difference, {wrong[0][0]} < {wrong[0][1]}"
        is_exact = guess == self.names and self.clear.issuperset(pairwise(guess))
        return "exact" if is_exact else "consistent with all clear differences"

    def _contradicted(self, guess: Sequence[str]) -> list[tuple[str, str]]:
        reversed_pairs = ((second, first) for first, second in combinations(guess, 2))
        return [pair for pair in reversed_pairs if pair in self.clear]

    def __str__(self) -> str:
        text = self.names[0]
        for pair in pairwise(self.names):
            text += (" < " if pair in self.clear else " ≈ ") + pair[1]
        return text


def order(run: ClockResult, calls: Sequence[str]) -> Order:
    """Return the order of calls that were timed interleaved, by device time where there is one.

    A difference is clear if the ratio of the two has its 99 % interval on one side of 1. Raises
    ValueError for fewer than 8 iterations, which have no such interval.
    """
    times_us = {call: _slowest_us(run, call) for call in calls}
    ratios = {(a, b): _ratio(times_us[a], times_us[b]) for a, b in product(calls, repeat=2)}
    clear = frozenset(pair for pair, ratio in ratios.items() if ratio.high < 1)
    return Order(tuple(sorted(calls, key=lambda call: ratios[call, calls[0]].value)), clear)


def order_of(ratios: Mapping[str, Ratio]) -> Order:
    """Return the order of ratios. A difference is clear if their 99 % intervals do not overlap."""
    clear = {pair for pair in permutations(ratios, 2) if ratios[pair[0]].high < ratios[pair[1]].low}
    return Order(tuple(sorted(ratios, key=lambda name: ratios[name].value)), frozenset(clear))


def call_ratio(run: ClockResult, slow: str, fast: str) -> Ratio:
    """Return slow / fast in call time, with its 99 % interval.

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
