"""All figures for notebooks in one module: `from cpkit_lessons import figures`."""

from cpkit.notebook.grids import (
    Line,
    draw_lines,
    in_words,
    ownership_strip,
    pad_rows,
    padding_grid,
    rows_of,
    stage_grid,
    token_line,
)
from cpkit.notebook.show import show
from cpkit.notebook.style import recorded, text_alternative
from cpkit_lessons.bars import bill, byte_bars, work_bars
from cpkit_lessons.charts import stage_split, timeline
from cpkit_lessons.maps import memory_map, waste_map, who_wrote_where
from cpkit_lessons.mistakes import damage
from cpkit_lessons.pool_live import pool_requests
from cpkit_lessons.roofline import gain, roof, scale_out, steps
from cpkit_lessons.timelines import schedule_timeline

__all__ = [
    "Line",
    "bill",
    "byte_bars",
    "damage",
    "draw_lines",
    "gain",
    "in_words",
    "memory_map",
    "ownership_strip",
    "pad_rows",
    "padding_grid",
    "pool_requests",
    "recorded",
    "roof",
    "rows_of",
    "scale_out",
    "schedule_timeline",
    "show",
    "stage_grid",
    "stage_split",
    "steps",
    "text_alternative",
    "timeline",
    "token_line",
    "waste_map",
    "who_wrote_where",
    "work_bars",
]
