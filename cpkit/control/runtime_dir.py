"""The runtime directory of a set of workers: one directory of mode 0700 per name.

All files are trusted, because only this user can write to the directory and to the one above it.
Both are checked before each use, and every file for what was planted before.

<jupyter runtime directory>/cpkit/<name>/
    lock              locked by the agent while it runs; the name is free when it is not locked
    connection.json   endpoint, keys, processes; mode 0600; not read if other users can access it
    post_mortem.json  which ranks died and why, written by the agent
    agent.log, logs/  output of the agent and of the ranks
    startup/          the startup phase of each process, one file per process
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
from jupyter_core.paths import jupyter_runtime_dir

from cpkit.control.errors import ControlError, Unreadable, name_the_limit
from cpkit.control.mps import quit_daemon
from cpkit.control.requests import Message
from cpkit.os_errors import describe, lacks_descriptors
from cpkit.packing import describe_types
from cpkit.processes import ProcessId, command, process_id
from cpkit.settings import AGENT, pass_on, passed_on

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
SOCKET_DIR_PREFIX = "cpkit-"
_OWNER_FILE = "agent.json"  # in the socket directory: the agent that made it
_NEEDED_BYTES = 1 << 20  # for logs and files, checked before the start
READY = "ready"  # the last startup phase of a rank
ALREADY_RUNNING_CODE = 3  # exit code of an agent whose name is locked
SET_RUNTIME_DIR = "set JUPYTER_RUNTIME_DIR to a directory that you can write to"
T = TypeVar("T", bound=msgspec.Struct)


class AlreadyRunning(ControlError):
    """Workers of this name are running."""

    def __init__(self, name: str, description: str = "") -> None:
        details = f" ({description})" if description else ""
        super().__init__(
            f"workers named {name!r} are already running{details}: show them with "
            f"`{command('status', name)}`, stop them with `{command('stop', name)}`, or choose "
            f"another name"
        )


class Agent(Message, frozen=True):
    """The process that holds the lock, and the socket directory to remove after it has ended."""

    process: ProcessId
    socket_dir: str

    def export(self) -> None:
        """Store this agent in the environment, for the ranks.

        The ranks cannot use the lock file: after a kill, it may already contain the next agent.
        """
        pass_on(AGENT, msgspec.json.encode(self).decode())


def agent_from_environment() -> Agent | None:
    """Return the agent that started this process, or None."""
    text = passed_on(AGENT)
    return msgspec.json.decode(text, type=Agent) if text else None


def continue_agent() -> None:
    """Continue this rank's agent if it is stopped, because only the agent ends the other ranks."""
    agent = agent_from_environment()
    if agent:
        agent.process.send(signal.SIGCONT)


class Worker(Message, frozen=True):
    """One rank's process, its log file, and its device: "cpu", or the number and id of its GPU."""

    rank: int
    host: str
    process: ProcessId
    log: str
    device: str


class Connection(Message, frozen=True):
    """What a client needs to connect. Contains the secret key that authorizes requests."""

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
    algorithms: str = ""  # the file with the user's own, and the digest of what was loaded
    algorithms_digest: str = ""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.workers)

    def is_here(self) -> bool:
        """Return True when the process ids are of this machine and PID namespace."""
        return self.host == socket.gethostname() and self.agent.is_here()


class Death(Message, frozen=True):
    """One rank that died, with the last lines of its log.

    Of a rank that hung, or was refused, `exit_code` is None, and `cause` says why the workers end.
    """

    rank: int
    pid: int
    exit_code: int | None
    cause: str
    log_lines: tuple[str, ...]


class PostMortem(Message, frozen=True):
    """Why the workers ended, in words.

    `deaths`: the ranks that died, the root cause first; empty when no rank was at fault.
    """

    deaths: tuple[Death, ...]
    text: str


def runtime_root() -> Path:
    """Return the directory of all names. Raises ControlError for a user without a home."""
    try:
        return Path(jupyter_runtime_dir()) / "cpkit"
    except RuntimeError as error:
        raise ControlError(
            f"this user has no runtime directory ({error}): {SET_RUNTIME_DIR}"
        ) from error


