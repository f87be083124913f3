"""The runtime directory: permissions, lock, files; and which launch settings are rejected."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest

import cpkit
from cpkit import doctor
from cpkit.__main__ import main
from cpkit.control import launcher, readiness
from cpkit.control.agent import _make_socket_dir
from cpkit.control.errors import ControlError
from cpkit.control.launch_options import Launch, address_of, from_json, loopback
from cpkit.control.runtime_dir import (
    Agent,
    AlreadyRunning,
    RuntimeDir,
    make_socket_dir,
    remove_socket_dir,
    write_private,
)
from cpkit.processes import process_id
from tests.helpers import ROOT
from tests.helpers.control_server import connection
from tests.helpers.processes import LIMIT_S, in_small_tmpfs, until


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RuntimeDir:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    here = RuntimeDir("here")
    here.create()
    return here


def test_the_connection_file_is_private_and_is_read_as_it_was_written(here: RuntimeDir) -> None:
    assert stat.S_IMODE(here.directory.stat().st_mode) == 0o700
    assert here.connection() is None
    write_private(here.connection_file, connection())
    assert stat.S_IMODE(here.connection_file.stat().st_mode) == 0o600
    assert here.connection() == connection()
    assert [path.name for path in here.directory.iterdir()] == ["connection.json"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o622])
def test_a_file_that_other_users_can_access_is_rejected_with_the_remedy(
    here: RuntimeDir, mode: int
) -> None:
    write_private(here.connection_file, connection())
    here.connection_file.chmod(mode)
    with pytest.raises(ControlError, match=f"mode {mode:04o}.*chmod 600"):
        here.connection()


def test_a_link_is_not_followed(
    here: RuntimeDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_private(tmp_path / "elsewhere", connection())
    here.connection_file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ControlError, match="is a link"):
        here.connection()
    monkeypatch.setattr(here, "check", lambda: True)  # as if the link were planted after it
    with pytest.raises(ControlError, match="symbolic links"):
        here.connection()


def test_a_new_file_replaces_nothing(here: RuntimeDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link is planted under the name of the new file, just before it is made."""
    victim = here.directory / "victim"
    here.directory.joinpath(f".connection.json.{os.getpid()}").symlink_to(victim)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(ControlError, match="File exists"):
        write_private(here.connection_file, connection())
    assert not victim.exists()


def test_only_an_agent_is_stopped(here: RuntimeDir, tmp_path: Path) -> None:
    """The lock names a process of this user that is no agent."""
    with subprocess.Popen(["sleep", "60"]) as process:
        lock = here.acquire_lock()
        os.pwrite(lock, msgspec.json.encode(Agent(process_id(process.pid), str(tmp_path))), 0)
        with pytest.raises(ControlError, match=rf"process {process.pid} .*is no agent of cpkit"):
            launcher.stop("here")
        os.close(lock)
        assert process.poll() is None
        process.kill()


def test_a_directory_that_other_users_can_write_to_is_rejected(here: RuntimeDir) -> None:
    here.directory.chmod(0o777)
    for use in (here.create, here.is_locked, here.agent, here.connection, here.post_mortem):
        with pytest.raises(ControlError, match=r"mode 0777.*look at it first \(ls -la"):
            use()


@pytest.mark.parametrize(
    ("levels", "mode", "words"),
    [(1, 0o770, "look at it first"), (1, 0o777, "look at it first"), (2, 0o777, "can replace")],
)
def test_a_directory_above_that_other_users_can_write_to_is_rejected(
    here: RuntimeDir, levels: int, mode: int, words: str
) -> None:
    """They could put another directory in its place after it was checked."""
    above = here.directory.parents[levels - 1]
    above.chmod(mode)
    for use in (here.create, here.is_locked, here.connection):
        with pytest.raises(ControlError, match=rf"mode {mode:04o}.*{words}.*set JUPYTER_RUNTIME"):
            use()
    above.chmod(0o1777 if levels == 2 else 0o700)  # as /tmp
    here.create()


def test_directories_are_private_whatever_the_umask_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "new"))
    before = os.umask(0o002)
    try:
        RuntimeDir("umask").create()
    finally:
        os.umask(before)
    RuntimeDir("umask").check()


