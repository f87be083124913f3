"""Execute the notebooks and write them in canonical form: `python -m cpkit.notebook.build`.

Outputs are kept, because pages such as GitHub show them and nbval compares them; what changes from
run to run without meaning anything (widget state, metadata) is dropped. Cells keep their ids, so a
diff of two versions shows what has changed and nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from cpkit.notebook.show import find_browser

MAX_BYTES = 1_000_000
CELL_TIMEOUT_S = 120
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path) -> Any:
    """Run a notebook from top to bottom in a fresh kernel, with workers of its own; returns it."""
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory(prefix="cpkit-build-") as runtime:
        os.environ.update(JUPYTER_RUNTIME_DIR=runtime, CPKIT_STATIC="1")
        NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT_S,
            kernel_name="python3",
            store_widget_state=False,
            resources={"metadata": {"path": str(path.parent)}},
        ).execute()
    return notebook


def canonical(notebook: Any) -> str:
    """A notebook as text, in the one form in which notebooks are committed.

    Raises ValueError when it is larger than MAX_BYTES or two cells share an id.
    """
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
        raise ValueError(f"the notebook has {size} bytes; {MAX_BYTES} are allowed: show less in it")
    return text


def _canonical_cell(cell: Any) -> dict[str, Any]:
    tags = sorted(cell.metadata.get("tags", []))
    clean: dict[str, Any] = {
        "id": cell.id,
        "cell_type": cell.cell_type,
        "metadata": {"tags": tags} if tags else {},
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


def is_canonical(path: Path) -> bool:
    """Whether a notebook is byte for byte what `canonical` makes of it."""
    text = path.read_text()
    return text == canonical(nbformat.reads(text, as_version=4))  # type: ignore[no-untyped-call]


def check(paths: Sequence[Path]) -> int:
    """Name the notebooks that are not in canonical form; 1 when there are any."""
    wrong = [path.name for path in paths if not is_canonical(path)]
    for name in wrong:
        sys.stderr.write(f"{name} is not in canonical form: run `make notebooks`\n")
    return int(bool(wrong))


def main(arguments: Sequence[str] | None = None) -> int:
    """Execute and rewrite the named notebooks; all of them by default."""
    parser = argparse.ArgumentParser(prog="python -m cpkit.notebook.build", description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all in notebooks/")
    parser.add_argument(
        "--check", action="store_true", help="run nothing: is their form canonical?"
    )
    options = parser.parse_args(arguments)
    chosen = options.notebooks or sorted(NOTEBOOKS.glob("*.ipynb"))
    if options.check:
        return check(chosen)
    if find_browser() is None:
        sys.stderr.write("No Chromium here: the notebooks get no static pictures.\n")
        return 1
    for path in chosen:
        start_s = time.monotonic()
        text = canonical(execute(path))
        path.write_text(text)
        took_s = time.monotonic() - start_s
        sys.stdout.write(f"{path.name}: {took_s:.1f} s, {len(text.encode())} bytes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
