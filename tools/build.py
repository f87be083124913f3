"""Build the notebooks from their sources: `python -m tools.build [01 02 03]`.

Edit `notebooks/src/NAME.py` (see `source`). This tool renders it as `notebooks/NAME.ipynb`, runs
it and writes it in canonical form: with outputs, because GitHub shows them and nbval compares them,
but without metadata that differs from run to run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat

from cpkit.notebook.show import NO_BROWSER, find_browser
from cpkit.processes import run_command
from tools import run, source

MAX_BYTES = 1_000_000  # per committed notebook, including its pictures
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SOURCES = NOTEBOOKS / "src"
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def build(path: Path) -> Any:
    """Return the notebook of a source file, executed with the starters.

    Raises ValueError if a cell took longer than its budget.
    """
    notebook = run.notebook_of(list(source.read(path).rendered()))
    run.execute(notebook, NOTEBOOKS, {"CPKIT_STATIC": "1"})
    late = run.over_budget(notebook)
    if late:
        raise ValueError(f"{path.name}: {'; '.join(late)}")
    return notebook


def canonical(notebook: Any) -> str:
    """Return a notebook as text, in the form in which notebooks are committed.

    Raises ValueError if it is larger than MAX_BYTES, two cells share an id, or one wrote to stderr:
    a learner's first page has no warnings, and a traceback has paths of this machine.
    """
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                last = output["text"].strip().splitlines()[-1]
                raise ValueError(f"cell {cell.id} wrote to stderr: {last}; build it again")
    cells = [_canonical_cell(cell) for cell in notebook.cells]
    ids = [cell["id"] for cell in cells]
    if len(set(ids)) != len(ids):
        raise ValueError(f"cell ids must differ; got {sorted(i for i in ids if ids.count(i) > 1)}")
    for number, cell in enumerate((c for c in cells if c["cell_type"] == "code"), start=1):
        cell["execution_count"] = number
        for output in cell["outputs"]:
            if "execution_count" in output:
                output["execution_count"] = number
    clean = {"cells": cells, "metadata": _METADATA, "nbformat": 4, "nbformat_minor": 5}
    text: str = nbformat.writes(nbformat.from_dict(clean), version=4) + "\n"  # type: ignore[no-untyped-call]
    size = len(text.encode())
    if size > MAX_BYTES:
        raise ValueError(f"the notebook has {size} bytes; {MAX_BYTES} are allowed: cut its outputs")
    return text


def _canonical_cell(cell: Any) -> dict[str, Any]:
    kept = {"tags": sorted(cell.metadata.get("tags", []))} if cell.metadata.get("tags") else {}
    if "budget_s" in cell.metadata:
        kept["budget_s"] = cell.metadata["budget_s"]
    clean: dict[str, Any] = {
        "id": cell.id,
        "cell_type": cell.cell_type,
        "metadata": kept,
        "source": cell.source.strip("\n"),
    }
    if cell.cell_type == "code":
        clean["outputs"] = [_canonical_output(output) for output in cell.outputs]
    return clean


def _canonical_output(output: Any) -> dict[str, Any]:
    clean = dict(output)
    if "metadata" in clean:
        clean["metadata"] = {}
    if "data" in clean:
        clean["data"] = {mime: data for mime, data in output.data.items() if mime != WIDGET_MIME}
    return clean


def problems(path: Path) -> list[str]:
    """Return what is wrong with a committed notebook: its form, or a difference from its source."""
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)  # type: ignore[no-untyped-call]
    try:
        form = canonical(notebook)
    except ValueError as problem:
        return [f"{path.name}: {problem}"]
    if text != form:
        return [f"{path.name} is not in canonical form: run `make notebooks`"]
    wanted = run.notebook_of(list(source.read(SOURCES / f"{path.stem}.py").rendered()))
    if _without_outputs(notebook) != _without_outputs(wanted):
        return [f"{path.name} differs from its source in src/: run `make notebooks`"]
    return []


def _without_outputs(notebook: Any) -> list[tuple[Any, ...]]:
    return [(c.id, c.cell_type, c.source, dict(c.metadata)) for c in notebook.cells]


def check(paths: Sequence[Path]) -> int:
    """Print the problems of committed notebooks; return 1 if there are any."""
    found = [problem for path in paths for problem in problems(path)]
    sys.stderr.writelines(f"{problem}\n" for problem in found)
    return int(bool(found))


def named(numbers: Sequence[str]) -> list[Path]:
    """Return the source files whose names begin with one of `numbers`; all of them by default."""
    found = sorted(SOURCES.glob("[0-9]*.py"))
    return [path for path in found if path.stem.startswith(tuple(numbers or [""]))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the named notebooks, or all of them; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.build", description=__doc__)
    parser.add_argument("notebooks", nargs="*", help="start of their names; default: all")
    parser.add_argument("--check", action="store_true", help="check what is committed; run nothing")
    options = parser.parse_args(arguments)
    if options.check:
        return check(sorted(NOTEBOOKS.glob("*.ipynb")))
    if find_browser() is None:
        sys.stderr.write(f"The notebooks need static pictures: {NO_BROWSER}.\n")
        return 1
    for path in named(options.notebooks):
        start_s = time.monotonic()
        notebook = build(path)
        text = canonical(notebook)
        (NOTEBOOKS / f"{path.stem}.ipynb").write_text(text, encoding="utf-8")
        slowest = sorted(notebook.cells, key=run.seconds, reverse=True)[:3]
        words = ", ".join(f"{cell.id} {run.seconds(cell):.1f} s" for cell in slowest)
        took_s = time.monotonic() - start_s
        sys.stdout.write(f"{path.stem}: {took_s:.1f} s, {len(text.encode())} bytes; {words}\n")
    return 0


if __name__ == "__main__":
    run_command(main)
