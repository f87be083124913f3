"""A benchmark record as text: for the terminal, and between the markers of README.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

Record = dict[str, Any]
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
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
    """All figures as Markdown."""
    where = record["environment"]
    head = (
        f"{where['date']}, {where['processor']}, {where['cores']} cores, {where['system']}, "
        f"torch {where['torch']}, Python {where['python']}, commit {where['commit']}, "
        f"`{where['command']}`. One bfloat16 tensor of rows [8, 128], one zigzag sequence. "
        f"Median of the slowest rank; `padded` runs over gloo; size is the gathered tensor; "
        f"GB = 1e9 bytes."
    )
    gather = table([label for _, label in GATHER_COLUMNS], gather_lines(record["gather"]))
    header = ["control path", "p50 (ms)", "p95 (ms)", "goal (ms)"]
    control = table(header, control_lines(record["control"]))
    return f"{head}\n\n{gather}\n\n{control}"


def gather_lines(rows: list[Record]) -> list[list[str]]:
    """One line a variant, with its ratios to `padded` and `memcpy` of the same run."""
    time_us = {(r["cp_size"], r["size_bytes"], r["variant"]): r["time_us"] for r in rows}
    lines = []
    for row in rows:
        key = (row["cp_size"], row["size_bytes"])
        ratios = {
            "padded_ratio": time_us[*key, "padded"] / row["time_us"],
            "memcpy_ratio": row["time_us"] / time_us[*key, "memcpy"],
        }
        lines.append([cell({**row, **ratios}[name]) for name, _ in GATHER_COLUMNS])
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
    body = f"{BEGIN}\n{as_text(record)}\n\nSource: [{name}](benchmarks/results/{name})\n{END}"
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: body, text)
