"""The context-parallel process groups: the world is split into world/cp_size of them.

Groups are made once per cp_size and kept, so a later change of cp_size is a dictionary lookup. The
ranks of one machine get a barrier in shared memory (cpkit.sync.barrier) and can use symmetric
memory. A group that spans machines uses torch.distributed for everything.

Only one thread of a rank uses a group (see cpkit.threads). Two micro-batches that overlap need a
group each, over the same ranks:

    first, second = (init_context_parallel(cp_size, name) for name in ("first", "second"))

    thread 1   with use_group(first):    gather, gather, …
    thread 2   with use_group(second):   gather, gather, …
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from threading import get_ident
from typing import Any, Protocol

import msgspec
import torch
import torch.distributed as dist

from cpkit import settings
from cpkit.devices import advice_on_idle_gpus, check_stream, device_type, gpu_id, on_stream
from cpkit.eager import eager_only
from cpkit.memory.nccl_settings import NcclSettings, check_versions, settings_of_this_process
from cpkit.memory.path import PathReport
from cpkit.os_errors import SPARE_DESCRIPTORS, require_descriptors
from cpkit.sync.agreement import Agreement, Signature, describe_error
from cpkit.sync.barrier import EXCHANGE, CallsDiffer, RankFailed, ShmBarrier
from cpkit.sync.collective import check_gather, describe, exchange_over, torch_all_gather
from cpkit.sync.exchange import StoreExchange
from cpkit.threads import OwnerThread

_LONGEST_NAME = 64
_DESCRIPTORS_PER_RANK = 3  # gloo's sockets and the barrier's maps; a few more per group
NO_POOL = PathReport(
    "fallback", "the group has no symmetric pool", "ordinary memory", "ordinary memory"
)


class Pool(Protocol):
    """The part of a symmetric pool that its group uses (see cpkit.memory.pool)."""

    def agreement(self) -> Agreement:
        """Return what CPGroup.agreement does; it also frees blocks that all ranks dropped."""

    def all_gather_into_tensor(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        stream: torch.cuda.Stream | None,
        *,
        agreed: bool,
    ) -> PathReport:
        """Gather by the best path that the buffers of all ranks allow. Collective."""

    def locate(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """Return (segment, byte offset) of a tensor's first element; None outside the pool."""

    def check(self) -> None:
        """Raise TimeoutError when a wait on the device has timed out."""


