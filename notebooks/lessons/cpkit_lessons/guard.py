"""Calls a learner's function so that its mistakes become one line, not a wall of traceback."""

from __future__ import annotations

import functools
import linecache
import math
import reprlib
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any

from cpkit_lessons.feedback import Wrong


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
            words = ", ".join(map(_in_words, arguments))
            raise _blame(attempt, words, problem) from None

    return call


def guarded_steps(attempt: Callable[..., Any]) -> Callable[..., Generator[Any, Any, None]]:
    """The same for a generator function, whose mistakes come to light step by step."""

    @functools.wraps(attempt)
    def steps(*arguments: Any) -> Generator[Any, Any, None]:
        try:
            made = attempt(*arguments)
            if not isinstance(made, Generator):
                raise Wrong(f"{_name(attempt)} has no `yield`: a program yields its steps")
            yield from made
        except Wrong:
            raise
        except Exception as problem:  # noqa: BLE001  whatever it is, the learner wrote it
            raise _blame(attempt, "…", problem) from None

    return steps


def _blame(attempt: Callable[..., Any], words: str, problem: Exception) -> Wrong:
    where = _line(problem.__traceback__)
    return Wrong(f"{_name(attempt)}({words}) raised {type(problem).__name__}: {problem}{where}")


def _in_words(argument: object) -> str:
    """An argument in a few words; of a large array only its shape: `float64 [2, 4, 8]`."""
    shape = getattr(argument, "shape", None)
    if not shape or math.prod(shape) <= 8:
        return reprlib.repr(argument)
    dtype = str(getattr(argument, "dtype", "array")).removeprefix("torch.")
    return f"{dtype} {list(shape)}"


def _name(attempt: Callable[..., Any]) -> str:
    return getattr(attempt, "__name__", "your function")


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
