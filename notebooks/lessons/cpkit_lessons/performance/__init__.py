"""Notebook 3, all-gather performance: its predictions and the checks of its exercises."""

from cpkit_lessons.performance.exercises import (
    check_bandwidths,
    check_break_even,
    check_copies,
    check_fit,
    check_gather_us,
    check_light,
    check_price,
    fit_line,
    price,
    rows_written,
)
from cpkit_lessons.performance.questions import LESSON, predict, progress, reveal

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
