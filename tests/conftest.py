"""Puts the layers of the test suite in order, cheapest first, and heads each with its name.

A test's layer is the dearest of its markers in `LAYERS`; one without any is pure: no processes.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import cpkit
from tests.desk import Desk
from tests.processes import until

LAYERS = ("pure", "workers", "notebook", "browser", "gpu")
_heading = pytest.StashKey[int]()

if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels are then run by the interpreter, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts what runs in its background with interrupts ignored. Tests send some.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by layer; the order inside a layer stays."""
    items.sort(key=layer)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """Write a heading before the first test of each layer."""
    number = layer(item)
    reporter = item.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and item.config.stash.get(_heading, None) != number:
        reporter.ensure_newline()
        reporter.write_sep("-", f"{LAYERS[number]} tests")
    item.config.stash[_heading] = number


def layer(item: pytest.Item) -> int:
    """The index into LAYERS of the dearest layer that the test is marked with."""
    return max(n for n, name in enumerate(LAYERS) if n == 0 or item.get_closest_marker(name))


@pytest.fixture(scope="session")
def runtime_dir() -> Iterator[Path]:
    """A Jupyter runtime directory of this test session's own, so that no user's workers are met."""
    directory = Path(tempfile.mkdtemp(prefix="cpkit-test-"))
    before = os.environ.get("JUPYTER_RUNTIME_DIR")
    os.environ["JUPYTER_RUNTIME_DIR"] = str(directory)
    yield directory
    if before is None:
        del os.environ["JUPYTER_RUNTIME_DIR"]
    else:
        os.environ["JUPYTER_RUNTIME_DIR"] = before
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def lab(runtime_dir: Path) -> Iterator[cpkit.Lab]:
    """Four real ranks, shared by all tests that leave them usable."""
    with cpkit.connect("tests", nproc=4) as connected:
        yield connected
        connected.stop()


@pytest.fixture
def the_workers_stay_usable(lab: cpkit.Lab) -> Iterator[None]:
    """After every test: nothing waits, and a gather is right."""
    yield
    until(lambda: lab.status().state == "idle", why="the line of requests to be empty")
    assert lab.gather([9, 12], 2, heads=1, head_dim=8).verified


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.close()
