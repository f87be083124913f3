"""Tensors with given bytes, in every kind of memory layout that a caller can pass."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.fuzz.case import Kind
from benchmarks.fuzz.oracle import Bytes

# torch copies the bits of these; it cannot copy every dtype.
CARRIERS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}
View = Callable[[torch.Tensor], torch.Tensor]


def tensor_of(data: Bytes, kind: Kind) -> torch.Tensor:
    """Return the rows `[rows, row bytes]` as a new contiguous tensor of carriers."""
    shape = (len(data), *kind.trailing)
    carrier = CARRIERS[kind.dtype.itemsize]
    if not math.prod(shape):
        return torch.empty(shape, dtype=carrier)
    return torch.from_numpy(data.copy()).view(carrier).view(shape)


def bytes_of(x: torch.Tensor) -> Bytes:
    """Return the bytes of a result: `[rows, row bytes]`."""
    rows = x.shape[0]
    if not x.numel():
        return np.empty((rows, 0), dtype=np.uint8)
    data: Bytes = x.contiguous().view(-1).view(torch.uint8).numpy().reshape(rows, -1)
    return data


def plain(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself, which is contiguous."""
    return x


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """Begin at the second element of a buffer."""
    buffer = x.new_zeros(x.numel() + 1)
    return buffer[1:].view(x.shape).copy_(x)


def every_second_element(x: torch.Tensor) -> torch.Tensor:
    """Return the elements 0, 2, 4 … of a buffer."""
    return x.new_zeros(*x.shape, 2)[..., 0].copy_(x)


def rows_apart(x: torch.Tensor) -> torch.Tensor:
    """Return every third row of a buffer."""
    return x.new_zeros(x.shape[0], 3, *x.shape[1:])[:, 1].copy_(x)


def columns(x: torch.Tensor) -> torch.Tensor:
    """Return some columns of a wider tensor."""
    return x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)[..., 2:-1].copy_(x)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose dimensions are in memory in reverse order."""
    order = list(reversed(range(x.ndim)))
    return x.new_zeros([x.shape[i] for i in order]).permute(order).copy_(x)


def odd_row_stride(x: torch.Tensor) -> torch.Tensor:
    """Return a single row with a stride that has no meaning."""
    return x.as_strided(x.shape, (7, *x.stride()[1:]))


def one_row_expanded(x: torch.Tensor) -> torch.Tensor:
    """Return rows that are all the same memory."""
    return x[:1].clone().expand(x.shape)


def one_element_expanded(x: torch.Tensor) -> torch.Tensor:
    """Return rows whose last dimension is the same memory."""
    return x[..., :1].clone().expand(x.shape)


def views_of(x: torch.Tensor, kind: Kind, *, contiguous: bool) -> list[View]:
    """Return the layouts that this tensor can have."""
    found = [plain, misaligned]
    if x.shape[0] == 1:
        found.append(odd_row_stride)
    if contiguous:
        return found
    found += [every_second_element, rows_apart, transposed]
    if x.ndim > 1:
        found.append(columns)
    if kind.same == "rows" and x.shape[0] > 1:
        found.append(one_row_expanded)
    if kind.same == "last" and x.shape[-1] > 1:
        found.append(one_element_expanded)
    return found


def laid_out(
    data: Bytes, kind: Kind, rng: random.Random, *, contiguous: bool = False
) -> tuple[str, torch.Tensor]:
    """Return the rows as a tensor in some layout, and the name of the layout."""
    lazy = kind.lazy if not contiguous and rng.random() < 0.5 else ""
    stored = tensor_of(_undone(data, kind) if lazy else data, kind)
    view = rng.choice(views_of(stored, kind, contiguous=contiguous))
    x = view(stored).view(kind.dtype)
    if lazy:
        x = x.conj() if lazy == "conj" else torch._neg_view(x)
    return " ".join(filter(None, [lazy, view.__name__])), x


def _undone(data: Bytes, kind: Kind) -> Bytes:
    """Return the bytes whose negation, or conjugation, these bytes are."""
    size, data = kind.dtype.itemsize, data.copy()
    if kind.lazy == "conj":
        data[:, size - 1 :: size] ^= 0x80  # the sign of the imaginary part
    elif kind.dtype.is_floating_point:
        data[:, size - 1 :: size] ^= 0x80
    elif data.size:
        integers = data.view(np.dtype(f"u{size}"))
        np.negative(integers, out=integers)
    return data
