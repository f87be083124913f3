"""A benchmark record as text: for the terminal, README.md and docs/performance.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cost_check
from benchmarks.goals import times_us

Record = dict[str, Any]
Times = Mapping[tuple[int, int], Mapping[str, float | None]]
Ratios = Sequence[tuple[str, str, str]]  # name, above, below
Columns = Sequence[tuple[str, str]]  # key of a row, title
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
README_CP_SIZE = 4  # docs/performance.md has the others
SUMMARY_VARIANTS = ("plan", "direct", "padded", "gloo alone", "Open MPI", "memcpy")
SIZE_COLUMNS = (("cp_size", "cp_size"), ("size_bytes", "size (B)"))
TIME_COLUMNS = (
    ("variant", "variant"),
    ("time_us", "time p50 (us)"),
    ("p95_us", "p95 (us)"),
    ("min_us", "min (us)"),
    ("algbw_gbps", "algbw (GB/s)"),
    ("busbw_gbps", "busbw (GB/s)"),
    ("wrong", "#wrong"),
    ("moved_bytes", "moved (B)"),
    ("passes", "passes"),
    ("skew_us", "rank skew (us)"),
    ("iterations", "iterations"),
    ("spread_pct", "spread (%)"),
)
GATHER_COLUMNS = (
    *SIZE_COLUMNS,
    ("count", "count"),
    ("type", "type"),
    *TIME_COLUMNS,
    ("padded_ratio", "padded / this"),
    ("gloo_ratio", "gloo / this"),
    ("open_mpi_ratio", "Open MPI / this"),
    ("memcpy_ratio", "this / memcpy"),
)
BARRIER_COLUMNS = (
    ("who", "barrier"),
    ("cp_size", "cp_size"),
    ("time_us", "p50 (us)"),
    ("p95_us", "p95 (us)"),
    ("spread_pct", "spread (%)"),
)
CONTROL_COLUMNS = (
    ("what", "control path"),
    ("p50", "p50"),
    ("p95", "p95"),
    ("goal", "goal"),
    ("unit", "unit"),
)
COST_COLUMNS = (
    ("algorithm", "cost model"),
    *SIZE_COLUMNS,
    ("time_us", "best round (us)"),
    ("predicted_us", "predicted (us)"),
    ("error_pct", "error (%)"),
)
GOAL_COLUMNS = (("goal", "goal"), ("worst", "worst"), ("best", "best"), ("met", "reached"))
RATIOS = (
    ("plan / Open MPI", "plan", "Open MPI"),
    ("direct / Open MPI", "direct", "Open MPI"),
    ("plan / memcpy", "plan", "memcpy"),
    ("padded / plan", "padded", "plan"),
)


def as_text(record: Record) -> str:
    """Return all figures as Markdown, with the shortest and most important tables last."""
    gather = table_of(with_ratios(record["gather"]), GATHER_COLUMNS)
    modelled = table(cost_check.MODELLED_HEADER, cost_check.modelled_lines())
    return "\n\n".join([conditions(record), gather, modelled, *summary_tables(record)])


def as_summary(record: Record) -> str:
    """Return the ratios at one cp_size, one line per size, for README.md."""
    where = record["environment"]
    words = (
        f"{where['date']}, {where['processor']}, {where['cores']} cores, torch {where['torch']}, "
        f"{where['open_mpi']}, commit {where['commit']}, `{where['command']}`."
    )
    return f"{words}\n\n{ratio_table(times_us(record['gather']), RATIOS)}"


def ratio_table(times: Times, ratios: Ratios) -> str:
    """Return one line per size at README's cp_size: the plan's time and the ratios."""
    header = ["cp_size", "size (MB)", "plan (us)", *(name for name, *_ in ratios)]
    lines = [
        [str(cp_size), cell(nbytes / 1e6), cell(us.get("plan")), *quotients(us, ratios)]
        for (cp_size, nbytes), us in times.items()
        if cp_size == README_CP_SIZE
    ]
    return table(header, lines)


def as_details(record: Record) -> str:
    """Return times, barriers, control path, cost model and goals for docs/performance.md."""
    return "\n\n".join([conditions(record), *summary_tables(record)])


def summary_tables(record: Record) -> list[str]:
    """Return the tables of sizes, barriers, control path, cost model and goals."""
    return [
        time_table(times_us(record["gather"]), SUMMARY_VARIANTS, RATIOS),
        table_of(record["barrier"], BARRIER_COLUMNS),
        table_of(record["control"]["rows"], CONTROL_COLUMNS),
        *cost_tables(record.get("cost")),
        table_of(record["goals"], GOAL_COLUMNS),
    ]


def conditions(record: Record) -> str:
    """Describe where, when and how the figures were measured."""
    where, plan = record["environment"], record["plan"]
    return (
        f"{where['date']}, {where['processor']}, {where['cores']} cores, "
        f"{where['cache_bytes'] >> 20} MiB last-level cache, {where['system']}, "
        f"torch {where['torch']}, numpy {where['numpy']}, {where['open_mpi']}, Python "
        f"{where['python']}, commit {where['commit']}, `{where['command']}`; load before the run "
        f"{where['load_before']}. One bfloat16 tensor of rows [8, 128], one zigzag sequence; size "
        f"is the gathered tensor. A time is the slowest rank's median in a round, and then the "
        f"median of {plan['rounds']} rounds, in which ours and Open MPI's alternate. Each variant "
        f"is timed in blocks of {plan['block_s']} s after {plan['warmup']} warm-up calls. `direct` "
        f"is one call of all_gather_kv, `plan` the same gather prepared once. `padded` runs over "
        f"gloo and allocates its buffers in every call, as its users do; `gloo alone` is its "
        f"collective "
        f"without pad, strip and reorder; Open MPI is MPI_Allgatherv with final displacements into "
        f"a buffer made once; `memcpy` is every rank copying the whole result once. GB = 1e9 bytes."
    )


def time_table(times: Times, variants: Sequence[str], ratios: Ratios) -> str:
    """Return one line per size: every variant's time and the ratios."""
    header = ["cp_size", "size (B)", *(f"{name} (us)" for name in variants)]
    lines = [
        [*map(cell, key), *(cell(us.get(name)) for name in variants), *quotients(us, ratios)]
        for key, us in times.items()
    ]
    return table([*header, *(name for name, *_ in ratios)], lines)


