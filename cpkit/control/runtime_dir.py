"""Where a set of workers keeps what others must find: one directory of mode 0700 a name.

<jupyter runtime directory>/cpkit/<name>/
    lock              held by the agent for as long as it lives: the name is taken iff it is held
    connection.json   endpoint, keys, processes; mode 0600, refused when others could read it
    post_mortem.json  who died of what, written by the agent
    agent.log, logs/  what agent and ranks printed
    steps/            how far each process has got with its start, one file per process
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import time
from pathlib import Path
from typing import TypeVar

import msgspec
from jupyter_core.paths import jupyter_runtime_dir

from cpkit.control.errors import ControlError, Unreadable
from cpkit.control.mps import quit_daemon
from cpkit.control.requests import Message
from cpkit.processes import ProcessId
from cpkit.settings import AGENT, pass_on, passed_on

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
SOCKET_DIR_PREFIX = "cpkit-"
READY = "ready"  # the last step of a rank's start
NAME_TAKEN_CODE = 3  # exit code of an agent that came second
T = TypeVar("T", bound=msgspec.Struct)


class NameTaken(ControlError):
    """Workers of this name run already."""

    def __init__(self, name: str, description: str = "") -> None:
        super().__init__(
            f"workers named {name!r} run already{f' ({description})' if description else ''}: see "
            f"them with `python -m cpkit status --name {name}`, end them with `python -m cpkit "
            f"stop --name {name}`, or choose another name"
        )


class Agent(Message, frozen=True):
    """Who holds the lock, and the directory of the socket, to be removed when it is gone."""

    process: ProcessId
    socket_dir: str

    def export(self) -> None:
        """Put it in the environment for the ranks.

        The lock file will not do: a rank whose agent was killed may find the next agent in it.
        """
        pass_on(AGENT, msgspec.json.encode(self).decode())


def agent_from_environment() -> Agent | None:
    """The agent that started this process; None when none did."""
    text = passed_on(AGENT)
    return msgspec.json.decode(text, type=Agent) if text else None


class Worker(Message, frozen=True):
    """One rank's process and where its output goes."""

    rank: int
    host: str
    process: ProcessId
    log: str


class Connection(Message, frozen=True):
    """All a client needs. Contains secrets: whoever reads this file may give orders."""

    name: str
    endpoint: str
    server_public_key: str
    client_public_key: str
    client_secret_key: str
    protocol: int
    version: str
    host: str
    agent: ProcessId
    owner: ProcessId | None
    workers: tuple[Worker, ...]
    log_dir: str

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.workers)


class Death(Message, frozen=True):
    """One rank that ended, and its last words."""

    rank: int
    pid: int
    exit_code: int
    cause: str
    log_lines: tuple[str, ...]


class PostMortem(Message, frozen=True):
    """The ranks that failed, the root cause first; empty when the agent itself failed."""

    deaths: tuple[Death, ...]
    text: str


class RuntimeDir:
    """The directory of one name. Raises ValueError for a name that is no plain word."""

    def __init__(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"name is {name!r}; use up to 64 letters, digits, dots, dashes and underscores"
            )
        self.name = name
        self.directory = Path(jupyter_runtime_dir()) / "cpkit" / name
        self.connection_file = self.directory / "connection.json"
        self.lock_file = self.directory / "lock"
        self.post_mortem_file = self.directory / "post_mortem.json"
        self.agent_log = self.directory / "agent.log"
        self.log_dir = self.directory / "logs"
        self.steps_dir = self.directory / "steps"

    def make(self) -> None:
        """Create the directory, for this user alone. Raises ControlError if others may write."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.directory.lstat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise ControlError(
                f"{self.directory} belongs to uid {found.st_uid} with mode "
                f"{stat.S_IMODE(found.st_mode):04o}; it must be yours alone: "
                f"remove it, or run chmod 700 on it"
            )

    # ------------------------------------------------------------------- the lock

    def hold(self) -> int:
        """Take the name for the life of this process; the file descriptor. Raises NameTaken."""
        self.make()
        lock = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for _ in range(25):  # somebody may be looking (`is_held`) at this very moment
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError:
                time.sleep(0.01)
        os.close(lock)
        raise NameTaken(self.name)

    def is_held(self) -> bool:
        """Whether an agent of this name lives."""
        try:
            lock = os.open(self.lock_file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def agent(self) -> Agent | None:
        """The agent that holds the lock, or held it last."""
        return _read(self.lock_file, Agent)

    # ------------------------------------------------------------------ the files

    def connection(self) -> Connection | None:
        """The connection file. Raises ControlError when others could have read or written it."""
        try:
            handle = os.open(self.connection_file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ControlError(f"{self.connection_file}: {error.strerror}; remove it") from error
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            _refuse_loose(self.connection_file, found)
            if not stat.S_ISREG(found.st_mode):
                raise ControlError(f"{self.connection_file} is no plain file; remove it")
            return _parse(self.connection_file, file.read(), Connection)

    def post_mortem(self) -> PostMortem | None:
        """What the agent wrote about the end of the workers, if it did."""
        return _read(self.post_mortem_file, PostMortem)

    def note_step(self, process: str, step: str) -> None:
        """Record which step of the start a process is in, for those who wait for it."""
        with contextlib.suppress(OSError):  # the directory was removed, so no one waits
            self.steps_dir.mkdir(mode=0o700, exist_ok=True)
            (self.steps_dir / process).write_text(step)

    def steps(self) -> dict[str, str]:
        """The step of each process of this set of workers."""
        found = {}
        for path in sorted(self.steps_dir.glob("*")):
            with contextlib.suppress(OSError):  # a new set of workers has just removed it
                found[path.name] = path.read_text()
        return found

    def clean(self) -> None:
        """Remove what only living workers need: the connection file and the socket's directory."""
        agent = self.agent()
        self.connection_file.unlink(missing_ok=True)
        if agent:
            remove_socket_dir(agent.socket_dir)


def write_private(path: Path, message: msgspec.Struct) -> None:
    """Write a struct as JSON, mode 0600 from the first byte, that appears all at once."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(message), indent=1))
    fresh.replace(path)


def remove_socket_dir(directory: str) -> None:
    """Remove a socket's directory, if it is one of ours."""
    path = Path(directory)
    if not path.name.startswith(SOCKET_DIR_PREFIX) or path.is_symlink() or not path.is_dir():
        return
    if path.stat().st_uid == os.geteuid():
        quit_daemon(path)
        shutil.rmtree(path, ignore_errors=True)


def _refuse_loose(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ControlError(
            f"{path} belongs to uid {found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}; it "
            f"holds keys, so it must be yours with mode 0600. If nobody else had a hand in it: "
            f"chmod 600 {path}. Else stop the workers and start them again."
        )


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return _parse(path, path.read_bytes(), kind)
    except (FileNotFoundError, ControlError):
        return None


def _parse(path: Path, data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(
            f"{path} is not a connection file of this version of cpkit ({error}). Remove it, or "
            f"stop the workers with the version that started them."
        ) from error
