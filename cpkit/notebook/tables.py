"""The explorer's numbers as tables: the text alternative of its figure, and its verdicts."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from cpkit.notebook.badges import path_badge
from cpkit.notebook.intervals import BLOCK_S, Comparison, Measured, Summary
from cpkit.notebook.style import byte_words
from cpkit.timing import DEVICE_TIME, FEWEST_VALUES, Ratio, algbw_gbps, busbw_gbps

if TYPE_CHECKING:
    from cpkit.batch import Batch

_NUMBER = 'style="padding: 0 6px; text-align: right; white-space: nowrap"'
_TEXT = 'style="padding: 0 6px; text-align: left"'


def algorithms_table(summaries: Sequence[Summary]) -> str:
    """Return one row per algorithm: times, ratio to the first, bandwidths; then the paths."""
    newest = summaries[0].newest
    columns = ["algorithm", "gathers", "median µs", "p95 µs", "ratio to first"]
    columns += ["algbw GB/s", "busbw GB/s", "slowest rank"]
    if newest.clock == DEVICE_TIME:
        columns.append("call time µs")
    rows = [_times(summary, is_first=summary is summaries[0]) for summary in summaries]
    paths = "".join(
        f'<div class="cpkit-path" style="line-height: 1.8"><b>{summary.algorithm}</b> '
        f"{path_badge(summary.newest)}</div>"
        for summary in summaries
    )
    caption = (
        f"{newest.clock}, each gather on its slowest rank, over a rolling time window; "
        f"{byte_words(newest.total_bytes)} gathered"
    )
    return _table("cpkit-algorithms", caption, columns, rows) + paths


def spoken(summaries: Sequence[Summary]) -> str:
    """Return the medians, the ratios to the first algorithm and the paths in two sentences."""
    first = summaries[0]
    medians = [f"{summary.algorithm} {summary.median_us:,.0f} µs" for summary in summaries]
    for place, summary in enumerate(summaries):
        if summary.ratio:
            medians[place] += f", {summary.ratio} of {first.algorithm}"
    paths = [f"{summary.algorithm} {summary.newest.path}" for summary in summaries]
    return f"Medians: {'; '.join(medians)}. Paths: {', '.join(paths)}."


def ranks_table(summaries: Sequence[Summary], batch: Batch) -> str:
    """Return one row per rank: its rows and padding, and its median time per algorithm."""
    names = [f"{summary.algorithm} µs" for summary in summaries]
    rows = []
    for rank, count in enumerate(batch.per_rank_actual_token):
        padding = batch.max_rank_len[0] - count
        times = [f"{summary.per_rank_us[rank]:,.0f}" for summary in summaries]
        rows.append([f"rank {rank}", f"{count}", f"{padding}", *times])
    skews = [f"{skew(summary):.0%}" for summary in summaries]
    rows.append(["skew", "", "", *skews])
    return _table("cpkit-ranks", "medians per rank", ["rank", "rows", "padding", *names], rows)


def skew(summary: Summary) -> float:
    """Return how much longer the slowest rank takes than the quickest, as a fraction."""
    return max(summary.per_rank_us) / min(summary.per_rank_us) - 1


def comparison_table(comparisons: Sequence[Comparison], described: str) -> str:
    """Return one row per algorithm: B, which is measured now, against the pinned A."""
    columns = ["B (now)", "A (pinned)", "B µs", "A µs", "difference µs", "B / A"]
    rows = []
    for comparison in comparisons:
        of_b, of_a, ratio = comparison
        b_us, a_us = comparison.medians_us
        times = [f"{b_us:,.0f}", f"{a_us:,.0f}", f"{b_us - a_us:+,.0f}"]
        shown = str(ratio) if ratio else _few_blocks(of_b, of_a)
        rows.append([of_b.algorithm, of_a.algorithm, *times, shown, verdict(ratio)])
    caption = (
        f"A: {described}. With a ratio, times are medians over all blocks of one second that are "
        f"kept. A and B are measured at different times, so load may differ."
    )
    return _table("cpkit-baseline", caption, [*columns, "verdict"], rows)


def log_table(log: Sequence[Measured]) -> str:
    """Return one row per setting that was measured, newest first; folded until it is opened."""
    if not log:
        return ""
    rows = []
    for described, summaries in reversed(log):
        medians = [f"{each.algorithm} {each.median_us:,.0f} ({each.gathers})" for each in summaries]
        rows.append([html.escape(described), ", ".join(medians)])
    table = _table("cpkit-log", "newest first", ["setting", "median µs (gathers)"], rows)
    return f"<details><summary>Settings measured before: {len(log)}</summary>{table}</details>"


def verdict(ratio: Ratio | None) -> str:
    """Return what a ratio of B to A says."""
    if ratio is None:
        return "not measured for long enough"
    if not ratio.differs:
        return "no difference seen"
    return "▲ B is slower" if ratio.value > 1 else "▼ B is faster"


def _times(summary: Summary, *, is_first: bool) -> list[str]:
    sample = summary.newest
    ratio = "1" if is_first else str(summary.ratio or _few(summary.intervals))
    times = [
        summary.algorithm,
        f"{summary.gathers}",
        f"<b>{summary.median_us:,.0f}</b>",
        "–" if summary.p95_us is None else f"{summary.p95_us:,.0f}",
        ratio,
        _gbps(algbw_gbps(sample.total_bytes, summary.median_us)),
        _gbps(busbw_gbps(sample.total_bytes, summary.median_us, sample.cp_size)),
        f"rank {summary.per_rank_us.index(max(summary.per_rank_us))}, +{skew(summary):.0%}",
    ]
    if sample.clock == DEVICE_TIME:
        times.append(f"{sample.call_us:,.0f}{', mostly host' * sample.host_bound}")
    return times


def _few(intervals: int) -> str:
    return f"after {FEWEST_VALUES} intervals ({intervals} so far)"


def _few_blocks(of_b: Summary, of_a: Summary) -> str:
    seconds = {"B": len(of_b.block_us) * BLOCK_S, "A": len(of_a.block_us) * BLOCK_S}
    most_s = FEWEST_VALUES * BLOCK_S
    short = [f"{name} has {s:g} s" for name, s in seconds.items() if s < most_s]
    remedy = ": unpin, wait, pin again" if len(of_a.block_us) < FEWEST_VALUES else ""
    return f"needs {most_s:g} s of each; {' and '.join(short)}{remedy}"


def _table(name: str, caption: str, columns: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col" {_NUMBER}>{column}</th>' for column in columns)
    lines = [f"<tr>{head}</tr>"]
    for row in rows:
        cells = [f'<th scope="row" {_TEXT}>{row[0]}</th>']
        cells += [f"<td {_NUMBER}>{cell}</td>" for cell in row[1:]]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    caption = f'<caption style="text-align: left">{html.escape(caption)}</caption>'
    return f'<table class="{name}" style="font-size: 13px">{caption}{"".join(lines)}</table>'


def _gbps(rate: float) -> str:
    return f"{rate:.2f}" if rate >= 0.1 else f"{rate:.2g}"
