"""Find the workers of a name, or start them, for a client that ends with its process."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from msgspec import structs

from cpkit.control import launcher, readiness
from cpkit.control.client import Client
from cpkit.control.errors import RankHangs, WorkersDied
from cpkit.control.launch_options import Launch
from cpkit.control.runtime_dir import AlreadyRunning
from cpkit.processes import process_id
from cpkit.settings import workers_name

_ATTEMPTS = 3  # another process may be starting these workers, and fail
_log = logging.getLogger("cpkit")


def attach_or_start(
    name: str,
    nproc: int | None,
    device: Literal["auto", "cpu", "cuda"],
    *,
    launch: bool = True,
    algorithms: str = "",
) -> Client:
    """Return a client of the running workers, or start workers. See `cpkit.connect`.

    Workers started here load the file `algorithms`; those that replace hanging ones, their file.
    """
    if name == "default":
        name = workers_name()
    ranks = Launch().nproc if nproc is None else nproc
    settings = Launch(
        name=name, nproc=ranks, device=device, owner=process_id(), algorithms=algorithms
    )
    settings.check()
    for _ in range(_ATTEMPTS if launch else 0):
        try:
            client = launcher.attach(name, nproc, device)
        except RankHangs as error:
            _log.warning("ending the workers %r, because they hang: %s", name, error)
            if old := readiness.running(name):
                settings = structs.replace(settings, algorithms=old.algorithms)
                settings.check()
            launcher.stop(name)
            client = None
        except WorkersDied as error:  # while the status was requested
            _log.warning("the workers %r have just ended: %s", name, error)
            continue
        if client is not None:
            return client
        _launch(settings)
    return launcher.require(name, nproc, device)


def _launch(settings: Launch) -> None:
    """Start workers and wait for them, or return when another process is starting them."""
    began = time.monotonic()
    with contextlib.suppress(AlreadyRunning):
        agent = launcher.start(settings)
        show, workers = _shown_line(), f"{settings.nproc} workers {settings.name!r}"
        show(f"starting {workers} …")
        launcher.wait_until_ready(agent, settings, lambda text: show(f"starting {workers}: {text}"))
        show(f"{workers} are ready after {time.monotonic() - began:.1f} s")


def _shown_line() -> Callable[[str], object]:
    """Return a function that shows a line: on stderr, or in a notebook in place of the last one."""
    ipython: Any = sys.modules.get("IPython")  # a kernel has it; the library does not need it
    if ipython is None or not hasattr(ipython.get_ipython(), "kernel"):
        return lambda text: sys.stderr.write(f"{text}\n")
    if threading.current_thread() is not threading.main_thread():  # no cell is running it
        return lambda _: None
    handle = ipython.display.display({"text/plain": ""}, raw=True, display_id=True)
    return lambda text: handle.update({"text/plain": text}, raw=True)
