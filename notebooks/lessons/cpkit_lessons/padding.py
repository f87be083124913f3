"""Notebook 1, padding and reorganization: all it asks and checks, under one name."""

from cpkit_lessons.padding_gathers import check_bill, check_gather_index, check_strip
from cpkit_lessons.padding_layouts import check_keys_seen, check_owner, check_padded_len
from cpkit_lessons.padding_order import (
    WEAK_CHECKS,
    broken_gathers,
    check_accepts,
    check_cp_attention,
    kill_table,
)
from cpkit_lessons.padding_questions import LESSON, predict, progress, reveal

__all__ = [
    "LESSON",
    "WEAK_CHECKS",
    "broken_gathers",
    "check_accepts",
    "check_bill",
    "check_cp_attention",
    "check_gather_index",
    "check_keys_seen",
    "check_owner",
    "check_padded_len",
    "check_strip",
    "kill_table",
    "predict",
    "progress",
    "reveal",
]