@contextlib.contextmanager
def in_words() -> Iterator[None]:
    """Raise ControlError, with a remedy, for an OSError of a file in the runtime directory."""
    try:
        with name_the_limit():
            yield
    except OSError as error:
        raise ControlError(
            f"cannot use the runtime directory: {error}. To use another, {SET_RUNTIME_DIR}"
        ) from error


class RuntimeDir:
    """The directory of one name. Its methods raise ControlError when its files cannot be used.

    The constructor raises ValueError for a name that is unsafe in a path, and ControlError for a
    user without a home.
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            hint = f". For {name} ranks, use nproc={name}" if isinstance(name, int) else ""
            raise ValueError(
                f"name is {name!r:.80}; it must be text of up to 64 letters, digits, dots, dashes "
                f"and underscores{hint}"
            )
        self.name = name
        self.directory = runtime_root() / name
        self.connection_file = self.directory / "connection.json"
        self.lock_file = self.directory / "lock"
        self.post_mortem_file = self.directory / "post_mortem.json"
        self.hang_file = self.directory / "hang.json"
        self.agent_log = self.directory / "agent.log"
        self.log_dir = self.directory / "logs"
        self.startup_dir = self.directory / "startup"

    def check(self) -> bool:
        """Return whether the directory exists.

        Raises ControlError when another user can write to it, or may have put something into it
        while that was possible: a lock file that names a foreign process to stop, or a link through
        which a file elsewhere would be overwritten.
        """
        with in_words():
            try:
                found = self.directory.lstat()
            except FileNotFoundError:
                return False
            _check_parents(self.directory)
            _check_owner(self.directory, found, stat.S_ISDIR(found.st_mode), 0o022)
            # `connection` checks its own file.
            read = {self.lock_file, self.post_mortem_file, self.hang_file}
            for path in self.directory.iterdir():
                with contextlib.suppress(FileNotFoundError):  # removed since
                    held = path.lstat()
                    is_file = stat.S_ISREG(held.st_mode) and held.st_nlink < 2
                    is_plain = is_file or stat.S_ISDIR(held.st_mode)
                    _check_owner(path, held, is_plain, 0o022 if path in read else 0)
        return True

    def create(self) -> None:
        """Create the directory for this user. Raises what `check` raises."""
        with in_words():
            self.directory.parent.parent.mkdir(parents=True, exist_ok=True)
            for directory in (self.directory.parent, self.directory):
                directory.mkdir(mode=0o700, exist_ok=True)
        self.check()
        with in_words(), tempfile.TemporaryFile(dir=self.directory) as probe:
            probe.write(bytes(_NEEDED_BYTES))  # is the file system full?

    def acquire_lock(self) -> int:
        """Lock the name until this process ends; return the descriptor. Raises AlreadyRunning."""
        self.create()
        with in_words():
            lock = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            for _ in range(25):  # `is_locked` in another process locks the file for a moment
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return lock
                except BlockingIOError:
                    time.sleep(0.01)
        os.close(lock)
        raise AlreadyRunning(self.name)

    def is_locked(self) -> bool:
        """Return True while an agent of this name is running, also in another container."""
        self.check()
        with in_words():
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
        """Return the agent that holds the lock or was the last to hold it, or None."""
        self.check()
        return _read(self.lock_file, Agent)

    def connection(self) -> Connection | None:
        """Read the connection file. Raises ControlError when other users can access it."""
        self.check()
        try:
            handle = os.open(self.connection_file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            remedy = "" if lacks_descriptors(error) else "; remove it"
            raise ControlError(f"{describe(error)}{remedy}") from error
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            _check_private(self.connection_file, found)
            if not stat.S_ISREG(found.st_mode):
                raise ControlError(f"{self.connection_file} is not a regular file; remove it")
            return _parse(self.connection_file, file.read(), Connection)

    def post_mortem(self) -> PostMortem | None:
        """Return the agent's post-mortem of the workers, or None."""
        self.check()
        return _read(self.post_mortem_file, PostMortem)

    def hang(self) -> Death | None:
        """Return the rank whose hang or fault ended the workers, as a rank reported it, or None."""
        self.check()
        return _read(self.hang_file, Death)

    def record_end(self, report: PostMortem) -> None:
        """Record why the workers end, unless that is recorded. Raises ControlError."""
        if not self.post_mortem():
            write_private(self.post_mortem_file, report)

    def set_startup_phase(self, process: str, phase: str) -> None:
        """Record the startup phase of a process, for the launcher that waits for the workers."""
        with contextlib.suppress(OSError):  # the directory was removed
            self.startup_dir.mkdir(mode=0o700, exist_ok=True)
            (self.startup_dir / process).write_text(phase)

    def startup_phases(self) -> dict[str, str]:
        """Return the startup phase of each process."""
        phases = {}
        with contextlib.suppress(OSError):  # a new set of workers has just removed the directory
            for path in sorted(self.startup_dir.iterdir()):
                phases[path.name] = path.read_text()
        return phases

    def clean(self) -> None:
        """Remove the connection file and the socket directory, which only running workers need."""
        agent = self.agent()
        with in_words():
            self.connection_file.unlink(missing_ok=True)
        if agent:
            remove_socket_dir(agent)


