"""Functions that torch.compile does not trace: it calls them as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def eager_only(function: F) -> F:
    """Make a function opaque to torch.compile: it interrupts the graph and runs as without it.

    With `fullgraph=True` the compiler raises an error that names the function. The compiler would
    otherwise trace into the function, and cannot represent peers' memory or cached layouts.

    torch.compiler.disable does the same with a wrapper around every call, and imports the compiler:
    seconds and more than 100 MB on every rank. Two marks replace it. The attribute applies when the
    compiler inlines a call to the function. The strategy applies when Python calls the function,
    and to everything that it calls.
    """
    marked: Any = function
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = (
        f"{function.__module__}.{function.__qualname__} runs eagerly, because the compiler "
        f"cannot trace it: compile the parts before and after it, or leave fullgraph off"
    )
    compiler: Any = torch._C._dynamo.eval_frame
    skip = compiler._FrameAction.SKIP
    strategy = compiler._FrameExecStrategy(skip, skip)  # the function, and what it calls
    compiler.set_code_exec_strategy(marked.__code__, strategy)
    return function
