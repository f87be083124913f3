"""Imports point to lower layers, files are short, and links in pages lead to files."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter

import pytest

from tests.helpers import ROOT
from tests.helpers.modules import MODULES, imports, reaches

MAX_LINES = 450
# Lowest first: a module imports only from its own layer and from layers before it.
LAYERS = (
    (
        "cpkit.settings",
        "cpkit.algorithms",
        "cpkit.os_errors",
        "cpkit.packing",
        "cpkit.processes",
        "cpkit.threads",
        "cpkit.eager",
        "cpkit.devices",
        "cpkit.timing",
        "cpkit.stages",
        "cpkit.batch",
    ),
    ("cpkit.layout", "cpkit.provenance", "cpkit.cost"),
    ("cpkit.sync",),
    ("cpkit.memory.path", "cpkit.memory.nccl_log", "cpkit.memory.nccl_settings"),
    ("cpkit.group",),
    ("cpkit.kernels", "cpkit.memory"),
    ("cpkit.caches", "cpkit.validate"),
    ("cpkit.symm", "cpkit.repeat"),
    ("cpkit.gather",),
    ("cpkit.plan", "cpkit.bench", "cpkit.reference"),
    ("cpkit.control",),
    ("cpkit.lab",),
    ("cpkit.notebook",),
    ("cpkit.worker",),
    ("cpkit.doctor",),
    ("cpkit", "cpkit.__main__"),
    ("cpkit_lessons",),
    ("tools",),
)
# Here an import of torch.distributed, or of a module that uses it, could join the process group.
CLIENT_SIDE = ("cpkit.notebook", "cpkit.control.client", "cpkit.lab.lab")
RANK_SIDE = (
    "cpkit.group",
    "cpkit.gather",
    "cpkit.symm",
    "cpkit.worker",
    "cpkit.control.server",
)


def test_imports_have_no_cycle() -> None:
    # `cpkit` itself loads its public names when they are first used, so it can be in a cycle.
    graph = {module: imports(module) & MODULES.keys() - {module, "cpkit"} for module in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError and names the modules


def layer_of(module: str) -> int:
    """Return the number of the layer whose longest name contains this module."""
    named = [
        (len(name), number)
        for number, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    return max(named)[1]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    # `cpkit` itself has the version, and loads its public names when they are first used.
    below = imports(module) & MODULES.keys() - {"cpkit"}
    up = {name for name in below if layer_of(name) > layer_of(module)}
    assert module == "cpkit" or not up, f"{module} imports {up} from a layer above it"


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith("cpkit.worker")])
def test_only_the_workers_import_the_worker(module: str) -> None:
    assert not any(name.startswith("cpkit.worker") for name in imports(module))


def test_layout_imports_no_module_but_its_arithmetic_and_eager() -> None:
    assert reaches("cpkit.layout") == {"cpkit.layout", "cpkit.batch", "cpkit.eager"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith(CLIENT_SIDE)])
def test_the_notebook_side_never_imports_torch_distributed(module: str) -> None:
    for reached in reaches(module):
        assert not reached.startswith(RANK_SIDE), f"{module} imports {reached}"
        assert "torch.distributed" not in imports(reached), f"{reached}, imported by {module}"


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short(module: str) -> None:
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines: split it by question"


PAGES = [
    path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / page).read_text())
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert links or page.startswith("docs/")
    assert not missing
