"""Notebook 3, all-gather performance: its predictions and the checks of its exercises."""

from cpkit_lessons.measured import call_ratio, order, order_of
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
from cpkit_lessons.performance.questions import (
    LESSON,
    begin,
    explain_missing_names,
    predict,
    progress,
    reveal,
)
from cpkit_lessons.rows import ragged

__all__ = [
    "LESSON",
    "begin",
    "call_ratio",
    "check_bandwidths",
    "check_break_even",
    "check_copies",
    "check_fit",
    "check_gather_us",
    "check_light",
    "check_price",
    "explain_missing_names",
    "fit_line",
    "order",
    "order_of",
    "predict",
    "price",
    "progress",
    "ragged",
    "reveal",
    "rows_written",
]
