"""Draw the picture at the top of the README: `python -m tools.picture docs/gather.png`.

It shows two real gathers of the same batch, executed by its own workers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import plotly.graph_objects as go

from cpkit.control.results import GatherResult
from cpkit.lab import connect
from cpkit.notebook.grids import Line, draw_lines, in_words
from cpkit.notebook.show import NoPicture, png
from cpkit.processes import run_command

LENGTHS = [13, 9]
CP_SIZE = 4


def gather_picture(padded: GatherResult, direct: GatherResult) -> go.Figure:
    """Draw the shards, the four passes of the padded gather, and the one pass of `direct`."""
    shards = [Line(f"rank {rank} holds", padded.stage("shard", rank)) for rank in range(CP_SIZE)]
    passes = {"wire": "padded: pad, all-gather", "strip": "then strip", "reorder": "then reorder"}
    lines = shards + [Line(label, padded.stage(name, 0)) for name, label in passes.items()]
    lines.append(Line("<b>direct: one pass</b>", direct.stage("wire", 0)))
    return draw_lines(
        lines,
        title="One batch, four ranks: the padded gather and the direct gather",
        subtitle="two sequences of 13 and 9 tokens, zigzag; a cell is a row of the KV cache and "
        "shows sequence:token",
        alt=". ".join(f"{line.label}: {in_words(line.slots)}" for line in lines) + ".",
        axis_title="slot (row of the buffer)",
    )


def main() -> int:
    """Run the two gathers and write the picture to the path named on the command line."""
    parser = argparse.ArgumentParser(description="Draw two gathers as a picture.")
    parser.add_argument("path", type=Path, help="the PNG file to write")
    path = parser.parse_args().path
    with connect("picture") as lab:
        padded = lab.gather(LENGTHS, CP_SIZE, algorithm="padded")
        direct = lab.gather(LENGTHS, CP_SIZE, algorithm="direct")
        lab.stop()
    try:
        picture = png(gather_picture(padded, direct), scale=1.5)
    except NoPicture as problem:
        sys.stderr.write(f"No picture: {problem}.\n")
        return 1
    path.write_bytes(picture)
    return 0


if __name__ == "__main__":
    run_command(main)
