"""Notebook 2, symmetric memory: its predictions and the checks of its exercises."""

from cpkit_lessons.symmetric.allocation import (
    check_cause,
    check_fast_path,
    check_may_free,
    check_peer_pointer,
    version_table,
)
from cpkit_lessons.symmetric.questions import (
    LESSON,
    begin,
    explain_missing_names,
    predict,
    progress,
    reveal,
)
from cpkit_lessons.symmetric.synchronization import (
    blocked_by,
    check_exchange,
    check_order,
    check_pull_gather,
    check_signals,
    no_barrier,
    one_barrier,
)

__all__ = [
    "LESSON",
    "begin",
    "blocked_by",
    "check_cause",
    "check_exchange",
    "check_fast_path",
    "check_may_free",
    "check_order",
    "check_peer_pointer",
    "check_pull_gather",
    "check_signals",
    "explain_missing_names",
    "no_barrier",
    "one_barrier",
    "predict",
    "progress",
    "reveal",
    "version_table",
]
