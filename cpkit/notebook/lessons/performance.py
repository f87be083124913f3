"""Notebook 3: what it asks and how it checks."""

from __future__ import annotations

from cpkit.notebook.lesson import Lesson

LESSON = Lesson("03_allgather_perf")
predict, reveal, progress = LESSON.predict, LESSON.reveal, LESSON.progress