PLANTS = {
    "a lock file of another user": lambda at, path: (path.touch(), os.chown(path, 12345, -1)),
    "a lock file that others can write to": lambda at, path: (path.touch(), path.chmod(0o666)),
    "a link to a file": lambda at, path: path.symlink_to(at / "victim"),
    "a link to a directory": lambda at, path: path.symlink_to(at),
    "a second name of a file": lambda at, path: path.hardlink_to(at / "victim"),
    "a pipe": lambda at, path: os.mkfifo(path),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_what_another_user_planted_is_neither_read_nor_overwritten_nor_stopped(
    here: RuntimeDir, tmp_path: Path, plant: str
) -> None:
    """The directory was writable for a while, and has the mode that it should have again."""
    if plant == "a lock file of another user" and os.geteuid() != 0:
        pytest.skip("only root can make a file of another user")
    victim = tmp_path / "victim"
    with subprocess.Popen(["sleep", "60"]) as process:
        agent = Agent(process_id(process.pid), str(tmp_path / "sockets"))
        victim.write_bytes(msgspec.json.encode(agent))
        for name in ("lock",) if "lock file" in plant else ("lock", "agent.log", "logs"):
            planted = here.directory / name
            PLANTS[plant](tmp_path, planted)
            for use in (here.create, here.is_locked, here.agent, partial(launcher.stop, "here")):
                with pytest.raises(ControlError, match="Another user may have put something"):
                    use()
            planted.unlink()
        assert process.poll() is None
        process.kill()
    assert msgspec.json.decode(victim.read_bytes(), type=Agent) == agent


@pytest.mark.parametrize("content", [b"", b"{", b'{"name": "here"}', b"\x80\x04]."])
def test_a_file_that_is_not_a_connection_file_is_rejected(here: RuntimeDir, content: bytes) -> None:
    here.connection_file.touch(mode=0o600)
    here.connection_file.write_bytes(content)
    with pytest.raises(ControlError, match=r"not written by this version.*stop the workers"):
        here.connection()


def test_a_directory_that_cannot_be_made_is_one_line_that_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "file"))
    with pytest.raises(ControlError, match=r"Not a directory.*set JUPYTER_RUNTIME_DIR"):
        cpkit.connect("x")
    for command in ("start", "status", "stop"):
        assert main([command]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "set JUPYTER_RUNTIME_DIR" in said
    advice = {check.subject: check.advice for check in doctor.examine()}
    assert "set JUPYTER_RUNTIME_DIR" in advice["runtime directory"]


def test_a_user_without_a_home_is_told_what_to_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Containers run as any uid, without a home and without an entry in the list of users."""

    def no_entry(uid: int) -> NoReturn:
        raise KeyError(uid)

    for variable in ("HOME", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    with pytest.raises(ControlError, match="set JUPYTER_RUNTIME_DIR"):
        cpkit.connect("x")
    assert main(["status"]) == main(["lab"]) == 1
    assert "set HOME" in capsys.readouterr().err
    monkeypatch.setenv("CPKIT_SHM_DIR", "/nowhere")
    checks = {check.subject: check for check in doctor.examine()}
    assert "set JUPYTER_RUNTIME_DIR" in checks["runtime directory"].advice
    assert "/nowhere" in checks["shared memory"].advice


def test_a_full_file_system_is_found_before_the_start(here: RuntimeDir) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(ControlError, match=r"too large.*set JUPYTER_RUNTIME_DIR"):
            here.create()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.workers
def test_a_file_system_that_fills_up_during_the_start_is_one_clear_error(tmp_path: Path) -> None:
    """The agent can write neither its log nor a post-mortem, so the launcher finds the cause."""
    code = """
import cpkit, os, threading
from cpkit.control.runtime_dir import RuntimeDir
here = RuntimeDir("fills_up")
def fill():
    while not here.startup_phases():
        pass
    with open(os.path.join(os.environ["JUPYTER_RUNTIME_DIR"], "filler"), "wb", 0) as filler:
        while filler.write(bytes(4096)):
            pass
threading.Thread(target=fill, daemon=True).start()
threading.excepthook = lambda failure: None
try:
    cpkit.connect("fills_up", nproc=1)
except cpkit.ControlError as error:
    print(error)
print(here.agent_log.read_text())
"""
    done = subprocess.run(
        [*in_small_tmpfs(tmp_path, 2), sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    error, *agent_log = done.stdout.splitlines()
    for words in ("did not start: ", "No space left", "set JUPYTER_RUNTIME_DIR"):
        assert words in error, done
    assert "Traceback" not in agent_log + done.stderr.splitlines()


def test_without_a_temporary_directory_the_agent_names_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    with pytest.raises(ControlError, match="Set TMPDIR"):
        _make_socket_dir()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-rf", "x" * 65, "a b", "é"])
def test_a_name_that_is_unsafe_in_a_path_is_rejected(name: str) -> None:
    with pytest.raises(ValueError, match="letters"):
        RuntimeDir(name)


def test_a_name_is_taken_while_its_holder_lives(here: RuntimeDir) -> None:
    code = "import sys, time; from cpkit.control.runtime_dir import RuntimeDir"
    code += "; RuntimeDir('here').acquire_lock(); print(1); sys.stdout.flush(); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert here.is_locked()
        with pytest.raises(AlreadyRunning, match=r"already running.*stop"):
            here.acquire_lock()
        holder.kill()
        holder.wait()
    assert not here.is_locked()
    os.close(here.acquire_lock())


def test_only_the_socket_directory_that_the_agent_made_is_removed(tmp_path: Path) -> None:
    """Whatever the lock file names: a checkout called cpkit-…, a link, or that of other workers."""
    ours = make_socket_dir(str(tmp_path))
    foreign = tmp_path / "cpkit-checkout"
    foreign.mkdir()
    link = tmp_path / "cpkit-link"
    link.symlink_to(ours.socket_dir)
    another = msgspec.structs.replace(ours, process=process_id(os.getppid()))
    for path in (foreign, link, tmp_path / "cpkit-none"):
        remove_socket_dir(msgspec.structs.replace(ours, socket_dir=str(path)))
    remove_socket_dir(another)
    assert foreign.exists()
    assert Path(ours.socket_dir).exists()
    remove_socket_dir(ours)
    assert not Path(ours.socket_dir).exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Launch(nproc=0), "nproc is 0"),
        (Launch(nproc="4"), "nproc is '4'; it must be a whole number"),
        (Launch(nproc=10**30), "1 to 256 ranks"),
        (Launch(device="gpu"), "^device is 'gpu'"),
        (Launch(nnodes=2, node_rank=2, rdzv_endpoint="a:1"), "node ranks are 0 to"),
        (Launch(nnodes=2), "host:port"),
        (Launch(nnodes=2, rdzv_endpoint="a:http"), "host:port"),
        (Launch(max_restarts=-1), "--max-restarts"),
        (Launch(share_gpu=True, device="cpu"), "contradict each other"),
        (Launch(interface="no-such0"), "this machine has .*"),
        (Launch(interface="192.0.2.7"), "192.0.2.7.*address of this machine"),
    ],
)
def test_impossible_settings_are_rejected(settings: Launch, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings.check()


def test_settings_are_decoded_as_they_were_encoded() -> None:
    settings = Launch(name="x", nproc=3, owner=process_id())
    settings.check()
    assert from_json(settings.to_json()) == settings


def test_nodes_that_share_a_home_have_separate_directories() -> None:
    assert Launch(name="x").runtime_dir_name == "x"
    assert Launch(name="x", nnodes=2, node_rank=1).runtime_dir_name == "x.node1"


def test_an_interface_has_an_address() -> None:
    assert address_of(loopback()) == "127.0.0.1"
    assert address_of("127.0.0.2") == "127.0.0.2"


def test_each_startup_phase_renews_the_deadline(
    here: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "READY_S", 0.2)
    deadline = readiness.StartDeadline(here)
    for phase in ("importing torch", "joining the process group"):
        here.set_startup_phase("rank 0", phase)
        assert not deadline.has_passed(), "slow is not stuck"
        time.sleep(0.3)
    until(deadline.has_passed)
    assert "within 0.2 s (rank 0: joining the process group)" in deadline.describe()


def test_the_phases_of_the_ranks_are_shown_once_per_interval(
    here: RuntimeDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "_PROGRESS_S", 0.0)
    shown: list[str] = []
    deadline = readiness.StartDeadline(here, shown.append)
    for process, phase in (
        ("agent", "running torchrun"),
        ("rank 0", "importing torch"),
        ("rank 1", "importing torch"),
        ("rank 0", "joining the process group"),
    ):
        assert not deadline.has_passed()
        here.set_startup_phase(process, phase)
    monkeypatch.setattr(readiness, "_PROGRESS_S", 60.0)
    assert not deadline.has_passed()
    phases = ["starting Python", "running torchrun", "importing torch", "importing torch"]
    assert shown == [f"0 s, {phase}" for phase in phases]
    monkeypatch.setattr(readiness, "_PROGRESS_S", 0.0)
    assert not deadline.has_passed()
    assert shown[-1] == "0 s, joining the process group, importing torch"
