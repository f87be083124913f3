"""Run a notebook in a fresh kernel with its own workers, and report how long each cell took."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nbformat
from nbclient import NotebookClient

import cpkit
from cpkit.control import launcher
from tools.source import BUDGET_S, Cell

CELL_TIMEOUT_S = 120
SILENCE_S = 5.0  # a cell that shows something every 2 s may take longer on a busy machine


def notebook_of(cells: list[Cell]) -> Any:
    """Return cells as an nbformat notebook without outputs."""
    made = []
    for cell in cells:
        metadata: dict[str, Any] = {"tags": list(cell.tags)} if cell.tags else {}
        if cell.budget_s != BUDGET_S:
            metadata["budget_s"] = cell.budget_s
        node: dict[str, Any] = {
            "id": cell.id,
            "cell_type": cell.kind,
            "metadata": metadata,
            "source": cell.text,
        }
        if cell.kind == "code":
            node |= {"outputs": [], "execution_count": None}
        made.append(node)
    whole = {"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    return nbformat.from_dict(whole)  # type: ignore[no-untyped-call]


@contextmanager
def workers(nproc: int | None) -> Iterator[dict[str, str]]:
    """Start `nproc` workers; yield the environment in which a notebook finds them.

    With None, the notebook starts its own.
    """
    if nproc is None:
        yield {}
        return
    name = f"run-{nproc}"
    with (
        tempfile.TemporaryDirectory(prefix="cpkit-run-") as runtime,
        patch.dict(os.environ, JUPYTER_RUNTIME_DIR=runtime),
        cpkit.connect(name, nproc=nproc) as lab,
    ):
        try:
            yield {"JUPYTER_RUNTIME_DIR": runtime, "CPKIT_NAME": name}
        finally:
            lab.stop()


def execute(
    notebook: Any, folder: Path, environment: Mapping[str, str], *, allow_errors: bool = False
) -> None:
    """Run all cells from top to bottom, and store their outputs in the notebook.

    Raises nbclient's CellExecutionError if a cell fails, unless `allow_errors`.
    """
    with _runtime_dir() as own:
        _Client(
            notebook,
            timeout=CELL_TIMEOUT_S,
            kernel_name="python3",
            store_widget_state=False,
            record_timing=True,
            allow_errors=allow_errors,
            resources={"metadata": {"path": str(folder)}},
        ).execute(env={**os.environ, **own, **environment})


class _Client(NotebookClient):
    """A client that stores the longest time without output of each cell, `silent_s`."""

    _output_s = math.inf

    def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
        """Handle a message of the running cell. The first says that the kernel is busy."""
        now_s = time.monotonic()
        if msg["content"].get("execution_state") != "busy":
            silent_s = now_s - self._output_s
            cell.metadata["silent_s"] = max(silent_s, cell.metadata.get("silent_s", 0.0))
        self._output_s = now_s
        return super().process_message(msg, cell, cell_index)


@contextmanager
def _runtime_dir() -> Iterator[dict[str, str]]:
    """Yield an environment with a new runtime directory. Remove it after its workers have ended.

    Workers that a notebook started end with its kernel, but later than the kernel.
    """
    with tempfile.TemporaryDirectory(prefix="cpkit-build-") as runtime:
        own = {"JUPYTER_RUNTIME_DIR": runtime, "CPKIT_NAME": "default"}
        try:
            yield own
        finally:
            with patch.dict(os.environ, own):
                launcher.stop("default")


def seconds(cell: Any) -> float:
    """Return how long an executed code cell ran; 0 without a record of its times."""
    times = cell.metadata.get("execution", {})
    begin, end = times.get("iopub.execute_input"), times.get("shell.execute_reply")
    if not (begin and end):
        return 0.0
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


def over_budget(notebook: Any) -> list[str]:
    """Return a message for each cell that ran longer than its budget."""
    found = []
    for cell in notebook.cells:
        budget_s, took_s = cell.metadata.get("budget_s", BUDGET_S), seconds(cell)
        if took_s > budget_s:
            advice = f"its budget is {budget_s:g} s: make it faster, or set budget_s"
            found.append(f"cell {cell.id} took {took_s:.1f} s; {advice}")
    return found


def silent(notebook: Any) -> list[str]:
    """Return a message for each cell that showed nothing for longer than SILENCE_S."""
    return [
        f"cell {cell.id} shows nothing for {silent_s:.1f} s; print its progress"
        for cell in notebook.cells
        if (silent_s := cell.metadata.get("silent_s", 0.0)) > SILENCE_S
    ]
