"""Symmetric memory on CUDA with a GPU per rank: NCCL gathers equal shards, kernels push rows.

The pool's segments are registered with NCCL as symmetric windows where that is possible.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch

from cpkit.group import CPGroup
from cpkit.memory.backend import ORDINARY_COLLECTIVE, Pool
from cpkit.memory.cuda import CudaBackend
from cpkit.memory.cuda_segment import CudaSegment
from cpkit.memory.nccl_settings import window_problem
from cpkit.memory.path import (
    ZERO_POLICY,
    BufferLocation,
    BufferPair,
    PathReport,
    decide,
    without_windows,
)
from cpkit.stages import stage
from cpkit.sync.collective import torch_all_gather

_IN_POOL = BufferLocation(segment=0, offset=0)
_ORDINARY = BufferLocation(other="ordinary memory", fault="unregistered")


class NcclBackend(CudaBackend):
    """CudaBackend whose equal-sized gathers go through NCCL. Making one is collective."""

    def __init__(self, group: CPGroup) -> None:
        self.group = group
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._windows: list[_Window] = []
        self._reports: dict[tuple[bool, str], PathReport] = {}  # of a receive buffer in the pool
        self._window_problem = self._prepare_windows()
        super().__init__(group)

    def all_gather(
        self,
        pool: Pool,
        shards: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        *,
        symmetric_send: bool,
        symmetric_recv: bool,
    ) -> PathReport:
        """Gather with NCCL, whose kernels synchronize the ranks: no barrier stands around them.

        A symmetric kernel begins with a barrier, in stream order: a peer's stores cannot overtake
        this rank's earlier reads of the receive buffer. Source: NCCL's symmetric/all_gather.cuh.

        A shard that needed no padding is the caller's own tensor, which may be in symmetric memory
        on some ranks only: without `symmetric_send` NCCL receives an ordinary copy of it.
        """
        windows = not self._window_problem
        with stage("wire"):
            for output, shard in zip(outputs, shards, strict=True):
                torch_all_gather(
                    output,
                    shard,
                    self.group,
                    symmetric_send=windows and symmetric_send,
                    symmetric_recv=windows and symmetric_recv,
                )
        with stage("exit"):
            pass  # inside NCCL's kernel
        if not symmetric_recv:
            return ORDINARY_COLLECTIVE
        key = symmetric_send, self._window_problem
        if key not in self._reports:
            send = _IN_POOL if symmetric_send else _ORDINARY
            report = decide([BufferPair(send, _IN_POOL)] * self.group.size, 0, self.transport())
            self._reports[key] = without_windows(report, self._window_problem)
        return self._reports[key]

    def make_segment(self, nbytes: int, purpose: str) -> CudaSegment:
        """Make a segment as CudaBackend does, and register it with NCCL. Collective.

        First the windows of the segments that all ranks have dropped end, and their memory returns
        to the GPU. It is freed here because only here do all ranks wait for each other.
        """
        self._end_dropped_windows()
        segment = super().make_segment(nbytes, purpose)
        if self.group.size > 1 and not self._window_problem:
            self._window_problem = self._register_window(segment)
        return segment

    def transport(self) -> str:
        """Return "nccl" with the version of the loaded library, and its policy if that is ZERO.

        Without windows the policy changes nothing.
        """
        transport = self.group.nccl[self.group.rank].transport
        return transport.removesuffix(ZERO_POLICY) if self._window_problem else transport

    def window_problem(self) -> str:
        """Return why NCCL has no windows on the pool's memory; empty when it has them."""
        return self._window_problem

    def _prepare_windows(self) -> str:
        """Return why windows are not possible here; empty when they are. Collective.

        A communicator must have run a collective before it gets a window (pytorch#188567).
        """
        if self.group.size == 1:
            return ""
        if self.group.shares_gpu:
            return "ranks share a GPU, and NCCL has no symmetric windows there"
        if problem := window_problem(self.group.nccl):
            return problem
        word = torch.zeros(1, dtype=torch.uint8, device=self.device)
        words = torch.empty(self.group.size, dtype=torch.uint8, device=self.device)
        torch_all_gather(words, word, self.group)
        torch.cuda.synchronize()
        return ""

    def _register_window(self, segment: CudaSegment) -> str:
        """Register a segment with NCCL; return why that failed on any rank. Collective."""
        problem = ""
        try:
            nccl: Any = self.group.process_group._get_backend(self.device)
            nccl.register_mem_pool(segment.pool, symm=True)
            self._windows.append(_Window(segment))
        except (RuntimeError, AttributeError, TypeError) as error:
            problem = f"NCCL did not register the pool: {str(error).splitlines()[0]}"[:200]
        answers = self.group.exchange(problem.encode())
        return next((answer.decode() for answer in answers if answer), "")

    def _end_dropped_windows(self) -> None:
        """Deregister the windows whose segments all ranks have dropped. Collective.

        rank 0   which are dropped? │ finish the GPU's work │ barrier │ deregister
        rank 1   which are dropped? │ finish the GPU's work │ barrier │ deregister
                                                              ↑ no kernel uses a window
        """
        dropped = bytes(window.segment() is None for window in self._windows)
        answers = self.group.exchange(dropped)
        ended = [all(flags) for flags in zip(*answers, strict=False)]
        if not any(ended):
            return
        torch.cuda.synchronize(self.device)
        self.group.barrier()
        nccl: Any = self.group.process_group._get_backend(self.device)
        for window in compress(self._windows, ended):
            window.end(nccl)
        ended += [False]  # a window that another rank failed to register, the last one
        self._windows = [w for w, over in zip(self._windows, ended, strict=False) if not over]


class _Window:
    """The registration of a segment's memory with NCCL.

    Without `end`, the memory stays until the process exits: NCCL's hook on the pool outlives the
    communicator, and freeing the pool after `destroy_process_group` ends the process in
    std::terminate (~MemPool, torch 2.11).
    """

    def __init__(self, segment: CudaSegment) -> None:
        self.segment = weakref.ref(segment)
        self._pool = segment.pool
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._pool))

    def end(self, nccl: Any) -> None:
        """Deregister the memory, and let it return to the GPU. Local."""
        nccl.deregister_mem_pool(self._pool)
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(self._pool))
