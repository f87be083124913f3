"""A record of `make bench-gpu` as text: for the terminal, and between README's markers. Pure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.figures import SIZE_COLUMNS, TIME_COLUMNS, cell, goal_lines, put_between, table
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
COLUMNS = (
    *SIZE_COLUMNS,
    *TIME_COLUMNS,
    ("seed_ratio", "seed / this"),
    ("low_contention_ratio", "low-contention / this"),
    ("floor_ratio", "this / floor"),
)


def as_text(record: dict[str, Any]) -> str:
    """All figures as Markdown; the goals, the most important, last."""
    missing = [f"not measured, {at}: {why}" for at, why in record["missing"].items() if why]
    rows = with_ratios(record["gather"])
    lines = [[cell(each.get(name)) for name, _ in COLUMNS] for each in rows]
    figures = table([label for _, label in COLUMNS], lines)
    goals = table(["goal", "worst", "best", "reached"], goal_lines(record["goals"]))
    return "\n\n".join([conditions(record), *missing, figures, goals])


def conditions(record: dict[str, Any]) -> str:
    """Where, when and how the figures were taken."""
    where = record["environment"]
    return (
        f"{where['date']}, {where['device']}, driver {where['driver']}, CUDA {where['cuda']}, "
        f"torch {where['torch']}, commit {where['commit']}, `{where['command']}`. Times between "
        f"CUDA events, the slowest rank's median, the median of {record['plan']['rounds']} "
        f"rounds. `plan` is the prepared call of `direct`; ratios to an opponent take the faster "
        f"of its eager call and its CUDA graph. The floor is (cp + 1) · size at the device's own "
        f"copy rate in the same run; it is said where all ranks share one device."
    )


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with its ratios to the opponents of the same run."""
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
    """One line a size, for README.md."""
    header = ["cp_size", "size (B)", *(f"{name} (us)" for name in VARIANTS), "floor (us)"]
    header += ["plan / floor", "seed / plan", "low-contention / plan"]
    floors = {(r["cp_size"], r["size_bytes"]): r["floor_us"] for r in record["gather"]}
    lines = [summary_line(key, us, floors[key]) for key, us in times_us(record["gather"]).items()]
    goals = table(["goal", "worst", "best", "reached"], goal_lines(record["goals"]))
    return "\n\n".join([conditions(record), table(header, lines), goals])


def summary_line(key: tuple[int, int], us: dict[str, float], floor_us: float | None) -> list[str]:
    """One size with its ratios."""

    def quotient(above: float | None, below: float | None) -> str:
        return f"{above / below:.2f}" if above and below else "not measured"

    plan_us = us.get("plan")
    return [
        *map(cell, key),
        *(cell(us.get(name)) for name in VARIANTS),
        cell(floor_us),
        quotient(plan_us, floor_us),
        quotient(opponent_us(us, SEED), plan_us),
        quotient(opponent_us(us, LOW_CONTENTION), plan_us),
    ]


def fill_readme(readme: Path, record_path: Path) -> None:
    """Replace what stands between the GPU markers by the figures of a record."""
    record = json.loads(record_path.read_text())
    readme.write_text(filled(readme.read_text(), record, record_path.name))


def filled(text: str, record: dict[str, Any], name: str) -> str:
    """README's text with the figures of a record. Raises ValueError without the markers."""
    body = f"{as_summary(record)}\n\nSource: [{name}](benchmarks/results/{name})"
    return put_between(text, BEGIN, END, body)
