"""Fit the cost model to a sweep: least squares of the relative error, with nonnegative costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cpkit.cost import FEATURES, Host, HostModel, features


class Measured(NamedTuple):
    """One figure of a sweep."""

    algorithm: str
    total_bytes: int
    cp_size: int
    time_us: float


def fit(points: Sequence[Measured], host: Host) -> HostModel:
    """Return the model of a host with the smallest relative errors at these points.

    Each algorithm has its own coefficients, because the rate of a copy depends on its shape. Raises
    ValueError without points.
    """
    if not points:
        raise ValueError("there is nothing to fit: pass the points of a sweep")
    by_algorithm: dict[str, list[Measured]] = {}
    for point in points:
        by_algorithm.setdefault(point.algorithm, []).append(point)
    return HostModel(host, {name: _fit_one(group, host) for name, group in by_algorithm.items()})


def _fit_one(points: Sequence[Measured], host: Host) -> tuple[float, ...]:
    times = np.array([point.time_us for point in points])
    counted = np.array([features(p.algorithm, p.total_bytes, p.cp_size, host) for p in points])
    scale = np.maximum(np.abs(counted).max(axis=0), 1e-30)
    weights = nonnegative_least_squares(counted / scale / times[:, None], np.ones(len(points)))
    return tuple(float(w) for w in weights / scale)


def nonnegative_least_squares(
    matrix: np.ndarray, target: np.ndarray, tolerance: float = 1e-12
) -> np.ndarray:
    """Return the x ≥ 0 that minimizes |matrix·x - target|. Source: Lawson and Hanson, 1974."""
    count = matrix.shape[1]
    free = np.zeros(count, dtype=bool)
    x = np.zeros(count)
    for _ in range(10 * count):
        gradient = matrix.T @ (target - matrix @ x)
        gradient[free] = -np.inf
        if free.all() or gradient.max() <= tolerance:
            break
        free[int(gradient.argmax())] = True
        while True:
            trial = np.zeros(count)
            trial[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            if (trial[free] > 0).all():
                break
            back = free & (trial <= 0)
            step = (x[back] / (x[back] - trial[back])).min()
            x = x + step * (trial - x)
            free &= x > tolerance
        x = trial
    return x


def describe(model: HostModel) -> dict[str, dict[str, float]]:
    """Return the coefficients by name: µs per step, and GB/s for every nonzero rate."""
    said = {}
    for algorithm, weights in model.coefficients.items():
        named = dict(zip(FEATURES, weights, strict=True))
        rates = {f"{name}_gbps": 1e-3 / named[name] for name in FEATURES[1:] if named[name] > 0}
        said[algorithm] = {"start_us": named["start"], **rates}
    return said
