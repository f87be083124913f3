"""Each third-party import is declared in the extra that its users install, and pinned."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from cpkit.memory.path import nccl_is_racy
from tests.helpers import ROOT
from tests.helpers.modules import MODULES, imported_names, imports, reaches

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INSTALLED = packages_distributions()
CONSTRAINTS = {file.stem: file for file in (ROOT / "constraints").glob("*.txt")}
NCCL = "nvidia-nccl-cu13"
# CUDA builds of torch depend on triton, and only GPU code imports it.
INSTALLED_WITH = {"triton": "torch"}
LOCAL = {"cpkit", "cpkit_lessons", "tools", "tests", "benchmarks"}
NOTEBOOK_SIDE = ("cpkit.notebook", "cpkit_lessons", "tools")
LIBRARY = {name for name in MODULES if not name.startswith(NOTEBOOK_SIDE)}


def declared(extra: str) -> set[str]:
    """Return the distributions that `pip install cpkit[extra]` requires; "" is cpkit alone."""
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    names = {_normal(line) for line in lines}
    for line in lines:
        for inner in re.findall(r"^cpkit\[(.+)\]", line):
            names |= declared(inner)
    return names | (declared("") if extra else set())


def _normal(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def notebook_modules() -> set[str]:
    """Return the imports of all notebook cells, and the modules of cpkit that these load."""
    cells = set().union(*map(_imports_of, ROOT.glob("notebooks/src/*.py")))
    return cells.union(*(reaches(name) for name in cells & MODULES.keys()))


def _imports_of(path: Path) -> frozenset[str]:
    return imported_names(ast.parse(path.read_text()))


def sources(package: str) -> set[str]:
    """Return the distributions that provide a package; its own name if it is not installed."""
    names = {_normal(name) for name in INSTALLED.get(package, [package])}
    return names | {INSTALLED_WITH.get(package)}


def third_party(names: Iterable[str]) -> set[str]:
    """Return the third-party packages among these imports and those of cpkit's modules."""
    names = set(names)
    found = names.union(*(imports(name) for name in names & MODULES.keys()))
    return {name.split(".")[0] for name in found} - LOCAL - sys.stdlib_module_names


NOTEBOOK_BENCHMARKS = [
    ROOT / "benchmarks" / f"{name}.py" for name in ("notebooks", "live_plots", "live_explorer")
]
TESTS = [*ROOT.glob("tests/**/*.py"), *NOTEBOOK_BENCHMARKS]
BENCHMARKS = set(ROOT.glob("benchmarks/*.py")) - {*TESTS}
USERS = {
    "": LIBRARY,
    "notebooks": notebook_modules(),
    "test": MODULES.keys() | set().union(*map(_imports_of, TESTS)),
    "bench": set().union(*map(_imports_of, BENCHMARKS)),
}


@pytest.mark.parametrize("extra", USERS)
def test_every_import_is_declared_in_the_extra_of_its_users(extra: str) -> None:
    missing = {name for name in third_party(USERS[extra]) if not sources(name) & declared(extra)}
    assert not missing, f"imported, and not declared for cpkit[{extra}]"


def test_the_notebooks_reach_lazy_imports() -> None:
    assert {"kaleido", "PIL", "IPython", "ipywidgets"} <= third_party(USERS["notebooks"])


def pinned(file: Path) -> dict[str, str]:
    """Return the versions that a file and the files that it includes pin, by distribution."""
    text = file.read_text()
    versions: dict[str, str] = {}
    for name in re.findall(r"^-c (.+)$", text, re.MULTILINE):
        versions |= pinned(file.parent / name)
    found = re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE)
    return versions | {_normal(name): version for name, version in found}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_what_is_declared_is_pinned(name: str) -> None:
    extras = ["", *PROJECT["optional-dependencies"]]
    missing = set().union(*map(declared, extras)) - pinned(CONSTRAINTS[name]).keys() - {"cpkit"}
    assert not missing, "run `make lock`"


def test_the_oldest_torch_is_the_lower_bound() -> None:
    bound = next(line for line in PROJECT["dependencies"] if _normal(line) == "torch")
    assert pinned(CONSTRAINTS["oldest"])["torch"].startswith(bound.removeprefix("torch>="))


def test_gpus_get_an_nccl_without_the_race() -> None:
    nccl = pinned(CONSTRAINTS["cuda"])[NCCL]
    assert not nccl_is_racy(tuple(map(int, nccl.split("."))))


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_documentation_lists_what_each_choice_installs(name: str) -> None:
    versions = pinned(CONSTRAINTS[name])
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    found = re.findall(rf"^\| `{name}`[^|]*\| (.+) \| (.+) \| (.+) \|$", page, re.MULTILINE)
    assert found == [tuple(versions[package] for package in ("torch", NCCL, "triton"))]
