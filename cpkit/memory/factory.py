"""Redirect torch's factory functions, such as torch.empty, to another allocator.

A torch function mode intercepts the factories: it computes the geometry on the meta device,
allocates with the given allocator, and fills the memory as the factory would. Results of other
operations (cat, clone, arithmetic) stay where torch puts them. On CUDA torch could replace the
allocator itself (torch.cuda.MemPool), but its free lists can differ between ranks (pytorch#178138);
those of cpkit.memory.allocator cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from cpkit.eager import eager_only

Allocate = Callable[[Sequence[int], torch.dtype, str], torch.Tensor]

_UNFILLED = {
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    torch.Tensor.new_empty,
    torch.Tensor.new_empty_strided,
}
_ZEROS = {torch.zeros, torch.zeros_like, torch.Tensor.new_zeros}
_ONES = {torch.ones, torch.ones_like, torch.Tensor.new_ones}
_FULL = {torch.full: 1, torch.full_like: 1, torch.Tensor.new_full: 2}  # position of fill_value
FACTORIES = frozenset(_UNFILLED | _ZEROS | _ONES | set(_FULL))


class redirect(TorchFunctionMode):  # noqa: N801 - used like a function, in a with statement
    """Allocate with `allocate(shape, dtype, device type)` in factories called inside."""

    def __init__(self, allocate: Allocate) -> None:
        super().__init__()
        self._allocate = allocate

    @eager_only
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in FACTORIES or kwargs.get("out") is not None:
            return func(*args, **kwargs)
        device = _device(args, kwargs)
        if device not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        kept = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        geometry = func(*args, **kept, device="meta")
        if geometry.layout is not torch.strided:
            return func(*args, **kwargs)
        return self._allocate_like(geometry, _fill_value(func, args, kwargs), device)

    def _allocate_like(self, geometry: torch.Tensor, fill: Any, device: str) -> torch.Tensor:
        """Allocate one dense extent, and view it with the shape and strides of `geometry`."""
        shape, stride = geometry.shape, geometry.stride()
        extent = 0
        if geometry.numel():
            extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        result = self._allocate([extent], geometry.dtype, device).as_strided(shape, stride)
        if fill is not None:
            result.fill_(fill)
        # Inside torch.func transforms requires_grad_ is an error, also with False.
        return result.requires_grad_() if geometry.requires_grad else result


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the requested type of device; empty for a GPU that is not this rank's."""
    wanted = kwargs.get("device")
    if wanted is None and args and isinstance(args[0], torch.Tensor):
        wanted = args[0].device
    device = torch.device(torch.get_default_device() if wanted is None else wanted)
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return ""
    return device.type


def _fill_value(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in _ZEROS:
        return 0
    if func in _ONES:
        return 1
    if func in _FULL:
        return kwargs["fill_value"] if "fill_value" in kwargs else args[_FULL[func]]
    return None
