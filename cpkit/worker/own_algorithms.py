"""Algorithms of the user: load the functions of a file, and verify each before it is offered.

    launch_workers.sh --algorithms ring.py

    every rank   read the file ─ agree on its digest ─ run it ─ check names and signatures
                 gather stamped rows with each function, and compare every bit
                 all are right: add them to the table;  one is wrong: all ranks end

With a wrong function the workers do not start: a rank that raised or hangs inside a gather has left
its peers in it, and their user asked for this function.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import NoReturn, get_args

import msgspec
import torch
import torch.distributed as dist

from cpkit import provenance
from cpkit.algorithms import all_choices
from cpkit.control.messages import Workload
from cpkit.control.module_file import read_module
from cpkit.control.requests import OtherCall
from cpkit.control.runtime_dir import Death, RuntimeDir, write_private
from cpkit.gather import Gather, Gathered, Memory, Tensors, add_gather
from cpkit.group import CPGroup, forget_groups, init_context_parallel
from cpkit.layout import ContextParallelMetadata
from cpkit.memory.path import PathName, PathReport
from cpkit.settings import deadline_s
from cpkit.sync.barrier import RankFailed
from cpkit.sync.exchange import StoreExchange
from cpkit.worker.gather import poison_pool
from cpkit.worker.workload import prepare

REFUSED_CODE = 72
_GRACE_S = 1.0
_MODULE = "cpkit_own_algorithms"
_log = logging.getLogger("cpkit")


def load(file: str, store: dist.Store, runtime_dir: RuntimeDir) -> str:
    """Add the algorithms of a file on all ranks; return its digest, "" without a file. Collective.

    Does not return when a function, or the file of any rank, is wrong.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    start = _Start(file, store, runtime_dir)
    try:
        with start.step("loading"):
            source, digest = read_module(file) if file else (b"", "")
            exchange = StoreExchange(store, "algorithms", rank, size)
            mine = f"{file or 'none'} {digest}".encode()
            _check_digests(exchange.exchange(mine, "compare their algorithms"))
            functions = _functions(file, source) if file else {}
        for name, function in functions.items():
            add_gather(name, _checked(function))
            for cp_size in [n for n in range(size, 0, -1) if size % n == 0]:
                runtime_dir.set_startup_phase(f"rank {rank}", f"verifying {name} on {cp_size}")
                group = init_context_parallel(cp_size)
                for workload in _workloads(name, group):  # in all groups: none waits idle
                    with start.step(f"{name} ({_describe(workload)})"):
                        _verify(workload, group)
            add_gather(name, function)
        if functions:
            init_context_parallel(1)  # after this exchange, every rank has verified all functions
            forget_groups()
    except BaseException as error:  # noqa: BLE001 - the user's code can raise anything
        start.refuse(error)
    return digest


def _check_digests(files: Sequence[bytes]) -> None:
    """Raise ValueError unless all ranks have the same content."""
    ranks: dict[str, list[str]] = {}
    for rank, file in enumerate(files):
        ranks.setdefault(file.decode(), []).append(str(rank))
    if len({file.rpartition(" ")[2] for file in ranks}) > 1:
        listed = "; ".join(f"rank(s) {', '.join(who)}: {file}" for file, who in ranks.items())
        raise ValueError(f"nodes have different files ({listed}); pass copies of one on every node")


def _functions(file: str, source: bytes) -> dict[str, Gather]:
    """Run the file; return the functions in `__all__`, or else the public ones it defines."""
    module = ModuleType(_MODULE)
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses look for it there
    exec(compile(source, file, "exec"), vars(module))  # noqa: S102 - the user's file, as a script
    defined = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    ]
    names = getattr(module, "__all__", defined)
    if not isinstance(names, list | tuple) or not all(map(_is_identifier, names)):
        raise ValueError(f"__all__ is {names!r:.200}; it must be a list of names of functions")
    if not names:
        raise ValueError("it defines no public function, so there is no algorithm to add")
    return {name: _function(name, getattr(module, name, None)) for name in names}


