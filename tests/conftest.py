"""Puts the layers of the test suite in order, cheapest first, and heads each with its name.

A test's layer is the dearest of its markers in `LAYERS`; one without any is pure: no processes.
"""

from __future__ import annotations

import pytest

LAYERS = ("pure", "workers", "notebook", "browser", "gpu")
_heading = pytest.StashKey[int]()


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
