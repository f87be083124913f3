"""A record of `make bench-gpu` as text, for the terminal and the pages. Pure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.figures import (
    GOAL_COLUMNS,
    SIZE_COLUMNS,
    TIME_COLUMNS,
    ratio_table,
    sourced,
    table_of,
    time_table,
    write_pages,
)
from benchmarks.goals import times_us
from benchmarks.gpu_goals import LOW_CONTENTION, SEED, opponent_us

BEGIN, END = "<!-- gpu-figures:begin -->", "<!-- gpu-figures:end -->"
VARIANTS = (
    "direct",
    "plan",
    "graph",
    "seed",
    "seed graph",
    "low-contention",
    "low-contention graph",
)
RATIOS = (
    ("plan / floor", "plan", "floor"),
    ("seed / plan", "seed", "plan"),
    ("seed graph / plan", "seed graph", "plan"),
    ("low-contention / plan", "low-contention", "plan"),
    ("low-contention graph / plan", "low-contention graph", "plan"),
)
COLUMNS = (
    *SIZE_COLUMNS,
    *TIME_COLUMNS,
    ("seed_ratio", "seed / this"),
    ("low_contention_ratio", "low-contention / this"),
    ("floor_ratio", "this / floor"),
)


def as_text(record: dict[str, Any]) -> str:
    """Return all figures as Markdown, with the goals last."""
    missing = [f"not measured, {at}: {why}" for at, why in record["missing"].items() if why]
    rows = with_ratios(record["gather"])
    goals = table_of(record["goals"], GOAL_COLUMNS)
    return "\n\n".join([conditions(record), *missing, table_of(rows, COLUMNS), goals])


def conditions(record: dict[str, Any]) -> str:
    """Describe where, when and how the figures were measured."""
    where = record["environment"]
    nccl = f"NCCL {where['nccl']}, " if where.get("nccl") else ""
    return (
        f"{where['date']}, {where['device']}, driver {where['driver']}, CUDA {where['cuda']}, "
        f"{nccl}torch {where['torch']}, commit {where['commit']}, `{where['command']}`. Times "
        f"between CUDA events, the slowest rank's median, the median of {record['plan']['rounds']} "
        f"rounds. `plan` is the prepared call of `direct`, `graph` that call in a caller's CUDA "
        f"graph. `seed` is the seed's pipeline on symmetric buffers, `low-contention` torch's "
        f"_low_contention_all_gather with strip and reorder after it; each is shown as it is "
        f"called, and captured in a CUDA graph. The floor is (cp + 1) · size at the device's own "
        f"copy rate in the same run; it is said where all ranks share one device."
    )


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row its ratios to the competitors of the same run."""
    times = times_us(rows)

    def quotient(each: dict[str, Any], opponent: str) -> float:
        us = times[each["cp_size"], each["size_bytes"]]
        return opponent_us(us, opponent) / float(each["time_us"])

    return [
        {
            **each,
            "seed_ratio": quotient(each, SEED),
            "low_contention_ratio": quotient(each, LOW_CONTENTION),
            "floor_ratio": each["time_us"] / each["floor_us"] if each["floor_us"] else None,
        }
        for each in rows
    ]


def as_summary(record: dict[str, Any]) -> str:
    """Return the ratios at one cp_size, one line per size, for README.md."""
    where = record["environment"]
    words = (
        f"{where['date']}, {where['device']}, torch {where['torch']}, commit {where['commit']}, "
        f"`{where['command']}`."
    )
    return f"{words}\n\n{ratio_table(with_floors(record), RATIOS)}"


def as_details(record: dict[str, Any]) -> str:
    """Return the times, one line per size, and the goals for docs/performance.md."""
    times = time_table(with_floors(record), (*VARIANTS, "floor"), RATIOS)
    return "\n\n".join([conditions(record), times, table_of(record["goals"], GOAL_COLUMNS)])


def with_floors(record: dict[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the times of every size, including the floor."""
    floors = {(r["cp_size"], r["size_bytes"]): r["floor_us"] for r in record["gather"]}
    return {k: {**us, "floor": floors[k]} for k, us in times_us(record["gather"]).items()}


def fill_pages(root: Path, record_path: Path) -> None:
    """Write the figures of a record between the markers of each page."""
    record = json.loads(record_path.read_text())
    write_pages(root, (BEGIN, END), pages(record, record_path.name))


def pages(record: dict[str, Any], name: str) -> dict[str, str]:
    """Return the text between the markers, by page."""
    return sourced(as_summary(record), as_details(record), name)