def _is_identifier(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier()


def _function(name: str, function: object) -> Gather:
    """Return a function that can be added under this name. Raises ValueError."""
    taken = (*all_choices(), *get_args(OtherCall))
    if name in taken or name.startswith("_"):
        raise ValueError(
            f"{name!r} cannot be the name of an algorithm: choose one that does not begin with _ "
            f"and is none of {', '.join(taken)}"
        )
    if not inspect.isroutine(function):
        raise ValueError(f"__all__ has {name!r}, which is {function!r:.80} and no function")
    signature = inspect.signature(function)
    try:
        signature.bind(None, None, None)
    except TypeError:
        raise ValueError(
            f"{name}{signature} has a wrong signature: an algorithm is called as {name}(tensors, "
            f"metadata, memory), like those of cpkit.gather. Begin the name of a helper with _, or "
            f"list the algorithms in __all__"
        ) from None
    return function


def _checked(function: Gather) -> Gather:
    """Return the function with a check of what it returns."""

    def gather(tensors: Tensors, metadata: ContextParallelMetadata, memory: Memory) -> Gathered:
        wanted = [((metadata.total_tokens, *x.shape[1:]), x.dtype, x.device) for x in tensors]
        match function(tensors, metadata, memory):
            case [[*outputs], PathReport() as path] if all(map(torch.is_tensor, outputs)):
                got = [(tuple(x.shape), x.dtype, x.device) for x in outputs]
                if got == wanted:
                    _check_path(path)
                    return outputs, path
                raise ValueError(f"it returned tensors of {got}; they must be {wanted}")
            case other:
                raise ValueError(
                    f"it returned {other!r:.200}; it must return (outputs, path): one tensor per "
                    f"input in a list, and a PathReport, such as memory.all_gather returns"
                )

    return gather


def _check_path(path: PathReport) -> None:
    """Check the fields of a report that the user made. Raises ValueError."""
    try:
        msgspec.convert(msgspec.to_builtins(path), PathReport)
    except (TypeError, msgspec.ValidationError) as error:
        paths = ", ".join(map(repr, get_args(PathName)))
        raise ValueError(
            f"its PathReport is wrong ({error}): path must be one of {paths}, and the other three "
            f"fields must be text"
        ) from None


def _workloads(name: str, group: CPGroup) -> Iterator[Workload]:
    """Yield batches in which the ranks have different numbers of rows, or none.

    Their types have no NaN, which is not equal to itself.
    """
    cp = group.size
    for symmetric in (False,) if group.spans_hosts else (True, False):
        yield Workload(cp, (2 * cp, 4097), "zigzag", name, symmetric, 2, 8, "uint8", 2)
        yield Workload(cp, (1, cp + 1), "interleave", name, symmetric, 1, 3, "int16", 1)
        yield Workload(cp, (1,), "contiguous", name, symmetric, 1, 8, "uint8", 3)


def _describe(workload: Workload) -> str:
    lengths, shape = list(workload.lengths), [workload.heads, workload.head_dim]
    return (
        f"cp_size {workload.cp_size}, {workload.strategy}, lengths {lengths}, "
        f"rows of {shape} {workload.dtype}, symmetric={workload.symmetric}"
    )


def _verify(workload: Workload, group: CPGroup) -> None:
    """Compare two gathers bit by bit, then the first result and the rows again. Collective."""
    results = []
    for round_number in (1, 2):
        run = prepare(workload, group, round_number)
        rows = [x.clone() for x in run.tensors]
        poison_pool(run)
        torch.set_deterministic_debug_mode("warn")  # torch.empty is then filled, with 0xff if uint8
        results.append(run.verified_gather())
        torch.set_deterministic_debug_mode("default")
        if not all(map(torch.equal, rows, run.tensors)):
            raise ValueError("it has changed its input tensors")
    for number, tensor in enumerate(results[0]):
        if provenance.explain_mismatch(tensor, run.metadata, round=1, tensor=number):
            raise ValueError("it returned memory that its next call has overwritten")


def raised_at(error: BaseException) -> str:
    """Return which line of the user's file raised, or called what did, as ", at …"; or ""."""
    line = _line(traceback.extract_tb(error.__traceback__))
    return f", at {line}" if line else ""


def _line(frames: traceback.StackSummary) -> str:
    """Return the last line of the user's file among these frames; "" if there is none."""
    file = getattr(sys.modules.get(_MODULE), "__file__", None)
    inside = [frame for frame in frames if frame.filename == file]
    return f"line {inside[-1].lineno} of {inside[-1].name}: {inside[-1].line}" if inside else ""


class _Start:
    """The steps of a start on this rank, and the report of the one that fails.

    All ranks report what the first one has stored in the job's store.
    """

    def __init__(self, file: str, store: dist.Store, runtime_dir: RuntimeDir) -> None:
        # A connection of its own: one that waits keeps other threads waiting.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]
        self._file, self._runtime_dir, self._rank = file, runtime_dir, dist.get_rank()
        self._step, self._began_s, self._main = "", 0.0, threading.get_ident()

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Name the step in reports, and report it if it takes longer than `deadline_s()`."""
        self._step, self._began_s = what, time.monotonic()
        timer = threading.Timer(deadline_s(), self._report_hang)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def refuse(self, error: BaseException) -> NoReturn:
        """End the workers because of an exception of this rank."""
        is_late = time.monotonic() - self._began_s > deadline_s() / 2
        if is_late or isinstance(error, RankFailed):
            time.sleep(3 * _GRACE_S)  # for the report of the peer that caused it
        kind = (
            ""
            if isinstance(error, ValueError | provenance.ProvenanceError)
            else f"{type(error).__name__}: "
        )
        self._end(f"{kind}{error}{raised_at(error)}")

    def _report_hang(self) -> None:
        """Report where each rank is; several may wait for the one that hangs."""
        stack = traceback.extract_stack(sys._current_frames()[self._main])
        line = _line(stack) or f"{stack[-1].name} of cpkit"
        self._store.set(f"cpkit/algorithms/{self._rank}", f"rank {self._rank} is at {line}")
        time.sleep(_GRACE_S)
        keys = [f"cpkit/algorithms/{rank}" for rank in range(dist.get_world_size())]
        lines = [self._store.get(key).decode() for key in keys if self._store.check([key])]
        self._end(f"it has not returned after {deadline_s():g} s; {'; '.join(lines)}")

    def _end(self, what: str) -> NoReturn:
        """Store the cause of the end for this node's agent, and exit; the agent ends the others."""
        mine = (
            f"{self._file or '--algorithms'}: {self._step}, on rank {self._rank}: {what}. Correct "
            f"the file and start the workers again, or start them without --algorithms"
        )
        _log.error("exiting: %s", mine)
        try:
            cause = self._store.compare_set("cpkit/algorithms/fault", "", mine).decode()
            death = Death(self._rank, os.getpid(), None, cause, ())
            write_private(self._runtime_dir.hang_file, death)
        finally:
            os._exit(REFUSED_CODE)
