"""Close the live panels of a cell when the cell runs again.

A panel owns a thread, a measurement and widgets. Running the cell again rebinds its variable, but
that does not stop the old panel. So each panel registers here when it is created.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from IPython.core.getipython import get_ipython


class Closable(Protocol):
    """A panel that can be registered."""

    def close(self) -> None:
        """Stop all work and free all resources. A second call does nothing."""


class Run(NamedTuple):
    """One execution of a cell. `request` is None if the cell is unknown."""

    cell: str
    request: str | None


_panels: dict[Closable, Run] = {}


def replace_previous(panel: Closable) -> None:
    """Close the panels that earlier runs of this cell created, and register `panel`.

    Panels of other cells, and other panels of the same run, stay open: JupyterLab sends the cell's
    id with each execute request. Without an id (a script, nbval, a console) a new panel closes the
    earlier ones of its class.
    """
    run = _current_run() or Run(type(panel).__name__, None)
    previous = [
        old
        for old, made in _panels.items()
        if made.cell == run.cell and (made.request != run.request or run.request is None)
    ]
    for old in previous:
        old.close()
    _panels[panel] = run


def forget(panel: Closable) -> None:
    """Unregister a closed panel."""
    _panels.pop(panel, None)


def _current_run() -> Run | None:
    get_parent = getattr(get_ipython(), "get_parent", dict)  # a terminal's IPython has none
    parent: dict[str, Any] = get_parent()
    cell = parent.get("metadata", {}).get("cellId")
    return Run(cell, parent["header"]["msg_id"]) if cell else None
