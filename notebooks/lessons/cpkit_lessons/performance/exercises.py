"""Notebook 3: the checks of its exercises, in the order of the notebook."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from cpkit.algorithms import AlgorithmName
from cpkit.control.results import GatherResult
from cpkit.lab import Lab
from cpkit.layout import ContextParallelMetadata
from cpkit.provenance import poison_
from cpkit_lessons import rows
from cpkit_lessons.feedback import Score, WrongAnswer
from cpkit_lessons.performance.questions import LESSON
from cpkit_lessons.published import SYMMETRIC

Bandwidths = Callable[[int, float, int], tuple[float, float]]
Light = Callable[[int, int, float, float], float]
GatherTime = Callable[[np.ndarray, int], float]
Fit = Callable[[Sequence[int], Sequence[float]], tuple[float, float]]
Price = Callable[[Mapping[str, int], int, float, float, float], float]
Copy = tuple[int, int, int]  # first row of the shard, first token, length
Copies = Callable[[list[int]], Sequence[Copy]]
Line = tuple[float, float]  # alpha in µs, beta in µs per byte
BreakEven = Callable[[Line, Line, float], float]


def _number(call: str, got: object) -> float:
    if isinstance(got, bool) or not isinstance(got, int | float | np.number):
        raise WrongAnswer(f"{call} returned {got!r:.60}; expected a number")
    return float(got)


def _pair(call: str, got: object, names: str) -> tuple[float, float]:
    if not isinstance(got, tuple | list | np.ndarray) or len(got) != 2:
        raise WrongAnswer(f"{call} returned {got!r:.60}; expected {names}")
    return _number(call, got[0]), _number(call, got[1])


# ------------------------------------------------------------- 1 and 2: bandwidth, speed of light


@LESSON.exercise("e1", "algbw and busbw")
def check_bandwidths(bandwidths: Bandwidths) -> Score:
    """Check the example of the notebook, then random sizes, ranks and times."""
    draw, cases = random.Random(3), 0
    asked = [(8_400_000, 20_000.0, 4), (1 << 20, 10.0, 1)]
    asked += [
        (draw.randint(1, 1 << 30), draw.uniform(1, 1e6), draw.randint(1, 72)) for _ in range(200)
    ]
    for rank_bytes, time_us, cp_size in asked:
        total = rank_bytes * cp_size
        algbw = total / time_us / 1e3
        wanted = {"algbw": algbw, "busbw": algbw * (cp_size - 1) / cp_size}
        call = f"bandwidths({rank_bytes}, {time_us:.6g}, {cp_size})"
        got = _pair(call, bandwidths(rank_bytes, time_us, cp_size), "(algbw, busbw)")
        for name, found in zip(wanted, got, strict=True):
            if not math.isclose(found, wanted[name], rel_tol=1e-9, abs_tol=1e-12):
                raise WrongAnswer(
                    f"{call}: {name} is {found:.6g} GB/s; expected {wanted[name]:.6g}. The whole "
                    f"result has {total:,} bytes; 1 GB is 10⁹ bytes"
                )
        cases += 1
    return Score(cases)


# Alpha in µs and GB/s that reproduce the symmetric times of Megatron-LM#5596 within 1.1 %. This is
# what NCCL reaches, which is no bound.
_FITTED = (5.3, 328.0)


@LESSON.exercise("e2", "speed of light of a link")
def check_light(light_us: Light) -> Score:
    """Check random machines, then the four sizes measured in Megatron-LM#5596."""
    draw, cases = random.Random(5), 0
    for _ in range(200):
        total, cp_size = draw.randint(1, 1 << 32), draw.randint(1, 72)
        alpha_us, gbps = draw.uniform(0, 50), draw.uniform(1, 900)
        wanted = alpha_us + total * (cp_size - 1) / cp_size / (gbps * 1e3)
        got = _number("light_us", light_us(total, cp_size, alpha_us, gbps))
        if not math.isclose(got, wanted, rel_tol=1e-9):
            raise WrongAnswer(
                f"light_us({total}, {cp_size}, {alpha_us:.4g}, {gbps:.4g}) is {got:.6g} µs; "
                f"expected {wanted:.6g}: alpha {alpha_us:.4g} µs, then the bytes of the other "
                f"ranks at {gbps:.4g} · 10³ bytes per µs"
            )
        cases += 1
    errors = [
        abs(light_us(size, 8, *_FITTED) / measured - 1)
        for size, measured in zip(SYMMETRIC.sizes_bytes, SYMMETRIC.symmetric_us, strict=True)
    ]
    note = (
        f"with the 5.3 µs and 328 GB/s that NCCL reaches, your function also reproduces the times "
        f"of {SYMMETRIC.source} within {max(errors):.0%}"
    )
    return Score(cases, note=note)


