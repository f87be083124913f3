"""Checks of a committed notebook, and of a second run of it.

tests/lessons/test_notebooks.py applies them to the notebooks; tests/tools/test_gates.py shows that
each check finds its fault. `tools.build` checks form, source, size and time per cell;
`tools.rehearse` checks starter, mutants and solution.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import psutil

from cpkit.control.tied import tied
from cpkit.notebook.show import PLOTLY_MIME
from tests.helpers import ROOT
from tests.helpers.processes import LIMIT_S, left_after, processes_with
from tools import source

# Only a run that hangs reaches these limits. `tools.build` checks the time budget of each cell.
CELL_LIMIT_S = 180
RUN_LIMIT_S = 400


def figure_faults(data: Mapping[str, Any]) -> list[str]:
    """Return what a displayed figure lacks: picture, title, units or text alternative."""
    layout = data[PLOTLY_MIME]["layout"]
    title = layout.get("title", {}).get("text", "")
    named = [axis for name, axis in layout.items() if name.startswith(("xaxis", "yaxis"))]
    traces = data[PLOTLY_MIME]["data"]
    lacks = {
        "a picture: GitHub shows no plotly": len(data.get("image/png", "")) > 5000,
        "a title": len(title) > 5,
        "a text alternative": data.get("text/plain", "").startswith(f"Figure: {title}. ")
        and len(data["text/plain"]) > len(title) + 40,
        "units": all(_says_what_it_is(axis, traces) for axis in named),
    }
    return [f"{title or 'a figure'} lacks {what}" for what, there in lacks.items() if not there]


def _says_what_it_is(axis: dict, traces: list[dict]) -> bool:
    """Return True if the axis has a title, its ticks are names, or its cells contain text."""
    named = axis.get("type") == "category" or "categoryarray" in axis or "ticktext" in axis
    names = named or any(t.get("orientation") == "h" or t["type"] == "heatmap" for t in traces)
    return bool(axis.get("title", {}).get("text")) or names


def region_faults(made: source.Source, committed: Mapping[str, str]) -> list[str]:
    """Return the cells whose starter and solution differ outside the marked region, or are equal.

    `committed` maps a cell id to its text.
    """
    faults = []
    for cell in made.rendered(solved=True):
        if cell.part[1] != "code":
            if cell.text != committed[cell.id]:
                faults.append(f"{cell.id} differs in the solved notebook")
            continue
        starter, solution = (source.split(text) for text in (committed[cell.id], cell.text))
        if (starter[0], starter[2]) != (solution[0], solution[2]):
            faults.append(f"{cell.id}: starter and solution differ outside of the region")
        if starter[1] == solution[1]:
            faults.append(f"{cell.id}: the starter is the solution")
    return faults


def rerun_faults(path: Path, limit_s: float = RUN_LIMIT_S, end_s: float = LIMIT_S) -> list[str]:
    """Run a notebook with nbval; return its faults, and what is left after `end_s` seconds.

    nbval ends its kernel with SIGKILL, so this also tests that workers end with their owner. Each
    run has private directories, which are searched afterwards.
    """
    home = Path(tempfile.mkdtemp(prefix="nb-"))
    memory = Path("/dev/shm")
    shm = Path(tempfile.mkdtemp(prefix="nb-", dir=memory if memory.is_dir() else None))
    (home / "tmp").mkdir()
    private = {
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
        "TMPDIR": str(home / "tmp"),
        "CPKIT_SHM_DIR": str(shm),
        "TORCHINDUCTOR_CACHE_DIR": str(home / "torch"),  # a cache may remain
    }
    try:
        faults = _nbval(path, os.environ | private, limit_s)
        return faults + left_after(end_s, lambda: _left_behind(home, shm))
    finally:
        for process in _processes_of(home):
            process.kill()
        shutil.rmtree(home)
        shutil.rmtree(shm)


def _nbval(path: Path, environment: Mapping[str, str], limit_s: float) -> list[str]:
    options = ["--nbval", "--nbval-current-env", f"--nbval-cell-timeout={CELL_LIMIT_S}"]
    quiet = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "--timeout=0"]
    command = [sys.executable, "-m", "pytest", *options, *quiet, str(path)]
    code, text = _run(command, environment, limit_s)
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    return [] if code == 0 and f"{len(cells)} passed" in text else [text]


def _run(command: list[str], environment: Mapping[str, str], limit_s: float) -> tuple[int, str]:
    """Run in a new session for at most `limit_s` seconds; return the exit code and all output."""
    with subprocess.Popen(
        tied(command),
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            text, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text = process.communicate()[0] + f"\nnot done after {limit_s:g} s"
    return process.returncode, text


def _left_behind(home: Path, shm: Path) -> list[str]:
    """Return the processes, sockets, connection files and shared memory of a run."""
    processes = list(_processes_of(home).values())
    sockets = [str(path) for path in (home / "tmp").iterdir()]
    connections = [str(path) for path in (home / "runtime").rglob("connection.json")]
    left = processes + sockets + connections + [str(path) for path in shm.iterdir()]
    return [f"left behind: {what}" for what in left]


def _processes_of(home: Path) -> dict[psutil.Process, str]:
    return processes_with("JUPYTER_RUNTIME_DIR", home / "runtime")
