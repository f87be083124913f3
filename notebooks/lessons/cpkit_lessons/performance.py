"""Notebook 3, all-gather performance: all it asks and checks, under one name."""

from cpkit_lessons.performance_questions import LESSON, predict, progress, reveal
from cpkit_lessons.performance_runs import check_copies
from cpkit_lessons.performance_times import (
    check_fit,
    check_gather_us,
    check_price,
    fit_line,
    price,
    rows_written,
)
from cpkit_lessons.performance_units import (
    check_bandwidths,
    check_break_even,
    check_light,
)

__all__ = [
    "LESSON",
    "check_bandwidths",
    "check_break_even",
    "check_copies",
    "check_fit",
    "check_gather_us",
    "check_light",
    "check_price",
    "fit_line",
    "predict",
    "price",
    "progress",
    "reveal",
    "rows_written",
]
