"""Gathers in real processes, on 2, 4 and 3 ranks, because powers of two hide mistakes."""

from __future__ import annotations

import importlib

import pytest

from tests.helpers.launch import LIMIT_S, MODULES, assert_passed_together

pytestmark = [pytest.mark.workers, pytest.mark.timeout(LIMIT_S + 120)]


def checks(module: str) -> list[str]:
    found = vars(importlib.import_module(f"tests.ranks.{module}"))
    return [name for name in found if name.startswith("check_")]


@pytest.mark.parametrize(
    ("nproc", "module", "check"),
    [
        pytest.param(nproc, module, check, id=f"{nproc}-{module}-{check.removeprefix('check_')}")
        for nproc, modules in MODULES.items()
        for module in modules
        for check in checks(module)
    ],
)
def test_ranks(nproc: int, module: str, check: str) -> None:
    assert_passed_together(module, nproc, check)


@pytest.mark.parametrize("nproc", MODULES)
def test_every_check_has_a_unique_name(nproc: int) -> None:
    """The results of one launch are stored by name."""
    names = [check for module in MODULES[nproc] for check in checks(module)]
    assert len(names) == len(set(names))
