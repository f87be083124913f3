"""The words of an error that must come."""

from __future__ import annotations


def error_of(call: object, *args: object, **kwargs: object) -> str:
    """The ValueError that a call raises; that it raises is part of the check."""
    try:
        call(*args, **kwargs)  # type: ignore[operator]
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{call} accepted {args} {kwargs}")
