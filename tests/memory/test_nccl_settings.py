"""Settings of NCCL that differ between ranks: refused, or no rank uses windows."""

from __future__ import annotations

import pytest

from cpkit import doctor
from cpkit.memory import nccl_settings
from cpkit.memory.nccl_settings import (
    NcclSettings,
    check_versions,
    cta_policy,
    is_zero,
    settings_of_this_process,
    window_problem,
)
from cpkit.memory.path import nccl_version

OLD, NEW = (2, 28, 9), (2, 30, 7)
ON = NcclSettings(NEW)


@pytest.mark.parametrize(
    ("value", "zero"),
    [
        *((value, True) for value in ("0", "00", " 0", "0x0", "off", "false")),
        *((value, False) for value in ("", "1", "-1", "01", " 2", "0x1", "0xA0", "10")),
    ],
)
def test_variables_are_read_as_nccl_reads_them(value: str, zero: bool) -> None:
    assert is_zero(value) is zero


@pytest.mark.parametrize(
    ("value", "version", "policy"),
    [
        ("", NEW, "default"),
        ("0", NEW, "default"),
        ("1", NEW, "efficiency"),
        ("2", NEW, "zero"),
        ("2", OLD, "zero"),
        ("2", (2, 27, 7), "default"),
        ("zero", NEW, "zero"),
        ("EFFICIENCY|ZERO", NEW, "zero"),
        ("EFFICIENCY", NEW, "efficiency"),
        ("ZERO", OLD, "default"),
    ],
)
def test_the_policy_depends_on_the_version(
    value: str, version: tuple[int, ...], policy: str
) -> None:
    assert cta_policy(value, version) == policy


def test_the_settings_of_a_process_are_its_version_and_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nccl_settings, "loaded_nccl_version", lambda: NEW)
    for name in ("NCCL_WIN_ENABLE", "NCCL_CUMEM_ENABLE", "NCCL_CTA_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert settings_of_this_process() == ON
    assert ON.transport == "nccl 2.30.7"
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "0")
    monkeypatch.setenv("NCCL_WIN_ENABLE", "1")
    monkeypatch.setenv("NCCL_CTA_POLICY", "2")
    found = settings_of_this_process()
    assert found == NcclSettings(NEW, "NCCL_CUMEM_ENABLE=0", "zero")
    assert found.transport == "nccl 2.30.7 NCCL_CTA_POLICY=2"
    assert nccl_version(found.transport) == NEW


def test_one_version_is_accepted_and_two_are_listed_by_rank() -> None:
    check_versions({0: ON, 1: NcclSettings(NEW, "NCCL_WIN_ENABLE=0")})
    with pytest.raises(ValueError, match=r"rank\(s\) 4, 6: 2.30.7; rank\(s\) 5: 2.28.9"):
        check_versions({4: ON, 5: NcclSettings(OLD), 6: ON})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (ON, ""),
        (NcclSettings(NEW, "NCCL_WIN_ENABLE=0"), "rank(s) 0: on; rank(s) 1: NCCL_WIN_ENABLE=0"),
        (NcclSettings(NEW, policy="zero"), "rank(s) 0: default; rank(s) 1: zero"),
        (NcclSettings(NEW, policy="efficiency"), "rank(s) 0: default; rank(s) 1: efficiency"),
    ],
)
def test_a_setting_of_one_rank_keeps_all_ranks_from_windows(
    other: NcclSettings, words: str
) -> None:
    problem = window_problem({0: ON, 1: other})
    assert words in problem
    assert bool(words) is bool(problem)


@pytest.mark.parametrize(
    ("all_ranks", "words"),
    [
        (NcclSettings(NEW, "NCCL_WIN_ENABLE=0"), "all ranks: NCCL_WIN_ENABLE=0"),
        (NcclSettings(OLD, policy="zero"), "nccl#2003"),
        (NcclSettings(NEW, policy="zero"), ""),
        (NcclSettings(OLD, policy="efficiency"), ""),
    ],
)
def test_equal_settings_can_be_a_problem_too(all_ranks: NcclSettings, words: str) -> None:
    problem = window_problem({0: all_ranks, 1: all_ranks})
    assert words in problem
    assert bool(words) is bool(problem)


def test_doctor_reports_settings_that_rule_windows_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (nccl_settings, doctor):
        monkeypatch.setattr(module, "loaded_nccl_version", lambda: NEW)
    monkeypatch.setattr(doctor.dist, "is_nccl_available", lambda: True)
    monkeypatch.delenv("NCCL_WIN_ENABLE", raising=False)
    assert [check.subject for check in doctor._nccl()] == ["NCCL"]
    monkeypatch.setenv("NCCL_WIN_ENABLE", "0")
    (_, windows) = doctor._nccl()
    assert (windows.subject, windows.found) == ("NCCL windows", "none")
    assert "all ranks: NCCL_WIN_ENABLE=0" in windows.advice
