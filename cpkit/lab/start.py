"""Find the workers of a name, or start them, for a client that ends with its process."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
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
    line = _Line()
    for _ in range(_ATTEMPTS if launch else 0):
        try:
            client = launcher.attach(
                name,
                nproc,
                device,
                on_progress=lambda text: line.show(f"waiting for the workers {name!r}: {text}"),
            )
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
            if line.is_open:
                line.end(f"attached to the workers {name!r}")
            return client
        _launch(settings, line)
    return launcher.require(name, nproc, device)


def _launch(settings: Launch, line: _Line) -> None:
    """Start workers and wait for them, or return when another process is starting them."""
    began, workers = time.monotonic(), f"{settings.nproc} workers {settings.name!r}"
    line.show(f"starting {workers} …")
    try:
        agent = launcher.start(settings)
        launcher.wait_until_ready(
            agent, settings, lambda text: line.show(f"starting {workers}: {text}")
        )
    except AlreadyRunning:
        line.show(f"another process is starting the workers {settings.name!r} …")
    except BaseException:
        line.end(f"the workers {settings.name!r} did not start")
        raise
    else:
        line.end(f"{workers} are ready after {time.monotonic() - began:.1f} s")


class _Line:
    """A line of progress: on stderr, or in a notebook in place of the previous one."""

    def __init__(self) -> None:
        self.is_open = False
        self._handle: Any = None

    def show(self, text: str) -> None:
        """Show a text. Another thread than the main one shows none: no cell is its own."""
        self.is_open = True
        ipython: Any = sys.modules.get("IPython")  # a kernel has it; the library does not need it
        if ipython is None or not hasattr(ipython.get_ipython(), "kernel"):
            with contextlib.suppress(OSError, ValueError):  # stderr was closed
                if sys.stderr:
                    sys.stderr.write(f"{text}\n")
        elif threading.current_thread() is threading.main_thread():
            bundle = {"text/plain": text}
            if self._handle is None:
                self._handle = ipython.display.display(bundle, raw=True, display_id=True)
            else:
                self._handle.update(bundle, raw=True)

    def end(self, text: str) -> None:
        """Show the last text."""
        self.show(text)
        self.is_open = False
