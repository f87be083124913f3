"""Check the cost model: fit it to part of the sweep, predict the rest, report the errors.

The model does not include other programs on the machine. So it is fitted to, and compared with, the
time of the fastest round. The time of a round is a median.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.cost_fit import Measured, describe, fit
from cpkit.cost import PASSES, Host, HostModel
from cpkit_lessons.cost_presets import COPY_PASSES, PRESETS

FITTED_CP_SIZES = (2, 4)
FITTED_TOKENS = (256, 2048, 8192, 65536)


def check(rows: Sequence[dict[str, Any]], where: dict[str, Any]) -> dict[str, Any] | None:
    """Fit to some sizes at cp 2 and 4; predict cp 8 and the other sizes.

    Return None if the sweep has nothing to fit or nothing to predict.
    """
    points = [row for row in rows if row["variant"] in PASSES]
    known = [row for row in points if _is_fitted(row)]
    unknown = [row for row in points if not _is_fitted(row)]
    if len(known) < len(FITTED_TOKENS) or not unknown:
        return None
    host = Host(where["cores"], where["cache_bytes"])
    model = fit([_point(row) for row in known], host)
    predictions = [_prediction(row, model) for row in unknown]
    errors = [abs(each["error_pct"]) for each in predictions]
    return {
        "fitted": {"cp_sizes": FITTED_CP_SIZES, "tokens": FITTED_TOKENS},
        "host": {"cores": host.cores, "cache_bytes": host.cache_bytes},
        "coefficients": describe(model),
        "predictions": predictions,
        "median_error_pct": statistics.median(errors),
        "worst_error_pct": max(errors),
    }


def modelled_lines() -> list[list[str]]:
    """Return a line per modelled machine: the gain of symmetric memory, the cost of copies."""
    lines = []
    for preset in PRESETS.values():
        cp_size = preset.max_cp_size
        size = 1 << 27
        copies_us = preset.copies_us(size, COPY_PASSES["padded_symm"])
        lines.append(
            [
                f"{preset.name} (modelled)",
                str(cp_size),
                f"{preset.symmetric_gain(2 << 20, cp_size):.2f}",
                f"{preset.symmetric_gain(size, cp_size):.2f}",
                f"{100 * copies_us / preset.wire_us(size, cp_size):.0f}",
            ]
        )
    return lines


MODELLED_HEADER = [
    "machine",
    "cp_size",
    "symmetric gain at 2 MiB",
    "at 128 MiB",
    "strip and reorder, share of the wire (%)",
]


def _is_fitted(row: dict[str, Any]) -> bool:
    return row["cp_size"] in FITTED_CP_SIZES and row["tokens"] in FITTED_TOKENS


def _point(row: dict[str, Any]) -> Measured:
    return Measured(row["variant"], row["size_bytes"], row["cp_size"], min(row["rounds_us"]))


def _prediction(row: dict[str, Any], model: HostModel) -> dict[str, Any]:
    point = _point(row)
    predicted_us = model.predict_us(point.algorithm, point.total_bytes, point.cp_size)
    return {
        "algorithm": point.algorithm,
        "cp_size": point.cp_size,
        "size_bytes": point.total_bytes,
        "time_us": point.time_us,
        "predicted_us": predicted_us,
        "error_pct": 100 * (predicted_us / point.time_us - 1),
        "spread_pct": row["spread_pct"],
    }
