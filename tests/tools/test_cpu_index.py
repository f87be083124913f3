"""`tools.cpu_index` adds the index of CPU builds only where a CPU build is missing."""

from __future__ import annotations

import os
import socket
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tools import cpu_index

pytestmark = [
    pytest.mark.workers,  # runs pip
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux has CUDA builds on PyPI"),
]


@pytest.fixture
def constraints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Constraints on a torch that is not installed; pip looks only at folders below tmp_path."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "configured").as_uri())
    monkeypatch.setattr(cpu_index, "INDEX", (tmp_path / "cpu").as_uri())
    file = tmp_path / "constraints.txt"
    file.write_text("-c other.txt\ntorch==99.1.0,!=99.1.0+cuda\ntriton==99.0\n")
    return file


def offer(index: Path, version: str) -> None:
    """Add a version of torch to an index in a folder; pip reads only its file's name."""
    page = index / "torch" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="torch-{version}-py3-none-any.whl">torch</a>')


def test_the_index_is_added_if_only_it_has_the_cpu_build(
    constraints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(tmp_path / "configured", "99.1.0")
    offer(tmp_path / "cpu", "99.1.0+cpu")
    assert cpu_index.main([str(constraints)]) == 0
    assert capsys.readouterr() == (f"--extra-index-url={(tmp_path / 'cpu').as_uri()}\n", "")


def test_no_index_is_added_if_pip_finds_the_cpu_build_elsewhere(
    constraints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(tmp_path / "configured", "99.1.0+cpu")
    offer(tmp_path / "cpu", "99.1.0+cpu")
    assert cpu_index.main([str(constraints)]) == 0
    assert capsys.readouterr() == ("", "")


def test_pip_is_not_asked_if_torch_is_installed(
    constraints: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_index.subprocess, "run", pytest.fail)
    installed = metadata.version("torch").partition("+")[0]
    constraints.write_text(f"torch=={installed}\n")
    assert cpu_index.main([str(constraints)]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.timeout(60)  # pip alone tries six times, and waits 15 s each time
def test_an_index_that_does_not_answer_is_skipped(
    constraints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    offer(tmp_path / "configured", "99.1.0")
    monkeypatch.setattr(cpu_index, "_LIMIT_S", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(cpu_index, "INDEX", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert cpu_index.main([str(constraints)]) == 0
        silent.setblocking(False)
        silent.accept()[0].close()  # raises BlockingIOError if pip did not ask
    shown = capsys.readouterr()
    assert not shown.out
    assert "does not answer, or has no torch 99.1.0" in shown.err


def test_constraints_without_torch_are_refused(constraints: Path) -> None:
    constraints.write_text("triton==3.8.0\n")
    with pytest.raises(ValueError, match=r"constraints.txt has no line torch==VERSION"):
        cpu_index.main([str(constraints)])
