"""Sort the tests by layer, cheapest first, and print a heading per layer.

A test's layer is the most expensive of its markers in `LAYERS`; a test without any is pure and
starts no processes. Tests marked `slow(reason)` run only with `--slow`, which runs no others.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

import cpkit
from tests.helpers.control_server import ControlServer
from tests.helpers.processes import until

LAYERS = ("pure", "workers", "notebook", "browser", "gpu")
_heading = pytest.StashKey[int]()
_left_out = pytest.StashKey[dict[str, int]]()  # how many tests were not selected, by reason
_seconds = pytest.StashKey[dict[str, float]]()  # by layer

if not torch.cuda.is_available():
    # Set before Triton is imported: its interpreter then runs the kernels on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts background jobs with interrupts ignored, and some tests send interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, and only them")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the slow tests or all others, and sort by layer; keep the order inside a layer."""
    wanted = config.getoption("--slow")
    other = [item for item in items if bool(item.get_closest_marker("slow")) != wanted]
    items[:] = sorted((item for item in items if item not in other), key=layer)
    config.hook.pytest_deselected(items=other)
    reasons = config.stash.setdefault(_left_out, defaultdict(int))
    for item in other:
        marker = item.get_closest_marker("slow")
        if marker:
            reasons[f"{Path(item.path).name}: {marker.args[0] if marker.args else 'slow'}"] += 1


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the time of each layer, and which tests were not selected and why."""
    took = config.stash.get(_seconds, {})
    layers = [f"{name} {took[name]:.0f} s" for name in LAYERS if name in took]
    terminalreporter.write_line(f"Time by layer: {', '.join(layers)}")
    for reason, count in config.stash.get(_left_out, {}).items():
        terminalreporter.write_line(f"left to `make test-all`: {count} of {reason}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Print a heading before the first test of each layer, and add up its time."""
    number = layer(item)
    reporter = item.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and item.config.stash.get(_heading, None) != number:
        reporter.ensure_newline()
        reporter.write_sep("-", f"{LAYERS[number]} tests")
    item.config.stash[_heading] = number
    began = time.monotonic()
    try:
        return (yield)
    finally:
        took = item.config.stash.setdefault(_seconds, defaultdict(float))
        took[LAYERS[number]] += time.monotonic() - began


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Add the page, its console and the server's log to the report of a failed browser test."""
    report = yield
    page = getattr(item, "funcargs", {}).get("notebook")
    if report.failed and page:
        report.sections.append(("the page when it failed", page.describe()))
    return report


def layer(item: pytest.Item) -> int:
    """Return the index into LAYERS of the most expensive layer that the test is marked with."""
    return max(n for n, name in enumerate(LAYERS) if n == 0 or item.get_closest_marker(name))


@pytest.fixture(scope="session")
def runtime_dir() -> Iterator[Path]:
    """Create a Jupyter runtime directory for this session, separate from all other workers."""
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
    """Start four real ranks, shared by all tests that leave them usable."""
    with cpkit.connect("tests", nproc=4) as connected:
        yield connected
        connected.stop()


@pytest.fixture
def the_workers_stay_usable(lab: cpkit.Lab) -> Iterator[None]:
    """After the test, check that the queue is empty and that a gather is right."""
    yield
    until(lambda: lab.status().state == "idle", why="the queue of requests to be empty")
    assert lab.gather([9, 12], 2, heads=1, head_dim=8).verified


@pytest.fixture
def control_server(tmp_path: Path) -> Iterator[ControlServer]:
    """Start a control server without workers."""
    control_server = ControlServer(tmp_path)
    yield control_server
    control_server.close()
