"""Random cases of benchmarks.fuzz, which has the long form of this test."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator

import torch.distributed as dist

from benchmarks.fuzz.case import Case, draw
from benchmarks.fuzz.ranks import Done, run_cases, seeds_from
from cpkit.group import init_context_parallel

CASES = {2: 150, 3: 80, 4: 50}  # about two seconds each on two cores


def run(cases: int, wanted: Callable[[Case], bool] = lambda case: True) -> Done:
    """Run the first cases that are wanted, up to the first one that fails."""
    world = dist.get_world_size()

    def seeds() -> Iterator[int]:
        left = cases
        for seed in seeds_from(0, world):
            if wanted(draw(seed)):
                yield seed
                left -= 1
            if not left:
                return

    warnings.filterwarnings("ignore", message="ComplexHalf")
    harness = init_context_parallel(world, "harness")
    return run_cases(seeds(), harness, 10**9, time.monotonic() + 1000, None)


def check_random_cases_are_bit_exact() -> None:
    done = run(CASES[dist.get_world_size()])
    assert not done.failures, "\n".join(
        f"seed {each['seed']}: {each['problem']}\n{each['case']}" for each in done.failures
    )
    assert done.refused > 0


def check_every_dtype_is_gathered_from_strided_rows() -> None:
    """torch cannot copy int4 and the like, so the rows are copied as integers of their size."""

    def is_odd(case: Case) -> bool:
        names = {str(kind.dtype) for kind in case.kinds}
        odd = ("torch.int4", "torch.uint1", "torch.bits", "torch.bcomplex")
        return any(name.startswith(odd) for name in names)

    assert not run(12, is_odd).failures


def check_caches_without_elements_are_accepted() -> None:
    """They have no place in a pool, and no row is stored in them."""

    def is_empty(case: Case) -> bool:
        return case.call == "into" and any(0 in kind.trailing for kind in case.kinds)

    assert not run(10, is_empty).failures
