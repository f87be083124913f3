"""Call a learner's function so that its exception becomes one line instead of a traceback."""

from __future__ import annotations

import functools
import linecache
import math
import reprlib
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any

from cpkit_lessons.feedback import WrongAnswer


def guarded(attempt: object) -> object:
    """Wrap a function so that it raises `WrongAnswer` only; return any other object unchanged."""
    if not callable(attempt):
        return attempt

    @functools.wraps(attempt)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return attempt(*arguments, **named)
        except WrongAnswer:
            raise
        except Exception as problem:  # noqa: BLE001 - a learner's code may raise anything
            text = ", ".join(map(_short, arguments))
            raise _as_wrong_answer(attempt, text, problem) from None

    return call


def guarded_steps(attempt: Callable[..., Any]) -> Callable[..., Generator[Any, Any, None]]:
    """Wrap a generator function in the same way; its exceptions appear while it is iterated."""

    @functools.wraps(attempt)
    def steps(*arguments: Any) -> Generator[Any, Any, None]:
        try:
            made = attempt(*arguments)
            if not isinstance(made, Generator):
                raise WrongAnswer(f"{_name(attempt)} has no `yield`: a program yields its steps")
            yield from made
        except WrongAnswer:
            raise
        except Exception as problem:  # noqa: BLE001 - a learner's code may raise anything
            raise _as_wrong_answer(attempt, "…", problem) from None

    return steps


def _as_wrong_answer(attempt: Callable[..., Any], text: str, problem: Exception) -> WrongAnswer:
    where = _location(problem.__traceback__)
    return WrongAnswer(
        f"{_name(attempt)}({text}) raised {type(problem).__name__}: {problem}{where}"
    )


def _short(argument: object) -> str:
    """Return a short repr of an argument; of a large array its shape: `float64 [2, 4, 8]`."""
    shape = getattr(argument, "shape", None)
    if not shape or math.prod(shape) <= 8:
        return reprlib.repr(argument)
    dtype = str(getattr(argument, "dtype", "array")).removeprefix("torch.")
    return f"{dtype} {list(shape)}"


def _name(attempt: Callable[..., Any]) -> str:
    return getattr(attempt, "__name__", "your function")


def _location(trace: TracebackType | None) -> str:
    """Return the line of the learner's code that raised: ` (line 3 of the cell: `return x[i]`)`."""
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
