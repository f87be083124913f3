"""A rank's watchdog: end the process when its agent or its owner has ended.

Otherwise a rank would outlive a killed agent or notebook kernel, neither of which can clean up.
Each rank checks both four times per second.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable

from cpkit.control.errors import ControlError
from cpkit.control.runtime_dir import (
    Agent,
    RuntimeDir,
    continue_agent,
    remove_socket_dir,
)
from cpkit.control.tied import signal_when_parent_ends
from cpkit.processes import ProcessId

_PERIOD_S = 0.25
_log = logging.getLogger("cpkit")


def start_watchdog(runtime_dir: RuntimeDir, agent: Agent, owner: ProcessId | None) -> None:
    """Start the watchdog of this process in a daemon thread.

    If this process is stopped when its agent ends, it is continued, so that the watchdog runs.
    """
    signal_when_parent_ends(signal.SIGCONT)

    def exit_reason() -> str:
        if os.getppid() != agent.process.pid:
            return "the agent has ended"
        if owner and not owner.is_alive():
            return f"the owner, process {owner.pid}, has ended"
        return ""

    threading.Thread(
        target=_run, args=(runtime_dir, agent, exit_reason), name="cpkit watchdog", daemon=True
    ).start()


def remove_connection(runtime_dir: RuntimeDir, agent: Agent) -> None:
    """Remove the socket and the connection file of an agent, but not those of a later agent."""
    remove_socket_dir(agent)
    try:
        connection = runtime_dir.connection()
    except ControlError:
        return
    if connection and connection.agent == agent.process:
        runtime_dir.connection_file.unlink(missing_ok=True)


def _run(runtime_dir: RuntimeDir, agent: Agent, exit_reason: Callable[[], str]) -> None:
    while not (reason := exit_reason()):
        time.sleep(_PERIOD_S)
    _log.warning("exiting: %s", reason)
    try:
        continue_agent()  # a stopped one would keep its lock
        remove_connection(runtime_dir, agent)
    finally:
        os._exit(0)  # the main thread may block in a collective forever
