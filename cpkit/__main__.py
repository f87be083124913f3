"""The command line: `python -m cpkit start|status|logs|stop|doctor|lab|explore`."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from importlib.util import find_spec
from pathlib import Path

from jupyter_core.paths import jupyter_config_dir

from cpkit.control import launcher, readiness
from cpkit.control.errors import ControlError
from cpkit.control.launch_options import Launch
from cpkit.control.messages import Status, StatusResult
from cpkit.control.origin import describe
from cpkit.control.tied import tied
from cpkit.notebook import workspace
from cpkit.os_errors import describe as describe_error
from cpkit.processes import ProcessId, process_id, run_command

_EXPLORER = Path(workspace.__file__).with_name("explore.ipynb")
_FIRST_NOTEBOOK = "01_padding_and_reorg.ipynb"
_NOT_RUNNING = 3  # exit code of `status`, as in init scripts


def main(arguments: list[str] | None = None) -> int:
    """Run one command, and return its exit code."""
    options, rest = _parser().parse_known_args(arguments)
    if rest and options.command not in ("lab", "explore"):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _COMMANDS[options.command](options, rest)
    except (ControlError, ValueError, OSError) as error:
        print(f"cpkit: {describe_error(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def start(options: argparse.Namespace, _: list[str]) -> int:
    """Start workers that run until they are stopped, or until the --owner process ends."""
    settings = Launch(
        name=options.name,
        nproc=options.nproc,
        device=options.device,
        nnodes=options.nnodes,
        node_rank=options.node_rank,
        rdzv_endpoint=options.rdzv_endpoint,
        interface=options.interface,
        max_restarts=options.max_restarts,
        owner=_owner(options.owner),
        share_gpu=options.share_gpu,
        algorithms=_path(options.algorithms),
    )
    settings.check()
    if options.foreground:
        command = [sys.executable, "-m", "cpkit.control.agent", settings.to_json()]
        os.execv(sys.executable, command)  # noqa: S606 - no shell is what we want
    print(_start(settings))
    return 0


def status(options: argparse.Namespace, _: list[str]) -> int:
    """Print the state of the workers; exit with code 3 if none are running."""
    client = launcher.attach(options.name)
    if client is None:
        others = [name for name in launcher.names() if name != options.name]
        hint = f" Running: {', '.join(others)}." if others else ""
        print(f"no workers named {options.name!r} are running on this machine.{hint}")
        return _NOT_RUNNING
    from cpkit.lab import Lab

    with Lab(client) as lab:
        print(lab.status())
    return 0


def logs(options: argparse.Namespace, _: list[str]) -> int:
    """Print the last lines of the logs of the agent and the ranks."""
    files = launcher.log_files(options.name)
    if not files:
        print(f"there are no logs of workers named {options.name!r}", file=sys.stderr)
        return 1
    if options.follow:
        tail = shutil.which("tail")
        if tail is None:
            listed = " ".join(map(str, files))
            raise ValueError(f"--follow needs the program tail, which is not in PATH: {listed}")
        sys.stdout.flush()
        command = ["tail", f"-n{options.lines}", "-F", *map(str, files)]
        os.execv(tail, command)  # noqa: S606 - no shell is what we want
    for file in files:
        print(f"==> {file} <==")
        with file.open(encoding="utf-8", errors="replace") as lines:
            print("".join(deque(lines, maxlen=options.lines)) or "(empty)\n")
    return 0


def stop(options: argparse.Namespace, _: list[str]) -> int:
    """Stop the workers, and return when they have ended."""
    stopped = launcher.stop(options.name)
    print(f"workers {options.name!r} {'are stopped' if stopped else 'were not running'}")
    return 0


def doctor(_: argparse.Namespace, __: list[str]) -> int:
    """Print what this machine supports, what is missing, and what to do about it."""
    from cpkit.doctor import report

    print(report())
    return 0


def lab(options: argparse.Namespace, rest: list[str]) -> int:
    """Start workers if none are running, and open JupyterLab; workers started here stop with it."""
    _check_home()
    for message in workspace.refresh():
        print(message, flush=True)
    print(_workers_for_lab(options), flush=True)
    return _run_jupyter(["jupyterlab", *_lab_options(), *rest], options.name)


def explore(options: argparse.Namespace, rest: list[str]) -> int:
    """Start workers if none are running, and open the explorer alone on a page of 127.0.0.1."""
    _check_home()
    if find_spec("voila") is None:
        raise ControlError("the page needs Voilà, which is not installed: pip install voila")
    print(_workers_for_lab(options), flush=True)
    serve = ["--Voila.ip=127.0.0.1", "--token"]  # a new token, which the printed address contains
    return _run_jupyter(["voila", str(_EXPLORER), *serve, *rest], options.name)


def _run_jupyter(module: list[str], name: str) -> int:
    """Run a server of notebooks until it ends; then stop workers that were started here."""
    jupyter = subprocess.Popen(
        # These servers stop their kernels on SIGTERM.
        tied([sys.executable, "-m", *module], signal.SIGTERM),
        env=_lab_environment(name),
    )
    signal.signal(signal.SIGTERM, lambda *_: jupyter.terminate())
    # In a terminal the server receives Ctrl-C too; JupyterLab asks for confirmation.
    in_terminal = sys.stdin is not None and sys.stdin.isatty()
    signal.signal(signal.SIGINT, signal.SIG_IGN if in_terminal else lambda *_: jupyter.terminate())
    code = jupyter.wait()
    connection = readiness.running(name)
    if connection and connection.owner == process_id():
        launcher.stop(name)
    return code


def _check_home() -> None:
    """Raise ControlError where JupyterLab would fail because the user has no home directory."""
    try:
        jupyter_config_dir()
    except RuntimeError as error:
        raise ControlError(
            f"JupyterLab cannot start ({error}): set HOME to a directory that you can write to"
        ) from error


def _workers_for_lab(options: argparse.Namespace) -> str:
    """Attach to these workers, or start workers that this process owns; return a message."""
    name = options.name
    algorithms = _path(options.algorithms)
    client = launcher.attach(name, options.nproc, options.device, algorithms)
    if client is None:
        settings = Launch(
            name=name,
            nproc=Launch().nproc if options.nproc is None else options.nproc,
            device=options.device,
            share_gpu=options.share_gpu,
            owner=process_id(),
            algorithms=algorithms,
        )
        return _start(settings)
    with client:
        return (
            f"workers {name!r} are already running and will be used: "
            f"{describe(client.connection)}.\n"
            f"To stop them: ./launch_workers.sh stop --name {name}. "
            f"To start separate workers: make {options.command} NAME=another-name"
        )


def _lab_options() -> list[str]:
    """Return options that open the first notebook, and permit root, which containers need."""
    folder = workspace.WORKSPACE
    options = [
        f"--ServerApp.root_dir={folder.parent}",
        f"--LabApp.default_url=/lab/tree/{folder.name}/{_FIRST_NOTEBOOK}",
    ]
    return [*options, "--allow-root"] if os.geteuid() == 0 else options


def _lab_environment(name: str) -> dict[str, str]:
    """Return an environment with the workers' name and cpkit's JupyterLab defaults.

    The user's own JupyterLab settings have priority.
    """
    own = os.environ.get("JUPYTER_CONFIG_PATH", "")
    path = os.pathsep.join(filter(None, [own, str(workspace.JUPYTER_DEFAULTS)]))
    return {**os.environ, "CPKIT_NAME": name, "JUPYTER_CONFIG_PATH": path}


def _start(settings: Launch) -> str:
    """Start workers, wait until they are ready, and return a message for the user."""
    began = time.monotonic()

    def show(progress: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"starting the workers {settings.name!r}: {progress}\n")

    launcher.wait_until_ready(launcher.start(settings), settings, show)
    took_s = time.monotonic() - began
    if settings.node_rank > 0:
        return (
            f"node {settings.node_rank} of {settings.nnodes} has started its {settings.nproc} ranks"
        )
    return (
        f"{settings.nproc * settings.nnodes} workers {settings.name!r} are ready after "
        f"{took_s:.1f} s, {_where(settings.name)}. In a notebook: cpkit.connect({settings.name!r})"
    )


def _where(name: str) -> str:
    """Return the workers' device and symmetric-memory backend as text."""
    with launcher.require(name) as client:
        reply = client.call(Status(), StatusResult)
    return f"on {reply.device} ({reply.symmetric_backend})"


