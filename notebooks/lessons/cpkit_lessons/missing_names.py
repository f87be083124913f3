"""Name the cells that a cell needs, in place of the traceback of a NameError.

One failed cell would otherwise give a NameError in each later cell that uses its variables.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from IPython import get_ipython

NOTEBOOKS = Path(__file__).parents[2]
_SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def explain(notebook: str) -> None:
    """Do this from now on in this kernel, for the names that a notebook defines."""
    shell = get_ipython()
    if shell is None:
        return
    path = NOTEBOOKS / f"{notebook}.ipynb"
    sections = sections_of(json.loads(path.read_text("utf-8"))) if path.exists() else {}

    def show(
        shell: Any,
        kind: type[NameError],
        error: NameError,
        trace: TracebackType,
        tb_offset: int | None = None,
    ) -> list[str]:
        section = sections.get(error.name or "")
        if section is None:
            lines: list[str] = shell.InteractiveTB.structured_traceback(
                kind, error, trace, tb_offset=tb_offset
            )
        else:
            error = NameError(words(str(error.name), section))
            lines = [f"{kind.__name__}: {error}"]
        shell._showtraceback(kind, error, lines)
        return lines

    shell.set_custom_exc((NameError,), show)


def words(name: str, section: str) -> str:
    """Return what to do for a name of a section that has not run."""
    return (
        f"{name!r} is not defined yet: run {section} first. If a cell there failed, its message "
        f"says why"
    )


def sections_of(notebook: dict[str, Any]) -> dict[str, str]:
    """Return where each name is defined first: `section 4`, or `the cell of exercise 2`."""
    section, exercise, found = "the first cells", "", dict[str, str]()
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = re.search(r"^## (?:(\d+)\. )?(.*)", text, re.MULTILINE)
            if heading:
                section = f"section {heading[1]}" if heading[1] else f"the section {heading[2]!r}"
            number = re.search(r"^### Exercise (\d+)", text, re.MULTILINE)
            exercise = f"the cell of exercise {number[1]}" if number else ""
            continue
        for name in _names(ast.parse(text)):
            found.setdefault(name, exercise or section)
        exercise = ""  # only the first cell below the heading is the learner's
    return found


def _names(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a cell assigns, imports or defines, except those local to a part."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).split(".")[0]
        elif not isinstance(node, _SCOPES):
            yield from _names(node)
