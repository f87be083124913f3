"""Every rank's tie to those it works for: it leaves when its agent or its owner is gone.

torchrun's ranks outlive a killed agent, and a notebook kernel that is killed runs no clean-up. So
each rank looks for itself, four times a second.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from cpkit.control.errors import ControlError
from cpkit.control.runtime_dir import Agent, RuntimeDir, remove_socket_dir
from cpkit.processes import ProcessId

_PERIOD_S = 0.25
_log = logging.getLogger("cpkit")


def watch(place: RuntimeDir, agent: Agent, owner: ProcessId | None) -> None:
    """Start the watch of this process, in a daemon thread."""

    def reason() -> str:
        if os.getppid() != agent.process.pid:
            return "the agent is gone"
        if owner and not owner.is_alive():
            return f"the owner, process {owner.pid}, is gone"
        return ""

    threading.Thread(
        target=_watch, args=(place, agent, reason), name="cpkit watch", daemon=True
    ).start()


def _watch(place: RuntimeDir, agent: Agent, reason: Callable[[], str]) -> None:
    while not (why := reason()):
        time.sleep(_PERIOD_S)
    _log.warning("leaving: %s", why)
    try:
        forget(place, agent)
    finally:
        os._exit(0)  # the main thread may sit in a collective for ever


def forget(place: RuntimeDir, agent: Agent) -> None:
    """Remove the connection file and the socket of `agent`'s workers, not of their successors."""
    remove_socket_dir(agent.socket_dir)
    try:
        connection = place.connection()
    except ControlError:
        return
    if connection and connection.agent == agent.process:
        place.connection_file.unlink(missing_ok=True)
