"""The modules of cpkit, the lessons and the tools, and their imports."""

from __future__ import annotations

import ast
from functools import cache

from tests.helpers import ROOT

MODULES = {
    ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
    for root, package in (
        (ROOT, "cpkit"),
        (ROOT / "notebooks" / "lessons", "cpkit_lessons"),
        (ROOT, "tools"),
    )
    for path in sorted((root / package).rglob("*.py"))
}


@cache
def imports(module: str) -> frozenset[str]:
    """Return the names that a module imports, also inside functions."""
    return imported_names(ast.parse(MODULES[module].read_text()))


def imported_names(tree: ast.AST) -> frozenset[str]:
    """Return the names that code imports, also inside functions and by `import_module("name")`."""
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
    """Return all modules of this repository that importing this one loads, itself included."""
    seen, queue = {module}, [module]
    while queue:
        new = (imports(queue.pop()) & MODULES.keys()) - seen
        seen |= new
        queue += new
    return frozenset(seen)
