"""cpkit: see, measure and write the context-parallel all-gather of a KV cache.

`cpkit.connect()` connects a notebook to its workers. Code that runs inside a rank imports
`cpkit.layout`, `cpkit.group`, `cpkit.symm` and `cpkit.gather`. Importing `cpkit` itself loads
neither torch nor pandas.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpkit.control.errors import (
        BadRequest,
        Cancelled,
        ControlError,
        NoAnswer,
        NoWorkers,
        OtherWorkers,
        RequestFailed,
        WorkersBusy,
        WorkersDied,
    )
    from cpkit.lab import Lab, connect
    from cpkit.notebook.explorer import Explorer
    from cpkit.notebook.takeaway import load_samples

__version__ = "0.1.0"

_MODULES = {
    "Explorer": "cpkit.notebook.explorer",
    "Lab": "cpkit.lab.lab",
    "connect": "cpkit.lab.lab",
    "load_samples": "cpkit.notebook.takeaway",
    "BadRequest": "cpkit.control.errors",
    "Cancelled": "cpkit.control.errors",
    "ControlError": "cpkit.control.errors",
    "NoAnswer": "cpkit.control.errors",
    "NoWorkers": "cpkit.control.errors",
    "OtherWorkers": "cpkit.control.errors",
    "RequestFailed": "cpkit.control.errors",
    "WorkersBusy": "cpkit.control.errors",
    "WorkersDied": "cpkit.control.errors",
}

__all__ = [
    "BadRequest",
    "Cancelled",
    "ControlError",
    "Explorer",
    "Lab",
    "NoAnswer",
    "NoWorkers",
    "OtherWorkers",
    "RequestFailed",
    "WorkersBusy",
    "WorkersDied",
    "connect",
    "load_samples",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'cpkit' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