# --------------------------------------------------------------- 3: from samples to one time


@LESSON.exercise("e3", "the time of a gather")
def check_gather_us(gather_us: GatherTime) -> Score:
    """Check generated samples: slow first ones, an outlier, and a slowest rank that changes."""
    draw, cases = random.Random(17), 0
    for _ in range(60):
        warmup, iterations, ranks = draw.randint(1, 3), draw.randint(5, 30), draw.randint(2, 8)
        times = _samples(draw, warmup, iterations, ranks)
        slowest = times.max(axis=1)[warmup:]
        wanted = float(np.median(slowest))
        got = _number("gather_us", gather_us(times.copy(), warmup))
        medians = (wanted, statistics.median_low(slowest), statistics.median_high(slowest))
        if not any(math.isclose(got, median, rel_tol=1e-9) for median in medians):
            raise WrongAnswer(
                f"{warmup} warm-up and {iterations} further iterations on {ranks} ranks: you "
                f"report {got:.6g} µs; expected {wanted:.6g} µs. {_mistake(times, warmup, got)}"
            )
        cases += 1
    return Score(cases)


def _samples(draw: random.Random, warmup: int, iterations: int, ranks: int) -> np.ndarray:
    """Return [warmup + iterations, ranks]: a late rank per iteration, and one slow iteration."""
    times = np.array(
        [[draw.uniform(90, 110) for _ in range(ranks)] for _ in range(warmup + iterations)]
    )
    times[:warmup] *= draw.uniform(5, 20)
    for row in times[warmup:]:
        row[draw.randrange(ranks)] += draw.uniform(20, 60)
    times[warmup + draw.randrange(iterations)] *= draw.uniform(10, 30)
    return times


def _mistake(times: np.ndarray, warmup: int, got: float) -> str:
    """Name the typical mistake that yields exactly this number."""
    kept = times[warmup:]
    mistakes = {
        "Yours is the mean of all samples.": times.mean(),
        "Yours is the mean: one slow iteration moved it.": kept.max(axis=1).mean(),
        "Yours is the median of rank 0 alone.": np.median(kept[:, 0]),
        "Yours takes the fastest rank of each iteration.": np.median(kept.min(axis=1)),
        "Yours includes the warm-up.": np.median(times.max(axis=1)),
        "Yours is the median of all samples, but the slowest rank sets the time.": np.median(kept),
        "Yours is the median of the ranks' medians, but the slowest rank sets the time.": np.median(
            np.median(kept, axis=0)
        ),
        "Yours is the largest of the ranks' medians: the slowest rank changes from one "
        "iteration to the next.": np.median(kept, axis=0).max(),
        "Yours includes the warm-up, and is the largest of the ranks' medians.": np.median(
            times, axis=0
        ).max(),
        "Yours is the best sample.": kept.max(axis=1).min(),
    }
    return next((text for text, value in mistakes.items() if math.isclose(got, value)), "")


# ------------------------------------------------------------------------ 4: from times to a line

_SIZES = tuple(1 << power for power in range(14, 28, 2))  # 16 KB … 64 MB
_UNSEEN = tuple(3 << power for power in range(13, 25, 2))


