"""All figures in one place, for notebooks: `from cpkit.notebook import figures`."""

from cpkit.notebook.bars import bill, byte_bars, work_bars
from cpkit.notebook.charts import stage_split, timeline
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
from cpkit.notebook.maps import memory_map, waste_map, who_wrote_where
from cpkit.notebook.mistakes import damage
from cpkit.notebook.requests import pool_requests
from cpkit.notebook.roofs import gain, roof, scale_out, steps
from cpkit.notebook.show import show
from cpkit.notebook.style import recorded, text_alternative
from cpkit.notebook.timelines import schedule_timeline

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
