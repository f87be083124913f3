"""Predict the device times of 4 and 8 GPUs from a record of 2, and compare them with a record.

`python -m benchmarks.gpu_prediction RECORD` writes a prediction into benchmarks/results, dated and
marked as modelled. With `--measured RECORD` it prints the error of each prediction instead.

A rank of n receives S·(n-1)/n bytes over its links, so the time of n ranks is read from the curve
of two ranks where they receive as many bytes:

    t(n, S) = t(2, 2·S·(n-1)/n) + extra steps + passes

    steps     a ring has n-1 consecutive steps, and two ranks have shown one of them; a step takes
              STEP_US. Our kernel and NCCL's symmetric ones store to all peers at once: no extra.
    passes    pad, strip and reorder are local. Their time is that of two ranks with this S.

Switches (NVSwitch) give each GPU its full rate to any other; multicast is off.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.launch import RESULTS
from cpkit.processes import run_command

STEP_US = 2.0  # one more hop of NCCL's ring in its LL protocol: an assumption, not measured here
RINGS, AT_ONCE = ("NCCL", "NCCL recv"), ("plan", "direct", "NCCL both")
# The collective inside each pipeline. NCCL 2.28 uses its ring unless both buffers are registered.
PIPELINES = {"seed": "NCCL", "seed recv": "NCCL recv", "seed both": "NCCL both"}
CP_SIZES = (4, 8)
GOAL = 0.2  # the median error
Curve = dict[int, float]


def curves(record: dict[str, Any], cp_size: int) -> dict[str, Curve]:
    """Return the device µs of each variant by size in bytes."""
    found: dict[str, Curve] = {}
    for row in record["gather"]:
        if row["cp_size"] == cp_size:
            found.setdefault(row["variant"], {})[row["size_bytes"]] = row["time_us"]
    return found


def predict(of_two: dict[str, Curve], cp_size: int) -> dict[str, Curve]:
    """Return the predicted µs of each variant at each size of the two ranks."""
    predicted = {
        name: {size: _wire_us(name, of_two[name], size, cp_size) for size in of_two[name]}
        for name in (*AT_ONCE, *RINGS)
        if name in of_two
    }
    for name, wire in PIPELINES.items():
        if name in of_two and wire in predicted:
            predicted[name] = {
                size: predicted[wire][size] + us - of_two[wire][size]
                for size, us in of_two[name].items()
            }
    return predicted


def _wire_us(name: str, of_two: Curve, size: int, cp_size: int) -> float:
    """Return the µs of a collective alone, linear between two sizes and beyond the last one."""
    same_bytes = 2 * size * (cp_size - 1) / cp_size
    sizes = sorted(of_two)
    above = min(np.searchsorted(sizes, same_bytes), len(sizes) - 1)
    low, high = sizes[max(above, 1) - 1], sizes[max(above, 1)]
    slope = (of_two[high] - of_two[low]) / (high - low)
    steps_us = STEP_US * (cp_size - 2) if name in RINGS else 0.0
    return of_two[low] + slope * (same_bytes - low) + steps_us


def errors(predicted: dict[str, Curve], measured: dict[str, Curve]) -> dict[str, dict[int, float]]:
    """Return predicted / measured - 1 where both exist."""
    return {
        name: {size: us / measured[name][size] - 1 for size, us in by_size.items()}
        for name, by_size in predicted.items()
        if name in measured
    }


def main() -> int:
    """Write a prediction, or print its errors."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("record", type=Path, help="a record of make bench-gpu with two GPUs")
    parser.add_argument("--measured", type=Path, help="a record with 4 or 8 GPUs")
    options = parser.parse_args()
    record = json.loads(options.record.read_text())
    of_two = curves(record, 2)
    if record["sharing"] or "plan" not in of_two:
        parser.error(f"{options.record} has no two ranks with a GPU each; pass one that has")
    if options.measured:
        return _compare(of_two, json.loads(options.measured.read_text()))
    environment = record["environment"]
    prediction = {
        "modelled": True,
        "from": {"record": options.record.name, "commit": environment["commit"]},
        "assumed": {"step_us": STEP_US},
        "time_us": {str(cp_size): predict(of_two, cp_size) for cp_size in CP_SIZES},
    }
    path = RESULTS / f"{environment['date']}-gpu-prediction.json"
    path.write_text(json.dumps(prediction, indent=1) + "\n")
    print(f"predicted, not measured: {path.name}")
    return 0


def _compare(of_two: dict[str, Curve], record: dict[str, Any]) -> int:
    for cp_size in CP_SIZES:
        found = errors(predict(of_two, cp_size), curves(record, cp_size))
        for name, by_size in found.items():
            print(cp_size, name, *(f"{size}: {100 * e:+.0f} %" for size, e in by_size.items()))
        every = [abs(e) for by_size in found.values() for e in by_size.values()]
        if every:
            print(
                f"cp_size {cp_size}: median error {statistics.median(every):.0%}, goal {GOAL:.0%}"
            )
    return 0


if __name__ == "__main__":
    run_command(main)
