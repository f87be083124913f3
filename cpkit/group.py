"""The context-parallel process groups: the world is cut into world/cp_size of them.

Groups are made once per cp_size and kept, so changing cp_size is a look-up. Ranks of one machine
get a barrier in shared memory (cpkit.sync.barrier) and may use symmetric memory; a group that spans
machines does everything through torch.distributed.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Protocol

import msgspec
import torch
import torch.distributed as dist

from cpkit.devices import device_type, on_stream
from cpkit.memory.collective import describe, exchange_over, gather_problem, plain_all_gather
from cpkit.memory.path import PathReport
from cpkit.sync.barrier import ShmBarrier
from cpkit.sync.exchange import StoreExchange, deadline_s
from cpkit.sync.notes import explain_disagreement, pack_note
from cpkit.sync.shm import shm_dir, shm_problem

NO_POOL = PathReport(
    "fallback", "the group has no symmetric pool", "ordinary memory", "ordinary memory"
)


class Transport(Protocol):
    """What symmetric memory adds to a group (see cpkit.symm)."""

    def meet(self, call: str, problem: str = "", extra: bytes = b"") -> list[bytes]:
        """As CPGroup.meet, and settle the books of the pool."""

    def all_gather_into_tensor(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Collective: gather by the best path that the buffers of all ranks allow."""

    def check(self) -> None:
        """Raise TimeoutError when a wait on the device has been given up."""


