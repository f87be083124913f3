"""Gathers in real processes, for 2, 4 and 3 ranks: powers of two hide mistakes."""

from __future__ import annotations

import pytest

from tests.launch import assert_passed
from tests.ranks import caches, crossed, gathers, groups, mutants, plans, signals, symmetric, waits

pytestmark = pytest.mark.workers


def checks(module: object) -> list[str]:
    return [name for name in vars(module) if name.startswith("check_")]


@pytest.mark.parametrize("nproc", [2, 3, 4])
@pytest.mark.parametrize("check", checks(gathers))
def test_gathers(check: str, nproc: int) -> None:
    assert_passed("tests.ranks.gathers", nproc, check)


@pytest.mark.parametrize("nproc", [2, 3])
@pytest.mark.parametrize("check", checks(caches))
def test_caches(check: str, nproc: int) -> None:
    assert_passed("tests.ranks.caches", nproc, check)


@pytest.mark.parametrize("nproc", [4])
@pytest.mark.parametrize("check", checks(groups))
def test_groups(check: str, nproc: int) -> None:
    assert_passed("tests.ranks.groups", nproc, check)


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("check", checks(symmetric))
def test_symmetric_memory(check: str, nproc: int) -> None:
    assert_passed("tests.ranks.symmetric", nproc, check)


@pytest.mark.parametrize("nproc", [2, 3])
@pytest.mark.parametrize("check", checks(signals))
def test_signals(check: str, nproc: int) -> None:
    assert_passed("tests.ranks.signals", nproc, check)


@pytest.mark.parametrize("check", checks(mutants))
def test_planted_bugs_are_seen(check: str) -> None:
    assert_passed("tests.ranks.mutants", 3, check)


@pytest.mark.parametrize("nproc", [2, 3])
@pytest.mark.parametrize("check", checks(plans))
def test_plans(check: str, nproc: int) -> None:
    assert_passed("tests.ranks.plans", nproc, check)


@pytest.mark.parametrize("nproc", [2, 3])
@pytest.mark.parametrize("check", checks(crossed))
def test_ranks_in_different_calls(check: str, nproc: int) -> None:
    assert_passed("tests.ranks.crossed", nproc, check)


@pytest.mark.parametrize("nproc", [2, 4])
@pytest.mark.parametrize("check", checks(waits))
def test_waits(check: str, nproc: int) -> None:
    assert_passed("tests.ranks.waits", nproc, check)
