"""What samples say: ratios with their noise, p95 of enough gathers, and the badges."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from cpkit.control.messages import StatusResult, WorkerInfo, Workload
from cpkit.notebook.badges import contention_badge, path_badge, to_symmetric
from cpkit.notebook.intervals import Intervals, Measured, Summary, compare
from cpkit.notebook.tables import comparison_table
from cpkit.timing import Ratio, median_interval
from tests.helpers.drawn import sample


def test_an_interval_of_the_median_contains_it_as_often_as_promised() -> None:
    random = np.random.default_rng(3)
    for count in (8, 9, 40, 201):
        intervals = [median_interval(random.exponential(size=count)) for _ in range(2000)]
        inside = np.mean([low <= np.log(2) <= high for low, high in intervals])
        assert 0.985 < inside < 1, count  # at least 0.99, but for the chance of 2000 trials
    assert median_interval([1.0] * 7) is None
    assert median_interval([5.0, 1, 2, 3, 4, 6, 7, 8]) == (1, 8)


def test_load_that_slows_both_times_of_a_pair_cancels() -> None:
    random = np.random.default_rng(4)
    load = random.uniform(1, 20, size=40)
    first, second = (load * random.normal(us, us / 50, size=40) for us in (100, 142))
    paired, separate = Ratio.of_pairs(second, first), Ratio.of_separate(second, first)
    assert paired
    assert separate
    assert 1.40 < paired.value < 1.44
    assert paired.differs
    assert str(paired).startswith("1.4")
    assert "× ± 0.0" in str(paired)
    assert not separate.differs, "the load is not the same for both"
    assert str(separate).startswith("no difference seen: ")
    same = Ratio.of_pairs(first, first * random.normal(1, 0.02, size=40))
    assert same
    assert not same.differs


@pytest.mark.parametrize(("gathers", "has_p95"), [(4, False), (5, True)])
def test_few_gathers_have_no_p95_and_few_intervals_no_ratio(gathers: int, has_p95: bool) -> None:
    works = [Workload(4, (13, 9), algorithm=name) for name in ("padded", "direct")]
    intervals = Intervals(works, 5.0)
    assert intervals.summaries() == []
    for number in range(gathers):
        for work in works:
            one = msgspec.structs.replace(sample(algorithm=work.algorithm), gathers_us=(9.0,))
            intervals.add(one, number)
    summaries = intervals.summaries()
    assert [summary.gathers for summary in summaries] == [gathers] * 2
    assert [summary.p95_us is not None for summary in summaries] == [has_p95] * 2
    assert summaries[1].ratio is None


def test_the_window_is_a_time_but_never_too_short_for_a_ratio() -> None:
    intervals = Intervals([Workload(4, (13, 9))], 5.0)
    for second in range(0, 300, 3):
        intervals.add(sample(), second)
    assert intervals.summaries()[0].gathers == 10 * 5, "ten intervals of five gathers"
    for tick in range(100):
        intervals.add(sample(), 300 + tick / 10)
    assert intervals.summaries()[0].gathers == 51 * 5, "five seconds"
    assert (intervals.count, len(intervals.samples())) == (200, 200)


def measured(algorithm: str, *medians_us: float, interval_s: float = 1.0) -> Summary:
    """Return the summary of intervals with these medians."""
    intervals = Intervals([Workload(4, (13, 9), algorithm=algorithm)], 5.0)
    for number, us in enumerate(medians_us):
        one = sample(algorithm=algorithm, first_us=us - 3)
        intervals.add(one, number * interval_s)
    return intervals.summaries()[0]


def test_b_is_compared_with_the_same_algorithm_of_a_or_with_its_first() -> None:
    steady = np.linspace(99, 101, 20)
    padded, direct = measured("padded", *4 * steady), measured("direct", *steady)
    baseline = Measured("cp_size 4 <A>", (padded, direct))
    later = [measured("direct", *steady * 1.5), measured("plan", *steady), padded]
    compared = compare(baseline, later)
    assert [each.of_a.algorithm for each in compared] == ["direct", "padded", "padded"]
    assert [each.ratio and round(each.ratio.value, 2) for each in compared] == [1.5, 0.25, 1.0]
    table = comparison_table(compared, baseline.described)
    for verdict in ("▲ B is slower", "▼ B is faster", "no difference seen"):
        assert table.count(f">{verdict}</td>") == 1
    assert "A: cp_size 4 &lt;A&gt;" in table
    assert ">+50</td>" in table
    few = compare(baseline, [measured("direct", 100, 100)])
    assert "needs 8 s of each; B has 1 s<" in comparison_table(few, "")
    early = compare(Measured("", (measured("direct", 100, 100),)), [direct])
    assert "A has 1 s: unpin, wait, pin again<" in comparison_table(early, "")


def test_the_times_beside_a_ratio_are_those_that_it_compares() -> None:
    a = measured("direct", *[100.0] * 20)
    b = measured("direct", *[300.0] * 20, *[100.0] * 15)  # slow before the last ten intervals
    (compared,) = compare(Measured("", (a,)), [b])
    assert b.median_us == 100
    assert compared.medians_us == (300, 100)
    assert compared.ratio
    assert compared.ratio.value == 3
    assert ">+200</td>" in comparison_table([compared], "")


def test_busy_moments_that_outlast_an_interval_are_no_difference_between_b_and_a() -> None:
    random = np.random.default_rng(5)

    def noisy() -> Summary:
        load = [0.0]
        for change in random.normal(size=100):
            load.append(0.8 * load[-1] + 0.6 * change)
        times_us = 100 * np.exp(0.05 * np.array(load))
        return measured("direct", *times_us, interval_s=0.12)

    pairs = [compare(Measured("", (noisy(),)), [noisy()])[0] for _ in range(60)]
    assert all(pair.ratio for pair in pairs)
    assert sum(pair.ratio.differs for pair in pairs if pair.ratio) <= 1


def test_a_path_badge_has_a_word_a_symbol_and_what_would_make_it_symmetric() -> None:
    shown = path_badge(sample())
    assert "● symmetric" in shown
    assert "in the pool" in shown
    assert "For the symmetric path" not in shown
    fallback = msgspec.structs.replace(sample(), path="fallback", path_reason="a < b")
    assert "○ fallback" in path_badge(fallback)
    assert "a &lt; b" in path_badge(fallback)
    assert "padded uses ordinary buffers by design; select padded_symm" in to_symmetric(fallback)
    both = Workload(4, (13, 9), algorithm="padded", symmetric=False)
    assert "by design" in to_symmetric(msgspec.structs.replace(fallback, workload=both))
    ordinary = Workload(4, (13, 9), algorithm="direct", symmetric=False)
    assert "tick" in to_symmetric(msgspec.structs.replace(fallback, workload=ordinary))


def status(cores: int, gpus: int, load: float) -> StatusResult:
    workers = tuple(WorkerInfo(rank, 1, f"host{rank // 4}", "cpu", "") for rank in range(8))
    return StatusResult(
        *("test", "0", "0", 8, (1, 2, 4, 8), "cpu", "idle", 0, 0.0, "", "", None, "", 1),
        *(workers, cores, gpus, load),
    )


@pytest.mark.parametrize(
    ("state", "cp_size", "words"),
    [
        (status(2, 0, 1.0), 4, "▲ crowded</span> 4 ranks on 2 cores, load 1.0 on 2 cores"),
        (status(2, 0, 1.0), 2, "● not crowded</span> 2 ranks on 2 cores"),
        (status(4, 0, 1.0), 8, "● not crowded</span> 4 ranks on 4 cores"),  # four on each host
        (status(4, 0, 9.0), 4, "▲ busy</span> 4 ranks on 4 cores, load 9.0 on 4 cores; other"),
        (status(64, 1, 1.0), 2, "▲ crowded</span> 2 ranks on 1 GPU, load 1.0 on 64 cores"),
        (status(64, 4, 1.0), 4, "● not crowded</span> 4 ranks on 4 GPUs"),
    ],
)
def test_a_crowded_machine_is_named(state: StatusResult, cp_size: int, words: str) -> None:
    assert words in contention_badge(state, cp_size)
