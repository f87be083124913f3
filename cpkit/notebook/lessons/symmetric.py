"""Notebook 2: what it asks and how it checks."""

from __future__ import annotations

from cpkit.notebook.lesson import Lesson

LESSON = Lesson("02_symmetric_memory")
predict, reveal, progress = LESSON.predict, LESSON.reveal, LESSON.progress
