"""The choice of the workers' device and its explanation; needs no GPU."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from cpkit.control import mps
from cpkit.control.gpus import choose_device, is_shared
from cpkit.control.launch_options import Launch


@pytest.mark.parametrize(
    ("launch", "gpus", "device", "words"),
    [
        (Launch(device="auto"), 0, "cpu", "no GPU"),
        (Launch(device="cpu"), 8, "cpu", "as requested"),
        (Launch(device="auto", nproc=4), 1, "cuda", "4 ranks share 1 GPU"),
        (Launch(device="cuda", nproc=8), 2, "cuda", "8 ranks share 2 GPUs: .*--nproc 2"),
        (Launch(device="auto", nproc=4), 4, "cuda", "one GPU per rank"),
        (Launch(device="auto", nproc=4, share_gpu=True), 4, "cuda", "4 ranks share 1 GPU"),
    ],
)
def test_device(launch: Launch, gpus: int, device: str, words: str) -> None:
    chosen, why = choose_device(launch, gpus)
    assert chosen == device
    assert re.search(words, why)
    assert is_shared(launch, gpus) == ("share" in why) or device == "cpu"


@pytest.mark.parametrize("launch", [Launch(device="cuda"), Launch(share_gpu=True)])
def test_a_missing_gpu_is_rejected(launch: Launch) -> None:
    with pytest.raises(ValueError, match="torch sees"):
        choose_device(launch, 0)


def test_without_mps_the_cost_is_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with mps.serve(tmp_path) as words:
        assert "not installed" in words
        assert "milliseconds" in words


@pytest.mark.parametrize(("code", "said"), [(0, "own daemon"), (1, "failed: no driver")])
def test_the_daemon_is_started_in_a_private_directory_and_stopped(
    code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the control program records its calls; the real one needs a GPU."""
    program, calls = tmp_path / "nvidia-cuda-mps-control", tmp_path / "calls"
    program.write_text(
        f'#!/bin/sh\necho "$CUDA_MPS_PIPE_DIRECTORY $CUDA_VISIBLE_DEVICES $* $(cat)" >> {calls}\n'
        f"echo no driver\nexit {code}\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with mps.serve(tmp_path) as words:
        assert said in words
        assert mps.is_configured() == (code == 0)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ("0,1" if code == 0 else "2,3")
    assert not mps.is_configured()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    with mps.serve(program) as words:  # its directories cannot be made below a file
        assert "Not a directory" in words
        assert "milliseconds" in words
    pipes = f"{tmp_path}/mps"
    assert calls.read_text().splitlines() == [
        f"{pipes} 2,3 -d ",
        f"{pipes} 2,3  quit",
        f"{program}/mps 2,3  quit",
    ]