@dataclass(eq=False)
class CPGroup:
    """One context-parallel group, seen from one of its ranks.

    `ranks_on_gpu` counts the ranks of the whole job on this rank's GPU (0 without a GPU);
    `shares_gpu` is true when several ranks of the job, of this group or another, share a GPU, and
    `overlaps` when another group of the same ranks may gather at the same time. `gpu` is the number
    of this rank's GPU. `nccl` are the settings of NCCL, by rank of the group. `ranks_by_limit` is
    how many of its ranks share each limit of memory (cpkit.sync.free_memory).
    `pools` are the group's symmetric pools, by device type. With `samples_pools` they record their
    use over time (`SymmetricPool.samples`).
    """

    rank: int
    size: int
    ranks: tuple[int, ...]
    index: int
    spans_hosts: bool
    process_group: dist.ProcessGroup
    store_exchange: StoreExchange
    shm_barrier: ShmBarrier | None
    owner: OwnerThread
    ranks_on_gpu: int = 0
    shares_gpu: bool = False
    overlaps: bool = False
    gpu: int | None = None
    has_nccl: bool = False
    nccl: Mapping[int, NcclSettings] = field(default_factory=dict, repr=False)
    ranks_by_limit: Mapping[str, int] = field(default_factory=dict, repr=False)
    pools: dict[str, Pool] = field(default_factory=dict, repr=False)
    samples_pools: bool = field(default=False, repr=False)
    last_path: PathReport | None = field(default=None, repr=False)
    checked_calls: dict[object, Any] = field(default_factory=dict, repr=False)

    @eager_only
    def barrier(self) -> None:
        """Wait for all ranks of the group. Raises TimeoutError naming the ranks that are late."""
        self.check_thread()
        if self.shm_barrier:
            self.shm_barrier.barrier()
        else:
            self.exchange(b"")

    @eager_only
    def check(self) -> None:
        """Raise what a kernel of this rank has reported. Local.

        That is a TimeoutError naming a peer that was late, or CallsDiffer naming one that was in
        another call.
        """
        for pool in self.pools.values():
            pool.check()

    def report_failure(self, error: Exception) -> None:
        """Tell the peers why this rank raises in a gather on the CPU. Local.

        They wait for it at the next barrier in shared memory, and raise RankFailed there. After its
        last barrier no peer waits, and after another rank's error they have raised already.
        """
        barrier, others = self.shm_barrier, (TimeoutError, CallsDiffer, RankFailed)
        if barrier and barrier.last_call == EXCHANGE and not isinstance(error, others):
            barrier.fail(describe_error(error))

    def check_thread(self) -> None:
        """Check that this thread uses the group. Raises RuntimeError naming the owner. Local."""
        if self.owner.thread != get_ident():
            self.owner.refuse()

    def check_rank(self, name: str, rank: int) -> None:
        """Check that an argument is a rank of the group. Raises ValueError. Local."""
        if type(rank) is not int or not 0 <= rank < self.size:
            raise ValueError(f"{name} is {rank!r}; the group has ranks 0 to {self.size - 1}")

    def exchange(self, message: bytes) -> list[bytes]:
        """Return the messages of all ranks, up to MAX_MESSAGE_BYTES each, by rank; a barrier."""
        self.check_thread()
        if self.shm_barrier:
            return self.shm_barrier.exchange(message)
        return exchange_over(self.process_group, message, self.size)

    def agreement(self, tensors: object = ()) -> Agreement:
        """Return a `with` block for the checks before a collective over these tensors.

        At its end all ranks continue, or all raise ValueError (see cpkit.sync.agreement), and
        blocks of the pool that all ranks have dropped become free.
        """
        first = tensors[0] if isinstance(tensors, list | tuple) and tensors else None
        pool = self.pools.get(
            first.device.type if type(first) is torch.Tensor else device_type(first)
        )
        return pool.agreement() if pool else Agreement(self.exchange)

    @eager_only
    def cp_all_gather_into_tensor_async(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        stream: torch.cuda.Stream | None = None,
        *,
        agreed: bool = False,
    ) -> None:
        """Gather equal shards into `output`: `[size · rows, …]` from `[rows, …]` on each rank.

        Complete on return for CPU tensors. CUDA tensors are gathered on `stream` (default: the
        current one), which first waits for the current stream; wait for it before reading.

        The ranks agree first, and every rank raises ValueError when shapes or dtypes do not fit.
        `agreed=True` skips that: the caller's ranks have already agreed on this call, and allocated
        `output` after that agreement. Source: SGLang's GroupCoordinator, same name.
        """
        self.check_thread()
        pool = self.pools.get(device_type(input))
        if pool:
            self.last_path = pool.all_gather_into_tensor(output, input, stream, agreed=agreed)
            return
        if not agreed:
            with self.agreement() as call:
                check_stream(stream)
                check_gather(output, input, self.rank, self.size)
                call.must_match(Signature(f"gather {describe(output, input)}"))
        with on_stream(stream, output, input):
            torch_all_gather(output, input, self)
        self.last_path = NO_POOL


@eager_only
def init_context_parallel(cp_size: int, name: str = "default") -> CPGroup:
    """Return this rank's context-parallel group of `cp_size` ranks. Collective over the world.

    Global ranks 0 … cp_size-1 are the first group, the next cp_size the second. Groups are kept by
    size and name, so a second call is cheap. Another name makes other groups, with their own pools,
    for a second thread or stream; these do without NCCL, whose communicators deadlock unless all
    ranks launch in the same order.
    Raises ValueError on every rank when cp_size does not divide the world or an argument differs
    between ranks, and RuntimeError when called before `dist.init_process_group`, or in another
    thread than before.
    """
    world = _world()
    if world.owner.thread != get_ident():
        world.owner.refuse()
    with Agreement(world.exchange) as call:
        _check_size(world, cp_size, name)
        if (cp_size, name) not in world.groups:
            require_descriptors(_DESCRIPTORS_PER_RANK * cp_size + SPARE_DESCRIPTORS)
        call.must_match(Signature(f"init_context_parallel({cp_size!r}, {name!r})"))
    group = world.groups.get((cp_size, name))
    if group is None:
        group = world.groups[cp_size, name] = _make_group(world, cp_size, name)
    _current.set((_generation, group))
    return group


