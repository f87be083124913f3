"""A benchmark record as text: for the terminal, and between the markers of README.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

Record = dict[str, Any]
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
GOAL_BYTES = 16384 * 2048
SUMMARY_VARIANTS = ("padded", "padded_symm_recv", "padded_symm", "direct", "gloo alone", "memcpy")
GATHER_COLUMNS = (
    ("cp_size", "cp_size"),
    ("size_bytes", "size (bytes)"),
    ("variant", "variant"),
    ("time_us", "time p50 (us)"),
    ("min_us", "min (us)"),
    ("p95_us", "p95 (us)"),
    ("algbw_gbps", "algbw (GB/s)"),
    ("busbw_gbps", "busbw (GB/s)"),
    ("padded_ratio", "padded / this"),
    ("memcpy_ratio", "this / memcpy"),
)


def as_text(record: Record) -> str:
    """All figures as Markdown, for the terminal."""
    gather = table([label for _, label in GATHER_COLUMNS], gather_lines(record["gather"]))
    return "\n\n".join([conditions(record), gather, *goals_and_control(record)])


def as_summary(record: Record) -> str:
    """One line a size, for README.md."""
    header = ["cp_size", "size (bytes)", *(f"{name} (us)" for name in SUMMARY_VARIANTS)]
    header += ["padded / direct", "gloo alone / direct", "direct / memcpy"]
    summary = table(header, summary_lines(record["gather"]))
    return "\n\n".join([conditions(record), summary, *goals_and_control(record)])


def conditions(record: Record) -> str:
    """Where, when and how the figures were taken."""
    where = record["environment"]
    return (
        f"{where['date']}, {where['processor']}, {where['cores']} cores, {where['system']}, "
        f"torch {where['torch']}, Python {where['python']}, commit {where['commit']}, "
        f"`{where['command']}`. One bfloat16 tensor of rows [8, 128], one zigzag sequence; size is "
        f"the gathered tensor. Times are medians of the slowest rank, all variants interleaved in "
        f"one run. `padded` runs over gloo; `gloo alone` is its collective without pad, strip and "
        f"reorder; `memcpy` is every rank copying the whole result once. The `padded` variants "
        f"make their ordinary buffers anew in every call, as their users do, and so pay for the "
        f"first touch of each page; `direct` writes into the pool, `gloo alone` and `memcpy` into "
        f"buffers that were touched before. GB = 1e9 bytes."
    )


def goals_and_control(record: Record) -> list[str]:
    """What was to be reached, and the control path."""
    ratio = ratios(record["gather"]).get((2, GOAL_BYTES))
    reached = f"{ratio:.1f}" if ratio else "not measured"
    goal = table(
        ["goal", "reached"],
        [[f"padded / direct at {GOAL_BYTES} bytes, cp_size 2: at least 8", reached]],
    )
    header = ["control path", "p50 (ms)", "p95 (ms)", "goal (ms)"]
    return [goal, table(header, control_lines(record["control"]))]


def ratios(rows: list[Record]) -> dict[tuple[int, int], float]:
    """How many times `direct` is faster than `padded`, by (cp_size, size_bytes)."""
    return {key: us["padded"] / us["direct"] for key, us in times_us(rows).items()}


def times_us(rows: list[Record]) -> dict[tuple[int, int], dict[str, float]]:
    """Median time of each variant by (cp_size, size_bytes)."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        found.setdefault((row["cp_size"], row["size_bytes"]), {})[row["variant"]] = row["time_us"]
    return found


def summary_lines(rows: list[Record]) -> list[list[str]]:
    """One line a size with its ratios."""
    lines = []
    for key, us in times_us(rows).items():
        quotients = [
            us["padded"] / us["direct"],
            us["gloo alone"] / us["direct"],
            us["direct"] / us["memcpy"],
        ]
        lines.append(
            [cell(v) for v in (*key, *(us[name] for name in SUMMARY_VARIANTS), *quotients)]
        )
    return lines


def gather_lines(rows: list[Record]) -> list[list[str]]:
    """One line a variant, with its ratios to `padded` and `memcpy` of the same run."""
    all_us = times_us(rows)
    lines = []
    for row in rows:
        us = all_us[row["cp_size"], row["size_bytes"]]
        quotients = {
            "padded_ratio": us["padded"] / row["time_us"],
            "memcpy_ratio": row["time_us"] / us["memcpy"],
        }
        lines.append([cell({**row, **quotients}[name]) for name, _ in GATHER_COLUMNS])
    return lines


def control_lines(control: Record) -> list[list[str]]:
    """One line a figure of the control path."""
    columns = ("what", "p50_ms", "p95_ms", "goal_ms")
    return [[cell(row[name]) for name in columns] for row in control["rows"]]


def cell(value: object) -> str:
    """Numbers with three digits that count, all else as it is."""
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table that also reads well in a terminal."""
    rows = [header, *lines]
    width = [max(len(row[i]) for row in rows) for i in range(len(header))]
    text = [
        "| " + " | ".join(c.rjust(w) for c, w in zip(r, width, strict=True)) + " |" for r in rows
    ]
    text.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in width) + "|")
    return "\n".join(text)


def fill_readme(readme: Path, record_path: Path) -> None:
    """Replace what stands between the markers by the figures of a record."""
    text = readme.read_text()
    readme.write_text(filled(text, json.loads(record_path.read_text()), record_path.name))


def filled(text: str, record: Record, name: str) -> str:
    """README's text with the figures of a record. Raises ValueError without the markers."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"README.md has no {BEGIN} … {END} to put the figures between")
    body = f"{BEGIN}\n{as_summary(record)}\n\nSource: [{name}](benchmarks/results/{name})\n{END}"
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: body, text)
