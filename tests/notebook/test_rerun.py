"""Running a cell again: the new panel replaces the old one, and nothing grows."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace

import ipywidgets
import pytest

import cpkit
from cpkit.notebook import cells
from cpkit.notebook.explorer import Explorer
from tests.helpers.processes import until


@pytest.mark.workers
def test_a_new_panel_replaces_one_that_was_never_closed(lab: cpkit.Lab) -> None:
    """Without a cell id (a script, nbval) a new panel replaces the earlier one of its class."""
    counts = []
    for _ in range(5):
        panel = Explorer(lab, lengths=[64], cp_size=2).start()
        panel.wait(samples=3)
        counts.append(resources(lab))
    assert counts[1:] == counts[:-1], "the fifth run has no more than the first"
    assert counts[-1]["explorer threads"] == 1, "one measurement runs"
    panel.close()
    until(lambda: resources(lab)["explorer threads"] == 0)
    until(lambda: lab.status().state == "idle", why="no measurement runs")


def resources(lab: cpkit.Lab) -> dict[str, int]:
    """Return the counts that must not grow."""
    gc.collect()
    names = [thread.name for thread in threading.enumerate()]
    return {
        "threads": len(names),
        "explorer threads": names.count("cpkit-explorer"),
        "widgets": len(ipywidgets.widgets.widget._instances),
        "requests": len(lab._client._waiting),
    }


class Panel:
    """The smallest panel."""

    def __init__(self) -> None:
        cells.replace_previous(self)
        self.closed = False

    def close(self) -> None:
        self.closed = True
        cells.forget(self)


def test_only_an_earlier_run_of_the_same_cell_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def executes(cell: str, request: str) -> None:
        """Simulate an execute request of JupyterLab, as ipykernel stores it."""
        parent = {"header": {"msg_id": request}, "metadata": {"cellId": cell}}
        shell = SimpleNamespace(get_parent=lambda: parent)
        monkeypatch.setattr(cells, "get_ipython", lambda: shell)

    executes("a", "1")
    first, second = Panel(), Panel()
    executes("b", "2")
    other = Panel()
    assert not any(panel.closed for panel in (first, second, other))
    executes("a", "3")
    again = Panel()
    assert first.closed
    assert second.closed
    assert not other.closed
    again.close()
    other.close()
