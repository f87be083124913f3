"""Calls a learner's function so that its mistakes become one line, not a wall of traceback."""

from __future__ import annotations

import functools
import linecache
import reprlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

from cpkit.notebook.verdict import Wrong


def guarded(attempt: object) -> object:
    """A function that turns what `attempt` raises into `Wrong`; anything else as it is."""
    return _guarded(attempt) if callable(attempt) else attempt


def _guarded(attempt: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(attempt)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return attempt(*arguments, **named)
        except Wrong:
            raise
        except Exception as problem:  # noqa: BLE001  whatever it is, the learner wrote it
            words = ", ".join(map(reprlib.repr, arguments))
            where = _line(problem.__traceback__)
            name = getattr(attempt, "__name__", "your function")
            raise Wrong(
                f"{name}({words}) raised {type(problem).__name__}: {problem}{where}"
            ) from None

    return call


def _line(trace: TracebackType | None) -> str:
    """Where in the learner's code it happened: ` (line 3 of the cell: `return x[i]`)`."""
    while trace and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    if trace is None:
        return ""
    cell, number = trace.tb_frame.f_code.co_filename, trace.tb_lineno
    while trace := trace.tb_next:
        if trace.tb_frame.f_code.co_filename == cell:
            number = trace.tb_lineno
    text = linecache.getline(cell, number).strip()
    return f" (line {number} of the cell" + (f": `{text}`)" if text else ")")