def _path(file: str) -> str:
    """Return the absolute path of a file, with links resolved; "" for none."""
    return str(Path(file).resolve()) if file else ""


def _owner(pid: int | None) -> ProcessId | None:
    try:
        return process_id(pid) if pid is not None else None
    except ProcessLookupError:
        raise ValueError(
            f"--owner is {pid}, which is not a running process; pass the pid of one"
        ) from None


_COMMANDS = {
    "start": start,
    "status": status,
    "logs": logs,
    "stop": stop,
    "doctor": doctor,
    "lab": lab,
    "explore": explore,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cpkit",
        description="Start, inspect and stop the workers, and check what this machine supports.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {
        name: commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        for name, command in _COMMANDS.items()
    }
    for name in ("start", "status", "logs", "stop", "lab", "explore"):
        parsers[name].add_argument(
            "--name", default="default", help="name of the set of workers (default: default)"
        )
    for name in ("start", "lab", "explore"):
        _add_size(parsers[name])
    parsers["start"].set_defaults(nproc=Launch().nproc)
    _add_start(parsers["start"])
    parsers["logs"].add_argument(
        "--lines", type=int, default=40, help="number of lines to show per log (default: 40)"
    )
    parsers["logs"].add_argument(
        "--follow", action="store_true", help="show new lines until interrupted"
    )
    for name, server, example in (
        ("lab", "JupyterLab", "--port 8889 --no-browser"),
        ("explore", "Voilà", "--theme=dark --port=8889 --no-browser"),
    ):
        parsers[name].epilog = f"Other arguments are passed to {server}, for example {example}."
    return parser


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nproc", type=int, help="ranks on this machine (default: 4)")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device of the ranks (default: auto, which is cuda where torch sees a GPU)",
    )
    parser.add_argument(
        "--share-gpu",
        action="store_true",
        help="run all ranks on the first GPU (default: use all GPUs, and share them if needed)",
    )
    parser.add_argument(
        "--algorithms",
        default="",
        metavar="FILE",
        help="verify the gather algorithms of a Python file of yours, and offer them to clients",
    )


def _add_start(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--nnodes", type=int, default=1, help="number of machines in the job (default: 1)")
    add(
        "--node-rank",
        type=int,
        default=0,
        help="index of this machine; machine 0 serves the control socket (default: 0)",
    )
    add(
        "--rdzv-endpoint",
        default="",
        metavar="HOST:PORT",
        help="address of node 0, the same on all nodes",
    )
    add(
        "--interface",
        default="",
        help="serve TCP on this interface or address (default: a private ipc socket)",
    )
    add(
        "--max-restarts",
        type=int,
        default=0,
        help="restart the ranks after a failure, at most N times (default: 0)",
        metavar="N",
    )
    add(
        "--owner",
        type=int,
        metavar="PID",
        help="stop when this process ends (default: run until stopped)",
    )
    add("--foreground", action="store_true", help="stay in this terminal, for srun or a container")


if __name__ == "__main__":
    run_command(main)