@dataclass(eq=False)
class CPGroup:
    """One context-parallel group, seen from one of its ranks.

    `ranks_on_gpu` counts the ranks of the whole job whose GPU is this rank's (0 without one);
    `shares_gpu` says that some GPU of the job has several ranks, of this group or another.
    `transports` are the group's symmetric pools, by device type.
    """

    rank: int
    size: int
    ranks: tuple[int, ...]
    index: int
    spans_hosts: bool
    process_group: dist.ProcessGroup
    rendezvous: StoreExchange
    board: ShmBarrier | None
    ranks_on_gpu: int = 0
    shares_gpu: bool = False
    has_nccl: bool = False
    pools: dict[str, Transport] = field(default_factory=dict, repr=False)
    last_path: PathReport | None = field(default=None, repr=False)

    def barrier(self) -> None:
        """Wait for all ranks of the group. Raises TimeoutError naming those that did not come."""
        if self.board:
            self.board.barrier()
        else:
            self.exchange(b"")

    def check(self) -> None:
        """Raise TimeoutError when a kernel of this rank has given up waiting for a peer. Local."""
        for transport in self.pools.values():
            transport.check()

    def exchange(self, note: bytes) -> list[bytes]:
        """Everybody's note (at most NOTE_BYTES bytes), by rank; also a barrier."""
        if self.board:
            return self.board.exchange(note)
        return exchange_over(self.process_group, note, self.size)

    def meet(self, call: str, problem: str = "", extra: bytes = b"") -> list[bytes]:
        """Synchronize before a collective; returns everybody's `extra`.

        `call` describes the call in words that must be equal on all ranks; `problem` is this rank's
        complaint about its arguments (empty: none). Raises ValueError on every rank if one has a
        problem or is in another call.
        """
        note = pack_note(problem, call)
        mine = len(note).to_bytes(4, "little") + note + extra
        answers = self.exchange(mine)
        if not problem and answers.count(mine) == self.size:
            return [extra] * self.size  # the usual case, without taking the answers apart
        stops = [4 + int.from_bytes(answer[:4], "little") for answer in answers]
        notes = [answer[4:stop] for answer, stop in zip(answers, stops, strict=True)]
        if problem or any(other != note for other in notes):
            raise ValueError(explain_disagreement(notes))
        return [answer[stop:] for answer, stop in zip(answers, stops, strict=True)]

    def cp_all_gather_into_tensor_async(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """Gather equal shards into `output`: `[size · rows, …]` from `[rows, …]` on each rank.

        Complete on return for CPU tensors. CUDA tensors are gathered on `stream` (default: the
        current one), which first waits for the current stream; wait for it before reading. Raises
        ValueError on every rank when shapes or dtypes do not fit. Source: SGLang's
        GroupCoordinator, same name.
        """
        tensors = [x for x in (output, input) if isinstance(x, torch.Tensor)]
        with on_stream(stream, *tensors):
            transport = self.pools.get(device_type(input))
            if transport:
                transport.all_gather_into_tensor(output, input)
                return
            problem = gather_problem(output, input, self.size)
            self.meet("" if problem else f"gather {describe(output, input)}", problem)
            plain_all_gather(output, input, self)
            self.last_path = NO_POOL


def init_context_parallel(cp_size: int) -> CPGroup:
    """This rank's context-parallel group of `cp_size` ranks; collective over the whole world.

    Global ranks 0 … cp_size-1 are the first group, the next cp_size the second. Groups are kept:
    asking again is cheap. Raises ValueError on every rank when cp_size does not divide the world or
    differs between ranks, RuntimeError before `dist.init_process_group`.
    """
    world = _world()
    _agree_on_size(world, cp_size)
    group = world.groups.get(cp_size)
    if group is None:
        group = world.groups[cp_size] = _make_group(world, cp_size)
    world.current = group
    return group


def get_attention_cp_group() -> CPGroup:
    """The group that `init_context_parallel` returned last."""
    if _state and _state.current:
        return _state.current
    raise RuntimeError(
        "there is no context-parallel group yet: call init_context_parallel(cp_size)"
    )


def forget_groups() -> None:
    """Drop all groups and their symmetric memory, so that the next ones start clean.

    For recovery: after a rank failed inside a collective, its group is out of step. Every rank
    calls it; tensors in symmetric memory stay valid for whoever holds them.
    """
    global _state, _generation
    _generation += 1
    if _state:
        for group in _state.groups.values():
            group.pools.clear()
            dist.destroy_process_group(group.process_group)
    _state = None


# ------------------------------------------------------------------------ the world


@dataclass
class _World:
    rank: int
    size: int
    hosts: list[str]
    gpus: list[str]
    store: dist.Store
    rendezvous: StoreExchange
    board: ShmBarrier | None
    groups: dict[int, CPGroup] = field(default_factory=dict)
    current: CPGroup | None = None

    def exchange(self, note: bytes, purpose: str) -> list[bytes]:
        return self.board.exchange(note) if self.board else self.rendezvous.exchange(note, purpose)


_state: _World | None = None
_generation = 0


def _world() -> _World:
    global _state
    if not dist.is_initialized():
        raise RuntimeError(
            "there is no process group: start with torchrun and call "
            'torch.distributed.init_process_group("gloo") first'
        )
    store = dist.distributed_c10d._get_default_store()
    if _state is None or _state.store is not store:
        rank, size = dist.get_rank(), dist.get_world_size()
        meeting = StoreExchange(store, f"world{_generation}", rank, size)
        problem = shm_problem()
        mine = [problem, "" if problem else host_id(), gpu_id()]
        answers = meeting.exchange(msgspec.msgpack.encode(mine), "find each other")
        said = [msgspec.msgpack.decode(answer, type=list[str]) for answer in answers]
        problems, hosts, gpus = zip(*said, strict=True)
        if any(problems):
            raise ValueError(
                "; ".join(f"rank {r}: {each}" for r, each in enumerate(problems) if each)
            )
        board = ShmBarrier(meeting, "make the world's board") if len(set(hosts)) == 1 else None
        _state = _World(rank, size, list(hosts), list(gpus), store, meeting, board)
    return _state


@cache
def host_id() -> str:
    """Equal for ranks that can share memory: the machine's boot and its shared-memory directory.

    `CPKIT_HOST_ID` replaces it, which makes one machine play several.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = boot.read_text().strip() if boot.exists() else platform.node()
    return os.environ.get("CPKIT_HOST_ID") or f"{machine}/{shm_dir().stat().st_dev}"


def gpu_id() -> str:
    """The GPU of this process, whatever number it has here; empty without one."""
    if os.environ.get("CPKIT_DEVICE") == "cpu" or not torch.cuda.is_available():
        return ""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def _agree_on_size(world: _World, cp_size: int) -> None:
    problem = ""
    whole = isinstance(cp_size, int) and not isinstance(cp_size, bool) and cp_size > 0
    if not whole or world.size % cp_size:
        divisors = [n for n in range(1, world.size + 1) if world.size % n == 0]
        problem = (
            f"cp_size is {cp_size!r}, and it must divide the {world.size} ranks of this job: "
            f"use one of {', '.join(map(str, divisors))}, or start another number of ranks"
        )
    notes = world.exchange(
        pack_note(problem, f"init_context_parallel({cp_size!r})"), "agree on cp_size"
    )
    if any(note != notes[0] for note in notes) or problem:
        raise ValueError(explain_disagreement(notes))


def _make_group(world: _World, cp_size: int) -> CPGroup:
    everybody = [tuple(range(first, first + cp_size)) for first in range(0, world.size, cp_size)]
    crowded = [len({world.gpus[r] for r in ranks}) < cp_size for ranks in everybody]
    # One answer for all groups, since making a group is collective over the world.
    has_nccl = _nccl_is_possible(world, any(crowded))
    backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    made = [
        dist.new_group(list(ranks), backend=backend, timeout=timedelta(seconds=deadline_s()))
        for ranks in everybody
    ]
    index, rank = divmod(world.rank, cp_size)
    ranks = everybody[index]
    gpu, gpus = world.gpus[world.rank], [each for each in world.gpus if each]
    spans_hosts = len({world.hosts[r] for r in ranks}) > 1
    meeting = StoreExchange(world.store, f"cp{cp_size}.{index}.{_generation}", rank, cp_size)
    board = None if spans_hosts else ShmBarrier(meeting, f"make the board of cp_size {cp_size}")
    return CPGroup(
        rank,
        cp_size,
        ranks,
        index,
        spans_hosts,
        made[index],
        meeting,
        board,
        ranks_on_gpu=world.gpus.count(gpu) if gpu else 0,
        shares_gpu=len(set(gpus)) < len(gpus),
        has_nccl=has_nccl,
    )


def _nccl_is_possible(world: _World, crowded: bool) -> bool:
    """NCCL takes one rank a GPU. `CPKIT_NCCL=1` uses it all the same, with a NCCL_HOSTID a rank."""
    if not all(world.gpus) or not dist.is_nccl_available():
        return False
    return not crowded or os.environ.get("CPKIT_NCCL") == "1"
