"""The process that torchrun starts per rank: start the watchdog, then import and run the worker.

    python -m cpkit.worker.rank        (started by the agent, with its options in the environment)

The watchdog starts before torch is imported, which takes seconds, because without it a rank
outlives a killed agent or owner.
"""

from __future__ import annotations

import logging
import os
import sys
import threading

from cpkit.control.errors import name_the_limit
from cpkit.control.launch_options import Launch, from_environment
from cpkit.control.runtime_dir import (
    Agent,
    RuntimeDir,
    agent_from_environment,
    continue_agent,
)
from cpkit.control.watchdog import start_watchdog
from cpkit.processes import leave


def main() -> None:
    """Start the watchdog, import torch, and run the worker until shutdown."""
    _configure_logging()
    launch, runtime_dir, agent = _read_environment()
    start_watchdog(runtime_dir, agent, launch.owner)
    runtime_dir.set_startup_phase(f"rank {os.environ['RANK']}", "importing torch")
    with name_the_limit():
        from cpkit.worker import main as worker

        worker.main(launch, runtime_dir, agent)
    continue_agent()  # a stopped one would keep its lock
    leave(0)


def _read_environment() -> tuple[Launch, RuntimeDir, Agent]:
    launch, agent = from_environment(), agent_from_environment()
    if not (launch and agent):
        sys.exit(
            "only an agent can start cpkit.worker.rank: use ./launch_workers.sh or cpkit.connect()"
        )
    return launch, RuntimeDir(launch.runtime_dir_name), agent


def _configure_logging() -> None:
    """Write stdout and stderr to one file, in order; exit on an error in any thread."""
    sys.stdout.flush()
    os.dup2(2, 1)
    logging.basicConfig(format=f"%(asctime)s rank {os.environ.get('RANK')} %(message)s")
    threading.excepthook = _exit_on_thread_error


def _exit_on_thread_error(failure: threading.ExceptHookArgs) -> None:
    sys.excepthook(failure.exc_type, failure.exc_value or failure.exc_type(), failure.exc_traceback)
    sys.stderr.flush()
    os._exit(70)


if __name__ == "__main__":
    main()
