"""The house stays easy to see: imports point one way, files stay short, links lead somewhere."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 450
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "cpkit").rglob("*.py"))
}
# Where an import of torch.distributed, or of what uses it, would make a notebook join the job.
CLIENT_SIDE = ("cpkit.notebook", "cpkit.control.client", "cpkit.lab")
RANK_SIDE = (
    "cpkit.group",
    "cpkit.gather",
    "cpkit.symm",
    "cpkit.worker",
    "cpkit.rank",
    "cpkit.control.server",
)


@cache
def imports(module: str) -> frozenset[str]:
    """What a module of cpkit imports, at the top or inside a function; cpkit's by module name."""
    return imported_names(ast.parse(MODULES[module].read_text()))


def imported_names(tree: ast.AST) -> frozenset[str]:
    """What a piece of code imports, also inside functions and by `import_module("name")`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = whole & MODULES.keys()
            found |= inner or {node.module}
            found |= whole & {"torch.distributed"}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return frozenset(found)


@cache
def reaches(module: str) -> frozenset[str]:
    """All modules of cpkit that importing this one brings along, itself included."""
    seen, queue = {module}, [module]
    while queue:
        new = (imports(queue.pop()) & MODULES.keys()) - seen
        seen |= new
        queue += new
    return frozenset(seen)


def test_imports_have_no_cycle() -> None:
    graph = {module: imports(module) & MODULES.keys() - {module} for module in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError and names the modules


def test_layout_knows_nobody() -> None:
    assert reaches("cpkit.layout") == {"cpkit.layout"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith(CLIENT_SIDE)])
def test_the_notebook_side_never_joins_a_process_group(module: str) -> None:
    for reached in reaches(module):
        assert not reached.startswith(RANK_SIDE), f"{module} brings in {reached}"
        assert "torch.distributed" not in imports(reached), f"{reached} (brought in by {module})"


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short(module: str) -> None:
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines: split it by idea"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/walkthrough.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / page).read_text())
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert links
    assert not missing
