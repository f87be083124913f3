"""Notebook 3, exercises 1, 2 and 7: units, the speed of light, and where a gain ends."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from cpkit_lessons.feedback import Score, Wrong
from cpkit_lessons.performance_questions import LESSON
from cpkit_lessons.published import SYMMETRIC

Line = tuple[float, float]  # alpha in µs, beta in µs per byte
Bandwidths = Callable[[int, float, int], tuple[float, float]]
Light = Callable[[int, int, float, float], float]
BreakEven = Callable[[Line, Line, float], float]
FITTED = (5.3, 328.0)  # alpha in µs, GB/s: fits the symmetric column of Megatron-LM#5596 within 1 %


@LESSON.exercise("e1", "algbw and busbw")
def check_bandwidths(bandwidths: Bandwidths) -> Score:
    """The worked example, then drawn sizes, ranks and times."""
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
                raise Wrong(
                    f"{call}: {name} is {found:.6g} GB/s; wanted {wanted[name]:.6g}. The whole "
                    f"result has {total:,} bytes, 1 GB is 10⁹ bytes"
                )
        cases += 1
    return Score(cases)


@LESSON.exercise("e2", "speed of light of a link")
def check_light(light_us: Light) -> Score:
    """Drawn machines; then the four sizes that Megatron-LM#5596 measured."""
    draw, cases = random.Random(5), 0
    for _ in range(200):
        arguments = (
            draw.randint(1, 1 << 32),
            draw.randint(1, 72),
            draw.uniform(0, 50),
            draw.uniform(1, 900),
        )
        total, cp_size, alpha_us, gbps = arguments
        wanted = alpha_us + total * (cp_size - 1) / cp_size / (gbps * 1e3)
        got = _number(light_us(*arguments), "light_us")
        if not math.isclose(got, wanted, rel_tol=1e-9):
            raise Wrong(
                f"light_us({total}, {cp_size}, {alpha_us:.4g}, {gbps:.4g}) is {got:.6g} µs; wanted "
                f"{wanted:.6g}: alpha {alpha_us:.4g} µs, then what a rank does not hold yet at "
                f"{gbps:.4g} · 10³ bytes a µs"
            )
        cases += 1
    errors = [
        abs(light_us(size, 8, *FITTED) / measured - 1)
        for size, measured in zip(SYMMETRIC.sizes_bytes, SYMMETRIC.after_us, strict=True)
    ]
    note = f"and {SYMMETRIC.source} within {max(errors):.1%}, with alpha 5.3 µs and 328 GB/s"
    return Score(cases, note=note)


@LESSON.exercise("e7", "where a gain ends")
def check_break_even(break_even_bytes: BreakEven) -> Score:
    """Drawn pairs of lines; some gain at every size, some at none."""
    draw, cases = random.Random(11), 0
    edges = [((10.0, 2e-6), (5.0, 1e-6), 1.5), ((10.0, 1e-6), (9.0, 1e-6), 1.5)]
    drawn = [
        (
            (draw.uniform(8, 60), draw.uniform(2, 9) * 1e-6),
            (draw.uniform(1, 20), draw.uniform(2, 9) * 1e-6),
            draw.choice((1.05, 1.1, 1.25, 1.5)),
        )
        for _ in range(300)
    ]
    for slow, fast, gain in edges + drawn:
        _judge_break_even(slow, fast, gain, break_even_bytes(slow, fast, gain))
        cases += 1
    return Score(cases)


def _judge_break_even(slow: Line, fast: Line, gain: float, answer: object) -> None:
    call = f"break_even_bytes({_line(slow)}, {_line(fast)}, {gain})"
    got = _number(answer, call)
    room, slope = slow[0] - gain * fast[0], gain * fast[1] - slow[1]
    if room <= 0 and slope >= 0:
        wanted, why = 0.0, "no size has this gain: the answer is 0"
    elif slope <= 0:
        wanted, why = math.inf, "the gain stays above it, however large the size: math.inf"
    else:
        wanted = room / slope
        times = [alpha + beta * wanted for alpha, beta in (slow, fast)]
        why = f"there the times are {times[0]:.4g} and {times[1]:.4g} µs, {gain} to 1"
    if not math.isclose(got, wanted, rel_tol=1e-6, abs_tol=1e-6):
        raise Wrong(f"{call} is {got:.6g} bytes; wanted {wanted:.6g}: {why}")


def _line(line: Line) -> str:
    return f"({line[0]:.4g}, {line[1]:.3g})"


def _number(got: object, call: str) -> float:
    if isinstance(got, bool) or not isinstance(got, int | float):
        raise Wrong(f"{call} returned {got!r:.60}; wanted a number")
    return float(got)


def _pair(call: str, got: object, names: str) -> tuple[float, float]:
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise Wrong(f"{call} returned {got!r:.60}; wanted {names}")
    return _number(got[0], call), _number(got[1], call)
