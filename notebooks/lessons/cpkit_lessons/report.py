"""Write a report of a run, with all that is needed to repeat it, as an HTML page and as JSON.

The page needs no network and no JavaScript. Its figures are pictures, or text if no Chromium can
draw them. The page also contains the JSON, so one file is enough.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import json
import os
import platform
import sys
import threading
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from cpkit.control.results import StatusResult
from cpkit.notebook.show import NoPicture, png
from cpkit.notebook.style import text_alternative
from cpkit.os_errors import describe
from cpkit_lessons import machine

METHOD = (
    "Each algorithm's result was compared bit by bit with the expected rows before it was timed. "
    "The algorithms alternated at each size. On the CPU every sample began at a barrier; on a GPU "
    "the times are device times of queued calls. time_us is the largest of the ranks' medians; "
    "min_us and p95_us are the largest of the ranks' minima and 95th percentiles."
)
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:2px 10px;text-align:right;"
    "border-bottom:1px solid #d0d7de}img{max-width:100%}pre{overflow:auto}"
)


def environment(status: StatusResult) -> dict[str, Any]:
    """Return the machine, versions, commit and date, which a comparison needs."""
    return {
        "date": dt.datetime.now(tz=dt.UTC).isoformat(timespec="seconds"),
        "cpkit": status.version,
        "commit": machine.commit(),
        "torch": status.torch_version,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": machine.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 2),
        "device": status.device,
        "ranks": status.world_size,
        "symmetric_backend": status.symmetric_backend,
    }


def write(
    folder: Path,
    status: StatusResult,
    table: pd.DataFrame,
    *,
    repeat: str,
    results: Mapping[str, Any],
    figures: Sequence[go.Figure] = (),
) -> tuple[Path, Path]:
    """Write `report.html` and `report.json`; return both paths.

    `table`: the result of `lab.sweep`; `repeat`: the code that measures it again; `results`: the
    conclusions (name with its unit, value). Raises ValueError if the table lacks a column or
    the folder cannot be written.
    """
    missing = {"size_bytes", "cp_size", "algorithm", "time_us", "p95_us", "iterations"} - {*table}
    if missing:
        raise ValueError(f"the table lacks {sorted(missing)}; pass what lab.sweep returned")
    content = {
        "environment": environment(status),
        "method": METHOD,
        "repeat": repeat,
        "results": dict(results),
        "sweep": json.loads(table.to_json(orient="records", double_precision=15)),
    }
    page, data = folder / "report.html", folder / "report.json"
    text = _page(content, table, _pictures(figures))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        data.write_text(json.dumps(content, indent=1) + "\n")
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"cannot write the report to {folder}: {describe(error)}; pass a folder that you can "
            f"write to"
        ) from error
    return page, data


def _pictures(figures: Sequence[go.Figure]) -> list[str]:
    """Return each figure as HTML: a picture, or its text and the reason, which is also printed."""
    parts, reason = [], ""
    for figure in figures:
        text = escape(text_alternative(figure))
        try:
            data = b64encode(_drawn(figure)).decode()
            parts.append(f'<p><img alt="{text}" src="data:image/png;base64,{data}"></p>')
        except NoPicture as problem:
            reason = f"The report has no pictures: {problem}."
            parts.append(f"<p>{text}</p><p>{escape(reason)}</p>")
    if reason:
        sys.stdout.write(f"{reason}\n")
    return parts


def _drawn(figure: go.Figure) -> bytes:
    """Return the figure as PNG. Prints each second, because a browser takes seconds to start."""
    drawn: SimpleQueue[bytes | Exception] = SimpleQueue()

    def draw() -> None:
        try:
            drawn.put(png(figure))
        except Exception as problem:  # noqa: BLE001 - raised below
            drawn.put(problem)

    threading.Thread(target=draw, daemon=True).start()  # so that an interrupt need not wait
    for elapsed_s in itertools.count(1):
        with contextlib.suppress(Empty):
            picture = drawn.get(timeout=1.0)
            break
        sys.stdout.write(f"a browser draws the figure, {elapsed_s} s …\n")
    if isinstance(picture, Exception):
        raise picture
    return picture


def _page(content: Mapping[str, Any], table: pd.DataFrame, pictures: Sequence[str]) -> str:
    columns = (
        "size_bytes cp_size algorithm time_us min_us p95_us iterations algbw_gbps busbw_gbps path"
    )
    shown = table[[name for name in columns.split() if name in table]]
    shown = shown.round(2).assign(**table.filter(like="_gbps").round(4))
    raw = json.dumps(content, indent=1)
    parts = [
        "<h1>All-gather: measurements</h1>",
        f"<p>{escape(content['method'])}</p>",
        "<h2>Environment</h2>",
        _pairs(content["environment"]),
        "<h2>Results</h2>",
        _pairs(content["results"]),
        "<h2>Times</h2>",
        shown.to_html(index=False, border=0),
        *pictures,
        "<h2>Repeat the measurement</h2>",
        f"<pre>{escape(content['repeat'])}</pre>",
        f"<details><summary>All numbers, as JSON</summary><pre>{escape(raw)}</pre></details>",
    ]
    head = f'<meta charset="utf-8"><title>All-gather report</title><style>{_STYLE}</style>'
    return (
        f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'
    )


def _pairs(values: Mapping[str, Any]) -> str:
    rows = [f"<tr><th>{escape(k)}</th><td>{escape(_text(v))}</td></tr>" for k, v in values.items()]
    return f"<table>{''.join(rows)}</table>"


def _text(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
