"""Describe a set of workers: its size, when and how it was started, and when it ends."""

from __future__ import annotations

import os
import shlex
import socket
import time
from pathlib import PurePath

import psutil

from cpkit.control.errors import ControlError
from cpkit.control.runtime_dir import Connection, RuntimeDir
from cpkit.processes import ProcessId, process_id

ELSEWHERE = "in another container (PID namespace) of this host"
_MAX_COMMAND_CHARS = 80


def describe(connection: Connection) -> str:
    """Return the number of ranks, their start time and owner, and when they end."""
    ranks = f"{connection.world_size} rank{'s' if connection.world_size > 1 else ''}"
    if connection.host != socket.gethostname():
        return f"{ranks}, started on {connection.host}"
    if not connection.is_here():
        return f"{ranks}, started {ELSEWHERE}"
    ranks += _since(connection.agent)
    if connection.owner is None:
        return f"{ranks}, started by launch_workers.sh; they run until they are stopped"
    is_this = connection.owner == process_id()
    owner = f"this process ({os.getpid()})" if is_this else describe_process(connection.owner)
    return f"{ranks}, started by {owner}; they end with it"


def describe_holder(runtime_dir: RuntimeDir) -> str:
    """Describe the workers that hold the lock of a name, even while they start or end."""
    try:
        connection = runtime_dir.connection()
    except ControlError as error:
        return str(error)
    return describe(connection) if connection else "they are starting or ending"


def _since(agent: ProcessId) -> str:
    try:
        started = time.localtime(psutil.Process(agent.pid).create_time())
    except psutil.Error:
        return ""
    return time.strftime(" since %Y-%m-%d %H:%M", started)


def describe_process(owner: ProcessId) -> str:
    """Describe a process: a notebook kernel, `make lab`, or its command line."""
    try:
        process = psutil.Process(owner.pid)
        command = process.cmdline()
        notebook = process.environ().get("JPY_SESSION_NAME", "")  # set by Jupyter for its kernels
    except psutil.Error:
        return f"process {owner.pid}"
    if "ipykernel_launcher" in command:
        name = f" {PurePath(notebook).name}" if notebook else ""
        return f"the notebook{name} (kernel: process {owner.pid})"
    if command[1:3] == ["-m", "cpkit"] and command[3:4] in (["lab"], ["explore"]):
        return f"`make {command[3]}` (process {owner.pid})"
    return f"process {owner.pid} (`{shlex.join(command)[:_MAX_COMMAND_CHARS]}`)"
