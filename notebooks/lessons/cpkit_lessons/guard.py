"""Call a learner's function so that an exception or an endless loop becomes one line."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import math
import reprlib
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, get_origin, get_type_hints

from cpkit_lessons.feedback import WrongAnswer

LIMIT_S = 5.0  # of one call, which takes milliseconds
_LOOKS_S = 0.1  # the interval at which the time is compared with the limit
_started_s: float | None = None  # when the learner's code was entered


class TakesTooLong(BaseException):
    """Raised in the learner's code; not an Exception, which that code may catch."""


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise TakesTooLong in a learner's function that runs for more than LIMIT_S.

    Only Python code in the main thread is stopped, where a notebook runs its cells. Another timer
    of the process still rings at its time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    entered_s, other = time.monotonic(), signal.getsignal(signal.SIGALRM)
    due_s = math.inf  # when the other timer rings

    def look(number: int, frame: FrameType | None) -> None:
        nonlocal due_s
        now_s = time.monotonic()
        if now_s > due_s and callable(other):
            due_s = math.inf
            other(number, frame)
        if _started_s is not None and now_s - _started_s > LIMIT_S:
            raise TakesTooLong

    signal.signal(signal.SIGALRM, look)
    left_s, again_s = signal.setitimer(signal.ITIMER_REAL, _LOOKS_S, _LOOKS_S)
    if left_s:
        due_s = entered_s + left_s
    try:
        yield
    finally:
        rest_s = max(0.001, due_s - time.monotonic()) if math.isfinite(due_s) else again_s
        signal.setitimer(signal.ITIMER_REAL, rest_s, again_s)
        signal.signal(signal.SIGALRM, other)


def _timed(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    global _started_s
    _started_s = time.monotonic()
    try:
        return function(*arguments, **named)
    finally:
        _started_s = None


def equals(got: object, wanted: object) -> bool:
    """Return True if a returned value equals the expected one; False if they cannot be compared."""
    try:
        return bool(got == wanted)
    except Exception:  # noqa: BLE001 - several numbers, as in a tensor, are not one answer
        return False


def truth(call: str, got: object) -> bool:
    """Return a verdict as a bool. Raises WrongAnswer for what is neither true nor false."""
    verdict = equals(got, True)
    if not verdict and not equals(got, False):
        raise WrongAnswer(f"{call} returned {_short(got)}; expected True or False")
    return verdict


def check_functions(check: Callable[..., Any], attempt: Sequence[object]) -> None:
    """Raise WrongAnswer if a check expects a function and gets another value."""
    for (name, hint), value in zip(get_type_hints(check).items(), attempt, strict=False):
        if get_origin(hint) is Callable and not callable(value):
            raise WrongAnswer(f"{name} is {_short(value)}; it must be a function (`def {name}`)")


def guarded(attempt: object) -> object:
    """Wrap a function so that it raises `WrongAnswer` only; return any other object unchanged."""
    if not callable(attempt):
        return attempt

    @functools.wraps(attempt)
    def call(*arguments: Any, **named: Any) -> Any:
        text = ", ".join(map(_short, arguments))
        try:
            got = _timed(attempt, *arguments, **named)
        except WrongAnswer:
            raise
        except (Exception, TakesTooLong) as problem:  # noqa: BLE001 - a learner's code may raise anything
            raise _as_wrong_answer(attempt, text, problem) from None
        if got is None:
            raise WrongAnswer(f"{_name(attempt)}({text}) returned None. Is a `return` missing?")
        return got

    return call


def guarded_steps(attempt: Callable[..., Any]) -> Callable[..., Generator[Any, Any, None]]:
    """Wrap a generator function in the same way; its exceptions appear while it is iterated.

    Raises WrongAnswer for a step without `yield`, which would appear as a deadlock somewhere else.
    """
    if step := _step_without_yield(inspect.unwrap(attempt)):
        raise WrongAnswer(f"`{step}` without `yield` has no effect")

    @functools.wraps(attempt)
    def steps(*arguments: Any) -> Generator[Any, Any, None]:
        try:
            made = _timed(inspect.unwrap(attempt), *arguments)
            if not isinstance(made, Generator):
                raise WrongAnswer(f"{_name(attempt)} has no `yield`: a program yields its steps")
            answer = None
            while True:
                try:
                    step = _timed(made.send, answer)
                except StopIteration:
                    return
                answer = yield step
        except WrongAnswer:
            raise
        except (Exception, TakesTooLong) as problem:  # noqa: BLE001 - a learner's code may raise anything
            raise _as_wrong_answer(attempt, "…", problem) from None

    return steps


def _step_without_yield(program: Callable[..., Any]) -> str:
    """Return the first such step in a program's source; empty if it has none, or no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(program)))
    except (OSError, TypeError, SyntaxError):
        return ""
    me = next(iter(inspect.signature(program).parameters), "")
    for node in ast.walk(tree):
        stored = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)
        if stored or isinstance(node, ast.Expr):
            call = getattr(node, "value", None)
            if isinstance(call, ast.Call) and ast.unparse(call.func).startswith(f"{me}."):
                return ast.unparse(call)
    return ""


def _as_wrong_answer(attempt: Callable[..., Any], text: str, problem: BaseException) -> WrongAnswer:
    call, where = f"{_name(attempt)}({text})", _location(problem.__traceback__)
    if isinstance(problem, TakesTooLong):
        return WrongAnswer(
            f"{call} has not ended after {LIMIT_S:g} s{where}. Is there an endless loop?"
        )
    return WrongAnswer(f"{call} raised {type(problem).__name__}: {problem}{where}")


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
