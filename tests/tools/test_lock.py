"""`make lock` writes what follows the torch of each constraints file."""

from __future__ import annotations

from pathlib import Path

from tools.lock import with_versions


def test_triton_and_nccl_follow_torch(tmp_path: Path) -> None:
    file = tmp_path / "cuda.txt"
    kept = "# For GPUs.\n-c ../requirements.lock\ntorch==2.14.1,!=2.14.1+cpu\n"
    file.write_text(f"{kept}triton==3.7.1\nsetuptools==81.0\nnvidia-nccl-cu12==2.29.7\n")
    resolved = [
        "numpy==2.4.6\n",
        "nvidia-nccl-cu13==2.30.7\n",
        "nvidia-nvtx==13\n",
        "setuptools==84.2.1\n",
        "triton==3.8.0\n",
    ]
    text = with_versions(file, resolved)
    assert text == f"{kept}triton==3.8.0\nsetuptools==84.2.1\nnvidia-nccl-cu13==2.30.7\n"
