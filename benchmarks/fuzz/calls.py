"""Make one random call of cpkit on this rank, and compare every bit with the oracle."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.fuzz.case import Case, Kind
from benchmarks.fuzz.oracle import Oracle, poison_of
from benchmarks.fuzz.views import CARRIERS, bytes_of, laid_out, tensor_of
from cpkit.gather import (
    all_gather_kv,
    cp_all_gather_reorganized_into_tensor_kv_cache,
    cp_all_gather_rerange_kv_cache,
)
from cpkit.group import CPGroup, batch_symmetry, init_context_parallel
from cpkit.layout import ContextParallelMetadata, prepare_context_parallel_metadata
from cpkit.memory.pool import SymmetricPool
from cpkit.plan import plan_gather_kv
from cpkit.symm import use_symmetric_memory

_ARENA_BYTES = 4 << 20
Arguments = dict[str, Any]


class Wrong(AssertionError):
    """A result that differs from the oracle, or bad arguments that were accepted."""


class RankCase:
    """One case on this rank. `views` are the layouts of the tensors that were passed."""

    def __init__(self, case: Case) -> None:
        self.case, self.group = case, init_context_parallel(case.cp_size)
        self.pool = small_pool(self.group)
        self.oracle = Oracle(case, self.group.index)
        self.rng = random.Random(f"rank {case.seed} {self.group.index} {self.group.rank}")
        self.metadata = prepare_context_parallel_metadata(case.lengths, case.cp_size, case.strategy)
        self.views: list[str] = []
        self.problem = ""

    def run(self) -> None:
        """Make the calls and check their results. Raises Wrong.

        A wrong result is raised at the end, because the peers wait in the calls that are left.
        """
        case = self.case
        with batch_symmetry(case.symmetric), filled_memory(case.poisons_ordinary):
            self._check_layout()
            if case.fault:
                self._check_refused()
            if case.call == "plan":
                self._check_plan()
            else:
                self._check_calls()
        if self.problem:
            raise Wrong(self.problem)

    # ------------------------------------------------------------------ the calls

    def _check_calls(self) -> None:
        """Make all calls, keep some results, and check them all, then those that were kept."""
        kept: list[tuple[int, list[torch.Tensor]]] = []
        for gather in range(self.case.gathers):
            inputs = self._inputs(gather)
            self.pool.poison_free()
            results = self._call(inputs)
            self._check(gather, results)
            if self.rng.random() < 0.5:
                kept.append((gather, results))
        if self.case.call != "into":  # caches are overwritten by the next gather
            for gather, results in kept:
                self._check(gather, results)

    def _call(self, inputs: list[torch.Tensor], **wrong: Any) -> list[torch.Tensor]:
        """Make the call of this case; `wrong` replaces arguments."""
        case = self.case
        if case.call in ("rank_order", "token_order"):
            return [self._sglang(inputs[0], **wrong)]
        if case.call == "shards":
            return [self._shards(inputs[0], **wrong)]
        arguments: Arguments = {
            "tensors": inputs,
            "metadata": self.metadata,
            "group": self.group,
            "algorithm": case.algorithm,
        }
        if case.call == "into":
            arguments |= {"into": self._caches(), "slots": torch.from_numpy(self.oracle.slots())}
        return all_gather_kv(**{**arguments, **wrong})

    def _sglang(self, x: torch.Tensor, **wrong: Any) -> torch.Tensor:
        needed = self.metadata.max_rank_len[0] * self.group.size
        arguments = {
            "input_tensor": x,
            "total_len": needed,
            "cp_size": self.group.size,
            "forward_batch": SimpleNamespace(attn_cp_metadata=self.metadata),
        }
        in_rank_order = self.case.call == "rank_order"
        call = (
            cp_all_gather_reorganized_into_tensor_kv_cache
            if in_rank_order
            else cp_all_gather_rerange_kv_cache
        )
        return call(**{**arguments, **wrong})

    def _shards(self, x: torch.Tensor, **wrong: Any) -> torch.Tensor:
        case, kind = self.case, self.case.kinds[0]
        output = self._poisoned(self.oracle.total, kind, in_pool=case.output_in_pool)
        if case.in_place and not case.fault:
            own = output[len(x) * self.group.rank :][: len(x)]
            _carrier(own).copy_(_carrier(x.resolve_conj().resolve_neg()))
            x = own
        arguments = {"output": output, "input": x, **wrong}
        self.group.cp_all_gather_into_tensor_async(**arguments)
        return output

    def _check_plan(self) -> None:
        inputs = self._inputs(0)
        self.pool.poison_free()
        keep = self.case.keep
        plan = plan_gather_kv(
            inputs, self.metadata, self.group, algorithm=self.case.algorithm, keep=keep
        )
        valid: list[tuple[int, list[torch.Tensor]]] = []
        for gather in range(self.case.gathers):
            for number, (x, kind) in enumerate(zip(inputs, self.case.kinds, strict=True)):
                rows = self.oracle.mine(gather, number, self.group.rank)
                _carrier(x).copy_(tensor_of(rows, kind))
            valid = [*valid, (gather, plan())][-keep:]
            for earlier, results in valid:
                self._check(earlier, results)

    # --------------------------------------------------------------- the arguments

    def _inputs(self, gather: int) -> list[torch.Tensor]:
        inputs = []
        for number, kind in enumerate(self.case.kinds):
            rows = self.oracle.mine(gather, number, self.group.rank)
            if kind.in_pool:
                view, x = "in the pool", self._in_pool(rows, kind)
            else:
                contiguous = self.case.call == "plan"
                view, x = laid_out(rows, kind, self.rng, contiguous=contiguous)
            self.views.append(view)
            inputs.append(x)
        return inputs

    def _in_pool(self, rows: np.ndarray[Any, Any], kind: Kind) -> torch.Tensor:
        most = max(map(len, self.oracle.held))
        with use_symmetric_memory(self.group):
            buffer = torch.empty(most, *kind.trailing, dtype=CARRIERS[kind.dtype.itemsize])
        return buffer[: len(rows)].copy_(tensor_of(rows, kind)).view(kind.dtype)

    def _caches(self) -> list[torch.Tensor]:
        case = self.case
        in_pool = case.output_in_pool or (case.symmetric and case.algorithm == "direct")
        rows = self.oracle.cache_rows
        return [self._poisoned(rows, kind, in_pool=in_pool) for kind in case.kinds]

    def _poisoned(self, rows: int, kind: Kind, *, in_pool: bool) -> torch.Tensor:
        with use_symmetric_memory(self.group, disabled=not in_pool):
            x = torch.empty(rows, *kind.trailing, dtype=CARRIERS[kind.dtype.itemsize])
        if x.numel():
            x.view(-1).view(torch.uint8).fill_(int(poison_of(kind)))
        return x.view(kind.dtype)

    # ------------------------------------------------------------------ the checks

    def _check(self, gather: int, results: list[torch.Tensor]) -> None:
        for number, (x, kind) in enumerate(zip(results, self.case.kinds, strict=True)):
            into = self.case.call == "into"
            want = (self.oracle.cache if into else self.oracle.result)(gather, number)
            if x.dtype != kind.dtype or tuple(x.shape) != (len(want), *kind.trailing):
                problem = f"{list(x.shape)} {x.dtype}; expected {len(want)} rows"
            else:
                problem = self.oracle.difference(bytes_of(x), want, number)
            if problem and not self.problem:
                about = f"{kind.dtype} {list(kind.trailing)}"
                self.problem = f"gather {gather}, tensor {number} ({about}): {problem}"

    def _check_layout(self) -> None:
        if self.case.call == "shards":
            return
        held = self.oracle.held
        got = [self.metadata.rank_rows(rank).tolist() for rank in range(self.case.cp_size)]
        if got != held:
            raise Wrong(f"the layout is {got}; expected {held}")
        most = (max(map(len, held)),) * self.case.cp_size
        if self.metadata.max_rank_len != most:
            raise Wrong(f"max_rank_len is {self.metadata.max_rank_len}; expected {most}")

    def _check_refused(self) -> None:
        """Check that every rank raises ValueError when one rank passes bad arguments."""
        inputs = self._inputs(0)
        is_bad = self.group.rank == self.case.bad_rank
        with batch_symmetry(is_allocation_symmetric_here(self.case, is_bad=is_bad)):
            arguments = bad_arguments(self, inputs) if is_bad else {}
            try:
                self._plan(inputs, **arguments) if self.case.call == "plan" else self._call(
                    inputs, **arguments
                )
            except ValueError as error:
                if len(str(error)) < 20:
                    raise Wrong(f"the message for {self.case.fault!r} is {error!s}") from error
                return
        raise Wrong(f"{self.case.fault!r} on rank {self.case.bad_rank} was accepted")

    def _plan(self, inputs: list[torch.Tensor], **wrong: Any) -> object:
        arguments: Arguments = {
            "tensors": inputs,
            "metadata": self.metadata,
            "group": self.group,
            "algorithm": self.case.algorithm,
            "keep": self.case.keep,
        }
        return plan_gather_kv(**{**arguments, **wrong})


# ----------------------------------------------------------------------- bad arguments


def bad_arguments(at: RankCase, inputs: list[torch.Tensor]) -> Arguments:
    """Return the arguments that this case's fault replaces."""
    fault, call = at.case.fault, at.case.call
    first = inputs[0]
    tensors: dict[str, Callable[[], Any]] = {
        "rows": lambda: torch.zeros(len(first) + 1, *first.shape[1:]).to(torch.uint8),
        "sparse": lambda: torch.zeros(len(first), 3).to_sparse(),
        "no tensor": lambda: None,
        "grad": lambda: torch.zeros(len(first), 3, requires_grad=True),
        "meta": lambda: first.to("meta"),
        "dtype": lambda: torch.zeros(first.shape, dtype=_another(first.dtype)),
        "trailing": lambda: torch.zeros(*first.shape, 2).to(torch.uint8),
        "strided": lambda: torch.zeros(len(first), 3, 2)[..., 0],
    }
    if fault in tensors:
        bad = tensors[fault]()
        if call in ("gather", "into", "plan"):
            return {"tensors": [bad, *inputs[1:]]}
        return {"input" if call == "shards" else "input_tensor": bad}
    slots = torch.from_numpy(at.oracle.slots())
    others: dict[str, Callable[[], Arguments]] = {
        "algorithm": lambda: {"algorithm": "fastest"},
        "empty list": lambda: {"tensors": []},
        "stream": lambda: {"stream": "x"},
        "lengths": lambda: {"metadata": _other_layout(at.metadata)},
        "symmetry": dict,
        "keep": lambda: {"keep": 0},
        "cp_size": lambda: {"cp_size": at.case.cp_size + 1},
        "total_len": lambda: {"total_len": 0},
        "no slots": lambda: {"slots": None},
        "slot too large": lambda: {"slots": torch.full_like(slots, at.oracle.cache_rows)},
        "slot twice": lambda: {"slots": torch.zeros(at.oracle.total + 1, dtype=torch.int64)},
        "slots differ": lambda: {"slots": _other_slots(slots, at.oracle.cache_rows)},
        "cache shape": lambda: {"into": [torch.zeros(at.oracle.total, 99) for _ in inputs]},
        "output": lambda: {"output": torch.zeros(0, 5)},
    }
    return others[fault]()


