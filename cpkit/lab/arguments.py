"""What a `Lab` accepts where one value or several can be passed."""

import contextlib
from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

from cpkit.control.errors import BadRequest

Lengths = int | Sequence[int]


def several(values: Any, name: str) -> tuple[Any, ...]:
    """Return one name or several values as a tuple. Raises BadRequest for anything else."""
    if not isinstance(values, Iterable):
        raise BadRequest(f"{name} is {values!r:.100}; it must be a list")
    return (values,) if isinstance(values, str) else tuple(values)


def whole(numbers: Lengths, name: str = "lengths") -> tuple[int, ...]:
    """Return one integer or several as a tuple. Raises BadRequest for anything else."""
    with contextlib.suppress(TypeError):
        return (index(numbers),)  # type: ignore[arg-type]  # a sequence has no index
    with contextlib.suppress(TypeError):
        whole = tuple(map(index, numbers))  # type: ignore[arg-type]
        if whole:
            return whole
    raise BadRequest(
        f"{name} is {numbers!r:.100}; it must be a whole number, or a list of at least one: for "
        f"lengths the tokens of each sequence, for example [4097, 812]"
    )