@eager_only
def get_attention_cp_group() -> CPGroup:
    """Return this thread's current group: that of `use_group`, or the last that it initialized.

    Raises RuntimeError without one.
    """
    generation, group = _current.get()
    if group and generation == _generation:
        return group
    raise RuntimeError(
        "this thread has no context-parallel group yet: call init_context_parallel(cp_size), or "
        "enter `with use_group(group)` with a group that was made in another thread"
    )


@contextmanager
def use_group(group: CPGroup) -> Iterator[None]:
    """Use a group in this thread alone, as its current group, until the block ends. Local.

    The rank's GPU is the thread's current device inside; new threads start with GPU 0.
    Other threads get a RuntimeError from their calls with the group until then. Enter the block
    while none of them is inside such a call. Raises RuntimeError while another thread is inside
    `use_group` with this group.
    """
    on_gpu = nullcontext() if group.gpu is None else torch.cuda.device(group.gpu)
    with group.owner.own(), on_gpu:
        token = _current.set((_generation, group))
        try:
            yield
        finally:
            _current.reset(token)


@eager_only
def forget_groups() -> None:
    """Drop all groups and their symmetric memory, so that new ones can be made.

    Call it on every rank after an interrupt or a timeout inside a collective, which leaves the
    ranks of its group out of step. Tensors in symmetric memory stay valid as long as they are held.
    Raises RuntimeError in another thread than that of `init_context_parallel`.
    """
    global _state, _generation
    if _state and _state.owner.thread != get_ident():
        _state.owner.refuse()
    _generation += 1
    if _state:
        for group in _state.groups.values():
            group.pools.clear()
            dist.destroy_process_group(group.process_group)
    _state = None


# ------------------------------------------------------------------------ the batch

_batch_is_symmetric: ContextVar[bool] = ContextVar("batch_is_symmetric", default=True)


def is_allocation_symmetric() -> bool:
    """Return True when this batch has equal sizes on all ranks, as symmetric memory requires."""
    return _batch_is_symmetric.get()


@contextmanager
def batch_symmetry(symmetric: bool) -> Iterator[None]:
    """Declare whether the batch that is processed inside has equal sizes on all ranks.

    SGLang derives this from its data-parallel padding mode. All ranks pass the same value.
    """
    token = _batch_is_symmetric.set(symmetric)
    try:
        yield
    finally:
        _batch_is_symmetric.reset(token)


# ------------------------------------------------------------------------ the world


@dataclass
class _World:
    rank: int
    size: int
    hosts: list[str]
    gpus: list[str]
    nccl: list[NcclSettings]
    store: dist.Store
    store_exchange: StoreExchange
    shm_barrier: ShmBarrier | None
    owner: OwnerThread
    groups: dict[tuple[int, str], CPGroup] = field(default_factory=dict)

    def exchange(self, message: bytes) -> list[bytes]:
        if self.shm_barrier:
            return self.shm_barrier.exchange(message)
        return self.store_exchange.exchange(message, "agree on cp_size")


_state: _World | None = None
_generation = 0
# Of each thread, and of each asyncio task, with the generation in which it was made.
_current: ContextVar[tuple[int, CPGroup | None]] = ContextVar("current_group", default=(0, None))


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
        exchange = StoreExchange(store, f"world{_generation}", rank, size)
        hosts, gpus, nccl = _meet(exchange)
        shm_barrier = None
        if len(set(hosts)) == 1:
            shm_barrier = ShmBarrier(exchange, "make the barrier of the world")
        owner = OwnerThread("init_context_parallel")
        _state = _World(rank, size, hosts, gpus, nccl, store, exchange, shm_barrier, owner)
        if advice := advice_on_idle_gpus(rank, hosts, gpus, torch.cuda.device_count()):
            warnings.warn(advice, stacklevel=3)  # at the call of init_context_parallel
    return _state


