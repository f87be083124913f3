"""What is shown while workers start."""

from __future__ import annotations

import io
import re
import sys

import pytest

import cpkit.notebook.show
from cpkit.lab.start import _Line
from tests.helpers import ROOT
from tools import run
from tools.source import Cell


@pytest.mark.parametrize("imports_ipython", [False, True])
def test_outside_a_kernel_it_is_written_to_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *, imports_ipython: bool
) -> None:
    assert cpkit.notebook.show.display.__module__.split(".")[0] in sys.modules
    if not imports_ipython:
        monkeypatch.delitem(sys.modules, "IPython", raising=False)
    line = _Line()
    line.show("starting 2 workers …")
    assert line.is_open
    line.end("ready")
    assert not line.is_open
    assert capsys.readouterr() == ("", "starting 2 workers …\nready\n")


def test_a_process_without_stderr_starts_workers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stderr in (None, closed):
        monkeypatch.setattr(sys, "stderr", stderr)
        _Line().show("starting 2 workers …")


@pytest.mark.workers
@pytest.mark.notebook
@pytest.mark.slow("starts workers from a kernel, as test_notebooks.py does with all notebooks")
def test_a_cell_shows_one_line_and_a_thread_none() -> None:
    thread = "from threading import Thread\nother = Thread(target=lab.reconnect)\nother.start()"
    notebook = run.notebook_of(
        [
            Cell("connect", "code", "import cpkit\nlab = cpkit.connect(nproc=2)\nlab.stop()"),
            Cell("thread", "code", f"{thread}\nother.join()\nlab.stop()"),
        ]
    )
    run.execute(notebook, ROOT, {})
    connect, other = notebook.cells
    (shown,) = connect.outputs
    assert re.fullmatch(r"2 workers 'default' are ready after \S+ s", shown.data["text/plain"])
    assert connect.metadata["silent_s"] < 2, "each second shows the time and the phase"
    assert other.outputs == []
