"""Notebook 3, exercises 3, 4 and 5: from raw samples to a time, to a line, to a price."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cpkit.algorithms import AlgorithmName
from cpkit.control.results import GatherResult
from cpkit.lab import Lab
from cpkit_lessons.feedback import Score, Wrong
from cpkit_lessons.performance_questions import LESSON
from cpkit_lessons.published import SYMMETRIC

GatherTime = Callable[[np.ndarray, int], float]
Fit = Callable[[Sequence[int], Sequence[float]], tuple[float, float]]
Price = Callable[[Mapping[str, int], int, float, float, float], float]
_SIZES = tuple(1 << power for power in range(14, 28, 2))  # 16 KB … 64 MB
_UNSEEN = tuple(3 << power for power in range(13, 25, 2))


@LESSON.exercise("e3", "the time of a gather")
def check_gather_us(gather_us: GatherTime) -> Score:
    """Planted samples: slow first ones, an outlier, and a slowest rank that changes."""
    draw, cases = random.Random(17), 0
    for _ in range(60):
        warmup, iterations, ranks = draw.randint(1, 3), draw.randint(5, 30), draw.randint(2, 8)
        times = _planted(draw, warmup, iterations, ranks)
        slowest = times.max(axis=1)[warmup:]
        wanted = float(np.median(slowest))
        got = float(gather_us(times.copy(), warmup))
        if not math.isclose(got, wanted, rel_tol=1e-9):
            raise Wrong(
                f"{warmup} warm-up and {iterations} further iterations on {ranks} ranks: you "
                f"report {got:.1f} µs; wanted {wanted:.1f} µs. {_clue(times, warmup, got)}"
            )
        cases += 1
    return Score(cases)


@LESSON.exercise("e4", "fit alpha and beta")
def check_fit(fit: Fit) -> Score:
    """Lines with 5 % of noise over 16 KB … 64 MB, judged at sizes that were not fitted."""
    draw = random.Random(23)
    mine, reference, cases = 0.0, 0.0, 0
    for _ in range(80):
        alpha, beta = draw.uniform(5, 200), draw.uniform(1e-5, 1e-3)
        noisy = [(alpha + beta * size) * draw.uniform(0.95, 1.05) for size in _SIZES]
        found = _two_numbers(fit(_SIZES, list(noisy)))
        worst, size = _worst_error(found, (alpha, beta))
        mine, reference = (
            max(mine, worst),
            max(reference, _worst_error(fit_line(_SIZES, noisy), (alpha, beta))[0]),
        )
        if worst > 0.25:
            raise Wrong(
                f"samples of {alpha:.1f} µs + {beta:.2e} µs/B with 5 % of noise: you found "
                f"{found[0]:.1f} µs + {found[1]:.2e} µs/B, which is {worst:.0%} off at {size:,} "
                f"bytes (25 % are allowed)"
            )
        cases += 1
    alpha = _two_numbers(fit(SYMMETRIC.sizes_bytes, list(SYMMETRIC.after_us)))[0]
    costs = {"% off at worst": (round(100 * mine), round(100 * reference))}
    return Score(cases, costs, note=f"alpha of {SYMMETRIC.source} is {alpha:.1f} µs by your fit")


@LESSON.exercise("e5", "the price of a gather")
def check_price(lab: Lab, price_us: Price) -> Score:
    """The stages of real gathers, with drawn prices."""
    draw, cases = random.Random(29), 0
    algorithms: tuple[AlgorithmName, ...] = ("padded", "padded_symm", "direct")
    for algorithm in algorithms:
        for lengths in ([13, 9], [17] * 3, [64]):
            gathered = lab.gather(lengths, 4, algorithm=algorithm)
            rows, total = rows_written(gathered), sum(lengths)
            prices = [round(draw.uniform(1, 100), 1) for _ in range(3)]
            wanted = price(rows, total, *prices)
            got = float(price_us(dict(rows), total, *prices))
            if not math.isclose(got, wanted, rel_tol=1e-9):
                raise Wrong(
                    f"{algorithm}, lengths {lengths}: rank 0 wrote {rows} for {total} rows; copy "
                    f"{prices[0]}, wire {prices[1]}, meet {prices[2]} µs: you say {got:.2f} µs, "
                    f"wanted {wanted:.2f}"
                )
            cases += 1
    return Score(cases)


def rows_written(gathered: GatherResult, rank: int = 0) -> dict[str, int]:
    """Rows that one rank wrote in each stage: what the gather really did.

    A rank that lacks no rows and sends from ordinary memory pads nothing.
    """
    written = {name: len(gathered.stage(name, rank)) for name in gathered.stages}
    held = written.pop("shard")
    if written.get("pad") == held and gathered.algorithm != "padded_symm":
        del written["pad"]
    return written


def price(
    rows: Mapping[str, int], total: int, copy_us: float, wire_us: float, meet_us: float
) -> float:
    """µs of a gather: each stage by its rows, `wire_us` or `copy_us` for `total` of them, and two
    meetings.
    """
    passes = sum(n / total * (wire_us if stage == "wire" else copy_us) for stage, n in rows.items())
    return 2 * meet_us + passes


def fit_line(sizes_bytes: Sequence[int], times_us: Sequence[float]) -> tuple[float, float]:
    """(alpha in µs, beta in µs per byte): least squares of the relative error."""
    times = np.asarray(times_us, dtype=float)
    columns = np.stack([1 / times, np.asarray(sizes_bytes, dtype=float) / times], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(columns, np.ones(len(times)), rcond=None)
    return float(alpha), float(beta)


def _planted(draw: random.Random, warmup: int, iterations: int, ranks: int) -> np.ndarray:
    """[warmup + iterations, ranks]: one rank of each iteration is late, one iteration is wild."""
    times = np.array(
        [[draw.uniform(90, 110) for _ in range(ranks)] for _ in range(warmup + iterations)]
    )
    times[:warmup] *= draw.uniform(5, 20)
    for row in times[warmup:]:
        row[draw.randrange(ranks)] += draw.uniform(20, 60)
    times[warmup + draw.randrange(iterations)] *= draw.uniform(10, 30)
    return times


def _clue(times: np.ndarray, warmup: int, got: float) -> str:
    """Which usual mistake gives exactly this number."""
    kept = times[warmup:]
    mistakes = {
        "That is the mean of everything.": times.mean(),
        "That is the mean: one wild iteration moved it.": kept.max(axis=1).mean(),
        "That is rank 0 alone.": np.median(kept[:, 0]),
        "That is the fastest rank.": np.median(kept.min(axis=1)),
        "The warm-up is in it.": np.median(times.max(axis=1)),
        "That is the median over everything: no gather is done when half its ranks are.": np.median(
            kept
        ),
        "That is the largest of the ranks' medians: which rank is slowest changes from one "
        "iteration to the next.": np.median(kept, axis=0).max(),
        "That is the best sample.": kept.max(axis=1).min(),
    }
    return next((words for words, value in mistakes.items() if math.isclose(got, value)), "")


def _worst_error(found: tuple[float, float], true: tuple[float, float]) -> tuple[float, int]:
    """The largest relative error at sizes that were not fitted, and the size."""
    return max(
        (abs((found[0] + found[1] * size) / (true[0] + true[1] * size) - 1), size)
        for size in _UNSEEN
    )


def _two_numbers(got: object) -> tuple[float, float]:
    if not isinstance(got, tuple | list | np.ndarray) or len(got) != 2:
        raise Wrong(f"fit returned {got!r:.60}; wanted (alpha_us, us_per_byte)")
    return float(got[0]), float(got[1])
