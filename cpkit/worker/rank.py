"""The process that torchrun starts per rank: start the watchdog, then import and run the worker.

    python -m cpkit.worker.rank        (started by the agent, with its options in the environment)

Imports no torch, which takes seconds: before the watchdog runs, a rank would outlive a killed agent
or owner.
"""

from __future__ import annotations

import logging
import os
import sys
import threading

from cpkit.control.launch_options import Launch, from_environment
from cpkit.control.runtime_dir import Agent, RuntimeDir, agent_from_environment
from cpkit.control.watchdog import start_watchdog
from cpkit.processes import leave


def main() -> None:
    """Start the watchdog, import torch, and run the worker until shutdown."""
    _log_to_one_file()
    launch, place, agent = _surroundings()
    start_watchdog(place, agent, launch.owner)
    place.set_startup_phase(f"rank {os.environ['RANK']}", "importing torch")
    from cpkit.worker import main as worker

    worker.main(launch, place, agent)
    leave(0)


def _surroundings() -> tuple[Launch, RuntimeDir, Agent]:
    launch, agent = from_environment(), agent_from_environment()
    if not (launch and agent):
        sys.exit(
            "cpkit.worker.rank is started by an agent: use ./launch_workers.sh or cpkit.connect()"
        )
    return launch, RuntimeDir(launch.place_name), agent


def _log_to_one_file() -> None:
    """Write stdout and stderr to one file, in order; end the process on an error in any thread."""
    sys.stdout.flush()
    os.dup2(2, 1)
    logging.basicConfig(format=f"%(asctime)s rank {os.environ.get('RANK')} %(message)s")
    threading.excepthook = _die_with_thread


def _die_with_thread(failure: threading.ExceptHookArgs) -> None:
    sys.excepthook(failure.exc_type, failure.exc_value or failure.exc_type(), failure.exc_traceback)
    sys.stderr.flush()
    os._exit(70)


if __name__ == "__main__":
    main()
