"""Notebook 2, symmetric memory: all it asks and checks, under one name."""

from cpkit_lessons.symmetric_failures import check_cause
from cpkit_lessons.symmetric_gather import check_pull_gather
from cpkit_lessons.symmetric_orders import (
    check_exchange,
    check_order,
    check_signals,
    held_up,
    no_barrier,
    one_barrier,
)
from cpkit_lessons.symmetric_pool import check_may_free
from cpkit_lessons.symmetric_questions import LESSON, predict, progress, reveal
from cpkit_lessons.symmetric_registration import (
    check_fast_path,
    check_peer_pointer,
    version_table,
)

__all__ = [
    "LESSON",
    "check_cause",
    "check_exchange",
    "check_fast_path",
    "check_may_free",
    "check_order",
    "check_peer_pointer",
    "check_pull_gather",
    "check_signals",
    "held_up",
    "no_barrier",
    "one_barrier",
    "predict",
    "progress",
    "reveal",
    "version_table",
]
