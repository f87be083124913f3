"""Counts what a piece of torch code moves: the score that stands beside a passed check.

    with CopyCounter() as ledger:
        solution(x)
    ledger.kernels, ledger.bytes_written

Every operation that makes or fills memory counts, with the bytes that it writes; views and bare
allocations are free. On a GPU each would be one kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "lift")


class CopyCounter(TorchDispatchMode):
    """While it is entered, counts kernels and the bytes that they write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = 0
        self.bytes_written = 0

    def passes(self, result: torch.Tensor) -> float:
        """How often the result's bytes were written, on average."""
        return round(self.bytes_written / (result.numel() * result.element_size()), 2)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if not (name in _FREE or _is_view(func)):
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            written = _target(func, args)
            moved = [written] if written is not None else tensors
            self.kernels += bool(moved)
            self.bytes_written += sum(x.numel() * x.element_size() for x in moved)
        return result


def _is_view(func: Any) -> bool:
    """Whether the result only looks at memory of an argument."""
    aliases = [argument.alias_info for argument in func._schema.arguments]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _target(func: Any, args: Sequence[Any]) -> torch.Tensor | None:
    """The tensor that an in-place operation writes to; of `index_put_` only what it puts."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            scattered = func.__name__.startswith(("index_put", "index_copy", "scatter"))
            return args[-1] if scattered and isinstance(args[-1], torch.Tensor) else value
    return None