def write_private(path: Path, message: msgspec.Struct) -> None:
    """Write a struct as JSON, atomically; the file has mode 0600 from its creation."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with in_words():
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(message), indent=1))
            temporary.replace(path)
        except OSError:  # the file system is full
            temporary.unlink()
            raise


def make_socket_dir(parent: str) -> Agent:
    """Make a private directory for the sockets of this process; return this process as its agent.

    Raises OSError.
    """
    agent = Agent(process_id(), tempfile.mkdtemp(prefix=SOCKET_DIR_PREFIX, dir=parent))
    directory = Path(agent.socket_dir)
    try:
        (directory / _OWNER_FILE).write_bytes(msgspec.json.encode(agent))
    except OSError:
        shutil.rmtree(directory)
        raise
    return agent


def remove_socket_dir(agent: Agent) -> None:
    """Remove the socket directory that this agent made, and stop its MPS daemon."""
    path = Path(agent.socket_dir)
    if path.is_symlink() or not path.is_dir() or path.stat().st_uid != os.geteuid():
        return
    if _read(path / _OWNER_FILE, Agent) == agent:
        quit_daemon(path)
        shutil.rmtree(path, ignore_errors=True)


def _check_parents(directory: Path) -> None:
    """Check that no other user can put another directory in the place of this one."""
    parent, jupyters = directory.parent, directory.parent.parent
    found = parent.stat()
    _check_owner(parent, found, is_plain=True, forbidden=0o022)
    found = jupyters.stat()
    trusted = (os.geteuid(), 0, Path("/").stat().st_uid)  # root has another uid in a container
    is_safe = not found.st_mode & stat.S_IWOTH or found.st_mode & stat.S_ISVTX
    if found.st_uid not in trusted or not is_safe:
        raise ControlError(
            f"{jupyters} belongs to uid {found.st_uid} with mode "
            f"{stat.S_IMODE(found.st_mode):04o}, so another user can replace what is in it: "
            f"{SET_RUNTIME_DIR} and they cannot"
        )


def _check_owner(path: Path, found: os.stat_result, is_plain: bool, forbidden: int) -> None:
    """Check the owner of a file or directory, that it is no link, and its mode's forbidden bits."""
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid == os.geteuid() and is_plain and not mode & forbidden:
        return
    what = f"belongs to uid {found.st_uid} with mode {mode:04o}"
    if not is_plain:
        what = "is a link, or neither a file nor a directory"
    raise ControlError(
        f"{path} {what}; it must be an ordinary one of uid {os.geteuid()} that no other user can "
        f"write to. Another user may have put something there: look at it first "
        f"(ls -la {shlex.quote(str(path.parent))}), then remove it and start again, or "
        f"{SET_RUNTIME_DIR}"
    )


def _check_private(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ControlError(
            f"{path} belongs to uid {found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}; it "
            f"contains keys, so it must belong to uid {os.geteuid()} with mode 0600. If no other "
            f"user can have changed it, run chmod 600 {path}; otherwise stop the workers and start "
            f"them again"
        )


def _read(path: Path, kind: type[T]) -> T | None:
    with in_words(), contextlib.suppress(FileNotFoundError, Unreadable):
        return _parse(path, path.read_bytes(), kind)
    return None


def _parse(path: Path, data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(
            f"{path} was not written by this version of cpkit ({error}): stop the workers with the "
            f"cpkit that started them, or remove the file"
        ) from error


describe_types(Agent, Worker, Connection, PostMortem)
