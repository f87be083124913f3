"""The doctor names an installed torch whose NCCL has the race of symmetric kernels."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cpkit import doctor


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")


def race_found() -> list[doctor.Check]:
    return [check for check in doctor._gpus() if check.subject == "NCCL race"]


@pytest.mark.parametrize("version", [(2, 28, 0), (2, 29, 7), (2, 30, 4)])
def test_the_pair_is_named_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...]
) -> None:
    monkeypatch.setattr(doctor, "loaded_nccl_version", lambda: version)
    (race,) = race_found()
    assert f"torch 2.13.0+cu130 with NCCL {'.'.join(map(str, version))}:" in race.found
    assert "TORCH=cuda" in race.advice


@pytest.mark.parametrize("version", [(2, 27, 7), (2, 30, 7)])
def test_other_versions_are_not_reported(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...]
) -> None:
    monkeypatch.setattr(doctor, "loaded_nccl_version", lambda: version)
    assert not race_found()


def test_a_cpu_build_has_no_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    monkeypatch.setattr(doctor, "loaded_nccl_version", pytest.fail)
    assert not race_found()
