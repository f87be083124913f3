"""The message of an expected error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def error_of(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """Return the message of the ValueError that a call must raise."""
    return raised(ValueError, call, *args, **kwargs)


def raised(
    kind: type[BaseException], call: Callable[..., object], *args: Any, **kwargs: Any
) -> str:
    """Return the message of the exception of this type that a call must raise."""
    try:
        call(*args, **kwargs)
    except kind as error:
        return str(error)
    raise AssertionError(f"{call} accepted {args} {kwargs}")