@LESSON.exercise("e4", "fit alpha and beta")
def check_fit(fit: Fit) -> Score:
    """Fit lines over 16 KB … 64 MB; compare at sizes that were not fitted.

    Each sample has 5 % noise, and one at an end is 25 % too slow: a line through two is rejected.
    """
    draw = random.Random(23)
    yours, reference, cases = 0.0, 0.0, 0
    for _ in range(80):
        alpha, beta = draw.uniform(5, 200), draw.uniform(1e-5, 1e-3)
        noisy = [(alpha + beta * size) * draw.uniform(0.95, 1.05) for size in _SIZES]
        noisy[draw.choice((0, -1))] *= 1.25
        found = _pair("fit", fit(_SIZES, list(noisy)), "(alpha_us, us_per_byte)")
        error, size = _largest_error(found, (alpha, beta))
        yours = max(yours, error)
        reference = max(reference, _largest_error(fit_line(_SIZES, noisy), (alpha, beta))[0])
        if error > 0.25:
            raise WrongAnswer(
                f"samples of {alpha:.1f} µs + {beta:.2e} µs/B, one 25 % too slow: you found "
                f"{found[0]:.1f} µs + {found[1]:.2e} µs/B, which is {error:.0%} off at {size:,} "
                f"bytes (up to 25 % is allowed)"
            )
        cases += 1
    published = fit(SYMMETRIC.sizes_bytes, list(SYMMETRIC.symmetric_us))
    alpha = _pair("fit", published, "(alpha_us, us_per_byte)")[0]
    costs = {"largest error in %": (round(100 * yours), round(100 * reference))}
    return Score(
        cases, costs, note=f"alpha of the symmetric kernels of {SYMMETRIC.source}: {alpha:.1f} µs"
    )


def fit_line(sizes_bytes: Sequence[int], times_us: Sequence[float]) -> Line:
    """Return (alpha in µs, beta in µs per byte) by least squares of the relative error."""
    weights = 1 / np.asarray(times_us, dtype=float)
    beta, alpha = np.polyfit(sizes_bytes, times_us, 1, w=weights)
    return float(alpha), float(beta)


def _largest_error(found: Line, true: Line) -> tuple[float, int]:
    """Return the largest relative error at sizes that were not fitted, and the size."""
    return max(
        (abs((found[0] + found[1] * size) / (true[0] + true[1] * size) - 1), size)
        for size in _UNSEEN
    )


# ----------------------------------------------------------------------- 5: the price of a gather


@LESSON.exercise("e5", "the price of a gather")
def check_price(lab: Lab, price_us: Price) -> Score:
    """Check the stages of real gathers with random prices."""
    draw, cases, cp_size = random.Random(29), 0, LESSON.world.cp_size
    algorithms: tuple[AlgorithmName, ...] = ("padded", "padded_symm", "direct")
    for algorithm in algorithms:
        for lengths in (rows.ragged(cp_size), [17] * 3, [64]):
            written = rows_written(lab.gather(lengths, cp_size, algorithm=algorithm))
            total = sum(lengths)
            prices = [round(draw.uniform(1, 100), 1) for _ in range(3)]
            wanted = price(written, total, *prices)
            got = _number("price_us", price_us(dict(written), total, *prices))
            if not math.isclose(got, wanted, rel_tol=1e-9):
                raise WrongAnswer(
                    f"{algorithm}, lengths {lengths}: the buffers of rank 0 received {written} for "
                    f"{total} rows; "
                    f"copy {prices[0]}, wire {prices[1]}, barrier {prices[2]} µs: you say "
                    f"{got:.2f} µs, expected {wanted:.2f}"
                )
            cases += 1
    return Score(cases)


def rows_written(gathered: GatherResult, rank: int = 0) -> dict[str, int]:
    """Return the rows that one rank wrote in each stage of a gather.

    A rank that has no rows to pad and sends from ordinary memory does not write in stage `pad`.
    """
    written = {name: len(gathered.stage(name, rank)) for name in gathered.stages}
    held = written.pop("shard")
    if written.get("pad") == held and gathered.algorithm != "padded_symm":
        del written["pad"]
    return written


def price(
    rows: Mapping[str, int], total: int, copy_us: float, wire_us: float, barrier_us: float
) -> float:
    """Return the time of a gather in µs: two barriers, and the rows of each stage.

    Writing `total` rows takes `wire_us` in the stage `wire` and `copy_us` in any other.
    """
    passes = sum(n / total * (wire_us if stage == "wire" else copy_us) for stage, n in rows.items())
    return 2 * barrier_us + passes


# ------------------------------------------------------------------------------- 6: few copies


