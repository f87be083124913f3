"""Gathers in real processes, on 2, 4 and 3 ranks, because powers of two hide mistakes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence

import pytest

from tests.helpers.launch import LIMIT_S, MODULES, SLOW_MODULES, assert_passed_together

pytestmark = [pytest.mark.workers, pytest.mark.timeout(LIMIT_S + 120)]


def checks(module: str) -> list[str]:
    found = vars(importlib.import_module(f"tests.ranks.{module}"))
    return [name for name in found if name.startswith("check_")]


def parameters(launches: Mapping[int, Sequence[str]]) -> Iterator[object]:
    for nproc, modules in launches.items():
        for module in modules:
            for check in checks(module):
                name = f"{nproc}-{module}-{check.removeprefix('check_')}"
                yield pytest.param(modules, nproc, check, id=name)


@pytest.mark.parametrize(("modules", "nproc", "check"), [*parameters(MODULES)])
def test_ranks(modules: Sequence[str], nproc: int, check: str) -> None:
    assert_passed_together(modules, nproc, check)


@pytest.mark.slow("mutants, and the same checks with other numbers of ranks")
@pytest.mark.parametrize(("modules", "nproc", "check"), [*parameters(SLOW_MODULES)])
def test_other_ranks(modules: Sequence[str], nproc: int, check: str) -> None:
    assert_passed_together(modules, nproc, check)


@pytest.mark.parametrize("nproc", MODULES)
def test_every_check_has_a_unique_name(nproc: int) -> None:
    """The results of one launch are stored by name."""
    names = [check for module in MODULES[nproc] for check in checks(module)]
    assert len(names) == len(set(names))
