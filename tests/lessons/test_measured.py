"""A measured order or ratio: a guess is wrong only where the measurement is clear."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from cpkit.control.measurements import ClockResult
from cpkit.control.messages import Array
from cpkit.timing import Ratio
from cpkit.worker.workload import Workload
from cpkit_lessons.lesson import Lesson
from cpkit_lessons.measured import Order, call_ratio, order, order_of
from tests.helpers.cards import shown

NOISE = np.array([1.0, 1.3, 0.8, 1.1, 0.9, 1.2, 0.7, 1.0, 1.4, 0.95])
NAMES = ("slow", "fast", "level")


def clocked(device_us: dict[str, float] | None = None, **medians_us: float) -> ClockResult:
    """Return a run of 10 iterations on 2 ranks; noise slows all calls of one iteration alike."""
    spans = np.zeros((len(medians_us), len(NOISE), 2, 2))
    for call, us in enumerate(medians_us.values()):
        spans[call, :, :, 1] = us * np.outer(NOISE, [1.0, 0.5])
    device = np.zeros((len(medians_us), 0, 2))
    if device_us:
        device = np.stack([us * np.outer(NOISE, [0.5, 1.0]) for us in device_us.values()])
    calls = tuple(medians_us)
    return ClockResult(Workload(2, (8,)), calls, Array.of(spans), Array.of(device))


def jitter(run: ClockResult, call: str) -> ClockResult:
    """Return a run in which noise hits one call alone, in every third iteration."""
    spans = run.samples_us.numpy().copy()
    spans[run.calls.index(call), ::3] *= 4
    return ClockResult(run.workload, run.calls, Array.of(spans), run.device_samples_us)


def test_noise_that_slows_all_calls_of_an_iteration_hides_no_difference() -> None:
    seen = order(clocked(slow=130, fast=100, level=115), NAMES)
    assert str(seen) == "fast < level < slow"
    assert [guess for guess in permutations(NAMES) if seen.allows(guess)] == [seen.names]


def test_either_order_is_right_where_no_difference_is_clear() -> None:
    seen = order(jitter(clocked(slow=1000, fast=100, level=50), "level"), NAMES)
    assert seen.names[-1] == "slow"
    assert "≈" in str(seen)
    allowed = {guess for guess in permutations(NAMES) if seen.allows(guess)}
    assert allowed == {("fast", "level", "slow"), ("level", "fast", "slow")}


def test_on_a_gpu_the_order_is_that_of_device_time() -> None:
    run = clocked({"host": 10, "gpu": 40}, host=300, gpu=200)
    assert order(run, ("host", "gpu")).names == ("host", "gpu")
    assert call_ratio(run, "host", "gpu").value == pytest.approx(1.5)


def test_ratios_whose_intervals_overlap_have_no_order() -> None:
    ratios = {"most": Ratio(3, 2.5, 3.5), "less": Ratio(1, 0.8, 1.2), "least": Ratio(0.9, 0.7, 1.1)}
    seen = order_of(ratios)
    assert str(seen) == "least ≈ less < most"
    assert seen.clear == {("least", "most"), ("less", "most")}


def test_fewer_than_8_iterations_are_refused() -> None:
    run = clocked(slow=2, fast=1)
    few = ClockResult(
        run.workload, run.calls, Array.of(run.samples_us.numpy()[:, :7]), run.device_samples_us
    )
    with pytest.raises(ValueError, match="7 iterations are too few: time at least 8"):
        call_ratio(few, "slow", "fast")


@pytest.fixture
def lesson() -> Lesson:
    made = Lesson("test")
    made.ask("order", "Which first?", answer=("a", "b", "c"), choices=("c", "a", "b"), why="So.")
    return made


@pytest.mark.parametrize(
    ("guess", "head"),
    [
        ("abc", "✓ You said a < b < c, it is a ≈ b < c: consistent with all clear differences."),
        ("bac", "✓ You said b < a < c, it is a ≈ b < c: consistent with all clear differences."),
        (
            "acb",
            "≠ You said a < c < b, it is a ≈ b < c: your order reverses a clear difference, b < c.",
        ),
    ],
)
def test_a_reveal_of_an_order_says_what_was_clear(lesson: Lesson, guess: str, head: str) -> None:
    measured = Order(("a", "b", "c"), frozenset({("a", "c"), ("b", "c")}))
    shown(lesson.predict, "order", list(guess))
    assert shown(lesson.reveal, "order", measured).split("\n")[0] == head
    assert f"{measured}" in shown(lesson.progress)


def test_an_order_that_is_clear_throughout_is_exact(lesson: Lesson) -> None:
    shown(lesson.predict, "order", ["a", "b", "c"])
    measured = Order(("a", "b", "c"), frozenset({("a", "b"), ("a", "c"), ("b", "c")}))
    assert shown(lesson.reveal, "order", measured).startswith("✓ You said a < b < c, it is a < b")
    assert ": exact." in shown(lesson.reveal, "order", measured)