@LESSON.exercise("e6", "few copies, final positions")
def check_copies(copies: Copies) -> Score:
    """Copy stamped rows of all ranks into poisoned results, for small and random layouts."""
    cases = yours = fewest = row_by_row = 0
    for round_, layout in rows.rounds(rows.layouts()):
        wanted = rows.token_order(layout, round_)
        result = poison_(torch.empty_like(wanted))
        for rank in range(layout.cp_size):
            tokens = layout.rank_rows(rank).tolist()
            plan = _checked_plan(copies(list(tokens)), tokens, layout, rank)
            shard = rows.shard(layout, rank, round_)
            for row, token, length in plan:
                result[token : token + length] = shard[row : row + length]
            least = _fewest(tokens)
            if len(plan) > least:
                raise WrongAnswer(
                    f"rank {rank} holds tokens {tokens}: your plan has {len(plan)} copies; the "
                    f"minimum is {least}, because consecutive tokens need one copy"
                )
            yours, fewest = yours + len(plan), fewest + least
        rows.check_rows("copies", result, wanted, layout)
        cases, row_by_row = cases + 1, row_by_row + layout.total_tokens
    note = f"one copy per row: {row_by_row:,} copies"
    return Score(cases, {"copies": (yours, fewest)}, note=note)


def _fewest(tokens: list[int]) -> int:
    """Return the number of runs of consecutive tokens."""
    gaps = itertools.pairwise(tokens)
    return bool(tokens) + sum(after != before + 1 for before, after in gaps)


def _is_copy(copy: object) -> bool:
    if not isinstance(copy, tuple | list) or len(copy) != 3:
        return False
    return all(isinstance(number, int | np.integer) for number in copy)


def _checked_plan(
    plan: object, tokens: list[int], layout: ContextParallelMetadata, rank: int
) -> list[Copy]:
    """Return the plan if every copy is inside the shard and inside the result."""
    if not isinstance(plan, list | tuple) or not all(map(_is_copy, plan)):
        raise WrongAnswer(
            f"copies({tokens}) returned {plan!r:.60}; expected a list of (row, token, length)"
        )
    for row, token, length in plan:
        inside = 0 <= row <= row + length <= len(tokens)
        if not (inside and length > 0 and 0 <= token <= token + length <= layout.total_tokens):
            raise WrongAnswer(
                f"rank {rank} of {layout.cp_size} holds {len(tokens)} rows of "
                f"{layout.total_tokens} tokens; the copy ({row}, {token}, {length}) is out of range"
            )
    return list(plan)


# ------------------------------------------------------------------------ 7: where a gain ends


@LESSON.exercise("e7", "where a gain ends")
def check_break_even(break_even_bytes: BreakEven) -> Score:
    """Check random pairs of lines; some have the gain at every size, some at no size."""
    draw, cases = random.Random(11), 0
    edges = [((10.0, 2e-6), (5.0, 1e-6), 1.5), ((10.0, 1e-6), (9.0, 1e-6), 1.5)]
    # Lines that grow equally fast after the factor of `gain`: the ratio never crosses it.
    edges += [((alpha, 2e-6), (9.0, 1e-6), 2.0) for alpha in (10.0, 18.0, 20.0)]
    drawn = [
        (
            (draw.uniform(8, 60), draw.uniform(2, 9) * 1e-6),
            (draw.uniform(1, 20), draw.uniform(2, 9) * 1e-6),
            draw.choice((1.05, 1.1, 1.25, 1.5)),
        )
        for _ in range(300)
    ]
    for slow, fast, gain in edges + drawn:
        lines = ", ".join(f"({alpha:.6g}, {beta:.6g})" for alpha, beta in (slow, fast))
        call = f"break_even_bytes({lines}, {gain})"
        got = _number(call, break_even_bytes(slow, fast, gain))
        wanted, why = _break_even(slow, fast, gain)
        if not math.isclose(got, wanted, rel_tol=1e-6, abs_tol=1e-6):
            raise WrongAnswer(f"{call} is {got:.6g} bytes; expected {wanted:.6g}: {why}")
        cases += 1
    return Score(cases)


def _break_even(slow: Line, fast: Line, gain: float) -> tuple[float, str]:
    """Return the size above which `slow` takes at most `gain` times as long, and the reason."""
    alpha_left, beta_lost = slow[0] - gain * fast[0], gain * fast[1] - slow[1]
    if alpha_left <= 0 and beta_lost >= 0:
        return 0.0, "the ratio never exceeds the gain"
    if beta_lost <= 0:
        return math.inf, "the ratio stays above the gain for all large sizes"
    size = alpha_left / beta_lost
    times = [alpha + beta * size for alpha, beta in (slow, fast)]
    return size, f"there the times are {times[0]:.4g} and {times[1]:.4g} µs, {gain} to 1"