def is_allocation_symmetric_here(case: Case, *, is_bad: bool) -> bool:
    """Return what this rank declares; the fault "symmetry" is another value on one rank."""
    return case.symmetric != (is_bad and case.fault == "symmetry")


def _other_layout(metadata: ContextParallelMetadata) -> ContextParallelMetadata:
    lengths = [*metadata.lengths, 2 * metadata.cp_size]
    return prepare_context_parallel_metadata(lengths, metadata.cp_size, metadata.strategy)


def _other_slots(slots: torch.Tensor, rows: int) -> torch.Tensor:
    """Return slots that are valid, and differ in the last token: its row, or -1."""
    other = slots.clone()
    free = sorted(set(range(rows)) - set(slots.tolist()))
    other[-1] = free[0] if int(slots[-1]) == -1 else -1
    return other


def _another(dtype: torch.dtype) -> torch.dtype:
    return torch.int16 if dtype != torch.int16 else torch.float32


# ------------------------------------------------------------------------------ memory


def _carrier(x: torch.Tensor) -> torch.Tensor:
    return x.view(CARRIERS[x.dtype.itemsize])


def small_pool(group: CPGroup) -> SymmetricPool:
    """Return the group's pool; make a small one at first and after it has grown. Collective."""
    pool = group.pools.get("cpu")
    if isinstance(pool, SymmetricPool) and pool.stats().spill_bytes == 0:
        return pool
    return SymmetricPool(group, _ARENA_BYTES, "cpu")


@contextmanager
def filled_memory(on: bool) -> Iterator[None]:
    """Let torch fill the ordinary memory that it allocates with a known pattern, if `on`."""
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
