"""Running a cell again closes the live panels that its previous run created.

A panel owns a thread, a measurement and widgets. When the cell runs again, its variable is rebound,
which does not stop the old panel; so each panel registers here when it is created.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from IPython.core.getipython import get_ipython


class Closable(Protocol):
    """What can be registered."""

    def close(self) -> None:
        """Stop all work and free all resources. May be called twice."""


class Run(NamedTuple):
    """One execution of a cell. `request` is None if the cell is unknown."""

    cell: str
    request: str | None


_panels: dict[Closable, Run] = {}


def replace_previous(panel: Closable) -> None:
    """Close the panels that earlier runs of this cell created, and register `panel`.

    JupyterLab puts the cell's id into each execute request, so panels of other cells, and several
    panels of one run, stay open. Without an id (a script, nbval, a console) a new panel closes the
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
    """Remove a closed panel from the register."""
    _panels.pop(panel, None)


def _current_run() -> Run | None:
    get_parent = getattr(get_ipython(), "get_parent", dict)  # a terminal's IPython has none
    parent: dict[str, Any] = get_parent()
    cell = parent.get("metadata", {}).get("cellId")
    return Run(cell, parent["header"]["msg_id"]) if cell else None