def quotients(us: Mapping[str, float | None], ratios: Ratios) -> list[str]:
    """Return the ratios of one size."""
    return [ratio(us, above, below) for _, above, below in ratios]


def with_ratios(rows: list[Record]) -> list[Record]:
    """Add to each row its ratios to the competitors of the same run."""
    all_us = times_us(rows)
    found = []
    for row in rows:
        us = all_us[row["cp_size"], row["size_bytes"]] | {"this": row["time_us"]}
        ratios = {
            "padded_ratio": ratio(us, "padded", "this"),
            "gloo_ratio": ratio(us, "gloo alone", "this"),
            "open_mpi_ratio": ratio(us, "Open MPI", "this"),
            "memcpy_ratio": ratio(us, "this", "memcpy"),
        }
        found.append(row | ratios)
    return found


def ratio(us: Mapping[str, float | None], above: str, below: str) -> str:
    """Return the quotient of two times, or "not measured"."""
    a, b = us.get(above), us.get(below)
    return f"{a / b:.2f}" if a and b else "not measured"


def cost_tables(cost: Record | None) -> list[str]:
    """Return the worst predictions of the cost model."""
    if not cost:
        return []
    worst = sorted(cost["predictions"], key=lambda each: -abs(each["error_pct"]))[:6]
    return [table_of(worst, COST_COLUMNS)]


def cell(value: object) -> str:
    """Format a value: floats with three significant digits."""
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def table_of(rows: Sequence[Record], columns: Columns) -> str:
    """Return a table with one line per row, under the columns' titles."""
    lines = [[cell(row.get(name)) for name, _ in columns] for row in rows]
    return table([title for _, title in columns], lines)


def table(header: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table that is also readable in a terminal."""
    rows = [header, *lines]
    width = [max(len(row[i]) for row in rows) for i in range(len(header))]
    text = [
        "| " + " | ".join(c.rjust(w) for c, w in zip(r, width, strict=True)) + " |" for r in rows
    ]
    text.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in width) + "|")
    return "\n".join(text)


def fill_pages(root: Path, record_path: Path) -> None:
    """Write the figures of a record between the markers of each page."""
    record = json.loads(record_path.read_text())
    write_pages(root, (BEGIN, END), pages(record, record_path.name))


def pages(record: Record, name: str) -> dict[str, str]:
    """Return the text between the markers, by page."""
    return sourced(as_summary(record), as_details(record), name)


def sourced(summary: str, details: str, name: str) -> dict[str, str]:
    """Return the text of both pages with a link to the record."""
    return {
        "README.md": f"{summary}\n\nSource: [{name}](benchmarks/results/{name})",
        "docs/performance.md": f"{details}\n\nSource: [{name}](../benchmarks/results/{name})",
    }


def write_pages(root: Path, markers: tuple[str, str], bodies: dict[str, str]) -> None:
    """Write the text between the markers of each page."""
    for page, body in bodies.items():
        path = root / page
        text = put_between(path.read_text(encoding="utf-8"), *markers, body)
        path.write_text(text, encoding="utf-8")


def put_between(text: str, begin: str, end: str, body: str) -> str:
    """Return the text with `body` between its two markers. Raises ValueError without them."""
    if begin not in text or end not in text:
        raise ValueError(f"the page has no {begin} … {end} for the figures")
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{body}\n{end}", text)
