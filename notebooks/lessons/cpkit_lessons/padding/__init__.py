"""Notebook 1, padding and reorganization: its predictions and the checks of its exercises."""

from cpkit_lessons.padding.exercises import (
    check_accepts,
    check_bill,
    check_cp_attention,
    check_gather_index,
    check_keys_seen,
    check_owner,
    check_padded_len,
    check_strip,
    kill_table,
)
from cpkit_lessons.padding.questions import (
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
    "check_accepts",
    "check_bill",
    "check_cp_attention",
    "check_gather_index",
    "check_keys_seen",
    "check_owner",
    "check_padded_len",
    "check_strip",
    "explain_missing_names",
    "kill_table",
    "predict",
    "progress",
    "ragged",
    "reveal",
]
