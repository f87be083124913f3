"""A segment of symmetric memory on the GPU, and the tensors over its blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_INTEGER_OF = {1: "|u1", 2: "<i2", 4: "<i4", 8: "<i8", 16: "<c16"}  # by bytes


class _BlockMemory:
    """Memory with the CUDA array interface; a tensor over it keeps this object alive.

    It keeps the segment, even after its pool is replaced, and calls `release` when it is dropped.
    """

    __slots__ = "__cuda_array_interface__", "_release", "_segment"

    def __init__(
        self, segment: CudaSegment, array: dict[str, object], release: Callable[[], object]
    ) -> None:
        self.__cuda_array_interface__ = array
        self._segment, self._release = segment, release

    def __del__(self) -> None:
        self._release()


class CudaSegment:
    """One allocation on every rank, mapped by all: a tensor in a memory pool of its own.

    Memory that was dropped from its own pool returns to the GPU and is never reused. In a shared
    pool, two ranks could reuse two free segments of one size in different orders, which would pair
    the wrong segments (pytorch#178138).
    """

    def __init__(
        self, buffer: torch.Tensor, pool: torch.cuda.MemPool, handle: Any, device: torch.device
    ) -> None:
        self._buffer, self.pool, self.handle, self._device = buffer, pool, handle, device
        self.nbytes, self._address = buffer.numel(), buffer.data_ptr()
        self._shift = buffer.data_ptr() - handle.buffer_ptrs[handle.rank]
        self.addresses = [pointer + self._shift for pointer in handle.buffer_ptrs]
        self.peers = torch.tensor(self.addresses, dtype=torch.int64, device="cpu").to(device)
        self.table = self.peers.data_ptr()

    def view(self, rank: int, offset: int, nbytes: int) -> torch.Tensor:
        """Return bytes of a rank's memory: uint8 `[nbytes]`."""
        start = self._shift + offset
        view: torch.Tensor = self.handle.get_buffer(rank, [nbytes], torch.uint8, start)
        return view

    def block(
        self,
        offset: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        release: Callable[[], object],
    ) -> torch.Tensor:
        """Return own memory; `release` is called when the last tensor over it is dropped."""
        data = self._address + offset, False  # not read-only
        typestr = _INTEGER_OF[dtype.itemsize]
        array = {"shape": shape, "typestr": typestr, "data": data, "version": 3}
        memory = _BlockMemory(self, array, release)
        return torch.as_tensor(memory, device=self._device).view(dtype)