def _meet(exchange: StoreExchange) -> tuple[list[str], list[str], list[NcclSettings]]:
    """Return each rank's machine, GPU and NCCL. Raises ValueError on every rank for a bad setting.

    The settings of NCCL are empty on a rank without a GPU.
    """
    states: list[bytes] = []
    with Agreement(lambda m: exchange.exchange(m, "join the job"), on_agreed=states.extend) as call:
        settings.check_shm_dir()
        settings.deadline_s()
        settings.nccl_is_forced()
        call.must_match(Signature("find the ranks of this job"))
        gpu = gpu_id()
        nccl = settings_of_this_process() if gpu and dist.is_nccl_available() else NcclSettings()
        call.state = msgspec.msgpack.encode((host_id(), gpu, nccl))
    found = [msgspec.msgpack.decode(each, type=tuple[str, str, NcclSettings]) for each in states]
    return [host for host, _, _ in found], [gpu for _, gpu, _ in found], [n for _, _, n in found]


@cache
def host_id() -> str:
    """Return text that is equal on ranks that can share memory: boot id and device of `shm_dir()`.

    `CPKIT_HOST_ID` replaces it, so that one machine can simulate several.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = boot.read_text().strip() if boot.exists() else platform.node()
    return settings.host_id() or f"{machine}/{settings.shm_dir().stat().st_dev}"


def _check_size(world: _World, cp_size: int, name: str) -> None:
    divisors = [n for n in range(1, world.size + 1) if world.size % n == 0]
    if type(cp_size) is not int or cp_size not in divisors:
        problem = "must divide" if type(cp_size) is int else "must be a whole number that divides"
        raise ValueError(
            f"cp_size is {cp_size!r:.80}, and it {problem} the {world.size} ranks of this job: "
            f"use one of {', '.join(map(str, divisors))}, or start another number of ranks"
        )
    if not isinstance(name, str) or len(name) > _LONGEST_NAME:
        raise ValueError(
            f"name is {name!r:.80}; it must be text of up to {_LONGEST_NAME} characters, for "
            f"example 'default'"
        )


def _make_group(world: _World, cp_size: int, name: str) -> CPGroup:
    all_ranks = [tuple(range(first, first + cp_size)) for first in range(0, world.size, cp_size)]
    # Making a group is collective over the world, so all groups have the same backend.
    share_gpu = any(len({world.gpus[r] for r in ranks}) < cp_size for ranks in all_ranks)
    has_nccl = name == "default" and _nccl_is_possible(world, share_gpu)
    if has_nccl:
        for ranks in all_ranks:
            check_versions({rank: world.nccl[rank] for rank in ranks})
    backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    made: list[Any] = [  # torch also declares what only ranks outside a group get
        dist.new_group(
            list(ranks), backend=backend, timeout=timedelta(seconds=settings.deadline_s())
        )
        for ranks in all_ranks
    ]
    index, rank = divmod(world.rank, cp_size)
    ranks = all_ranks[index]
    gpu, gpus = world.gpus[world.rank], [each for each in world.gpus if each]
    spans_hosts = len({world.hosts[r] for r in ranks}) > 1
    suffix = "" if name == "default" else f".{name}"
    # A thread that waits in a store's client keeps others out of it, and the peers may need those.
    store = world.store.clone()  # type: ignore[attr-defined, unused-ignore] # torch 2.14 declares it
    exchange = StoreExchange(store, f"cp{cp_size}.{index}.{_generation}{suffix}", rank, cp_size)
    shm_barrier = None
    if not spans_hosts:
        shm_barrier = ShmBarrier(exchange, f"make the barrier of cp_size {cp_size}")
    return CPGroup(
        rank,
        cp_size,
        ranks,
        index,
        spans_hosts,
        made[index],
        exchange,
        shm_barrier,
        OwnerThread(f"group {exchange.name}"),
        ranks_on_gpu=world.gpus.count(gpu) if gpu else 0,
        shares_gpu=len(set(gpus)) < len(gpus),
        overlaps=name != "default",
        gpu=torch.cuda.current_device() if gpu else None,
        has_nccl=has_nccl,
        nccl={number: world.nccl[r] for number, r in enumerate(ranks)},
        ranks_by_limit=exchange.ranks_by_limit,
    )


def _nccl_is_possible(world: _World, share_gpu: bool) -> bool:
    """Return True when NCCL can be used, which accepts one rank per GPU of a host.

    `CPKIT_NCCL=1` uses it anyway; then every rank needs its own NCCL_HOSTID.
    """
    if not all(each.version for each in world.nccl):
        return False
    return not share_gpu or settings.nccl_is_forced()
