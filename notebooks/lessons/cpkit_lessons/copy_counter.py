"""Count the kernels and written bytes of torch code: the score of a passed check.

    with CopyCounter() as counter:
        solution(x)
    counter.kernels, counter.bytes_written

Every operation that creates or fills memory counts, with the bytes that it writes. Views and bare
allocations are free. On a GPU each counted operation would be one kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "lift")


class CopyCounter(TorchDispatchMode):
    """Context manager that counts kernels and the bytes that they write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = 0
        self.bytes_written = 0

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
            target = _written_in_place(func, args)
            written = tree_leaves(result) if target is None else [target]
            tensors = [leaf for leaf in written if isinstance(leaf, torch.Tensor)]
            self.kernels += bool(tensors)
            self.bytes_written += sum(tensor.nbytes for tensor in tensors)
        return result


def _is_view(func: Any) -> bool:
    """Whether the result shares the memory of an argument."""
    aliases = [argument.alias_info for argument in func._schema.arguments]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _written_in_place(func: Any, args: Sequence[Any]) -> torch.Tensor | None:
    """Return the tensor that an in-place operation writes; of a scatter only the source rows."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            scattered = func.__name__.startswith(("index_put", "index_copy", "scatter"))
            return args[-1] if scattered and isinstance(args[-1], torch.Tensor) else value
    return None
