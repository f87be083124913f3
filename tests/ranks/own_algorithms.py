"""The verification of a user's algorithm passes right functions, and names each fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from cpkit import gather
from cpkit.gather import Gather, Gathered, direct, padded
from cpkit.group import init_context_parallel
from cpkit.worker import own_algorithms
from tests.helpers import ROOT

Change = Callable[[list[torch.Tensor]], object]
_kept: list[torch.Tensor] = []


def after(change: Change) -> Gather:
    """Return `padded` whose outputs are changed afterwards, or replaced by what is returned."""

    def faulty(tensors, metadata, memory) -> Gathered:
        outputs, path = padded(tensors, metadata, memory)
        changed = change(outputs)
        return (outputs if changed is None else changed), path

    return faulty


def swap_rows(outputs: list[torch.Tensor]) -> None:
    outputs[-1][[0, -1]] = outputs[-1][[-1, 0]]


def leave_out_a_row(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    fresh = [torch.empty_like(x) for x in outputs]
    for new, old in zip(fresh, outputs, strict=True):
        new[:-1] = old[:-1]
    return fresh


def leave_out_a_row_in_the_pool(tensors, metadata, memory) -> Gathered:
    outputs, path = padded(tensors, metadata, memory)
    fresh = [memory.empty(x.shape, x.dtype) for x in outputs]
    for new, old in zip(fresh, outputs, strict=True):
        new[:-1] = old[:-1]
    return fresh, path


def use_the_same_memory(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    _kept[:] = _kept or outputs
    return [old.copy_(new) for old, new in zip(_kept, outputs, strict=True)]


def change_the_input(tensors, metadata, memory) -> Gathered:
    gathered = padded(tensors, metadata, memory)
    for x in tensors:
        x.zero_()
    return gathered


FAULTY: dict[str, tuple[Gather, str]] = {
    "swaps rows": (after(swap_rows), "slot 0 .* holds round 1, .* token .*; expected round 1"),
    "leaves out a row": (after(leave_out_a_row), r"0xffffffffffffffff \(no stamp\)"),
    "leaves out a row in the pool": (leave_out_a_row_in_the_pool, r"poison \(never written\)"),
    "converts": (after(lambda xs: [x.view(torch.int8) for x in xs]), "torch.int8.*must be .*uint8"),
    "flattens": (after(lambda xs: [x.flatten(1) for x in xs]), "returned tensors of .* must be"),
    "forgets a tensor": (after(lambda xs: xs[:1]), "returned tensors of .* must be"),
    "returns numbers": (after(lambda xs: [0] * len(xs)), r"it must return \(outputs, path\)"),
    "returns a tensor": (after(lambda xs: xs[0]), r"it must return \(outputs, path\)"),
    "returns no path": (lambda *args: padded(*args)[0], r"it must return \(outputs, path\)"),
    "uses memory again": (after(use_the_same_memory), "its next call has overwritten"),
    "changes its input": (change_the_input, "it has changed its input"),
}


def verify(function: Gather) -> str:
    """Verify the first workload; return the error, or ""."""
    group = init_context_parallel(dist.get_world_size())
    gather.add_gather("mine", own_algorithms._checked(function))
    workload = next(own_algorithms._workloads("mine", group))
    try:
        own_algorithms._verify(workload, group)
    except Exception as error:  # noqa: BLE001 - the caller compares it
        return str(error)
    finally:
        torch.set_deterministic_debug_mode("default")
    return ""


def check_each_fault_is_named() -> None:
    for name, (function, words) in FAULTY.items():
        problem = verify(function)
        assert re.search(words, problem), f"{name}: {problem!r}"


def check_right_functions_pass() -> None:
    file = Path(ROOT) / "examples" / "ring.py"
    (ring,) = own_algorithms._functions(str(file), file.read_bytes()).values()
    for function in (padded, direct, ring):
        assert verify(function) == ""


def check_an_algorithm_gets_ordinary_memory_where_symmetric_memory_is_not_possible() -> None:
    """The built-in ones run as `padded` there instead."""
    seen = []

    def mine(tensors, metadata, memory) -> Gathered:
        seen.append(memory.is_symmetric)
        return padded(tensors, metadata, memory)

    group = init_context_parallel(dist.get_world_size())
    gather.add_gather("mine", mine)
    for workload in own_algorithms._workloads("mine", group):
        own_algorithms._verify(workload, group)
    assert seen == [True] * 6 + [False] * 6
