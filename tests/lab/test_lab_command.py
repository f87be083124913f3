"""`python -m cpkit lab` (`make lab`), and later clients of the workers that it started."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

import cpkit
from cpkit.__main__ import _parser, _workers_for_lab, main
from cpkit.control.origin import describe
from cpkit.control.runtime_dir import Connection, RuntimeDir, write_private
from cpkit.processes import ProcessId, process_id
from tests.helpers import ROOT
from tests.helpers.control_server import connection
from tests.helpers.processes import left_after, processes_with, until

pytestmark = pytest.mark.workers


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """Run `make lab` with one rank, named "met"; check that it leaves no process behind."""
    home = tmp_path_factory.mktemp("lab")
    names = ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")
    names += ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    log = (home / "log").open("w+")
    command = [sys.executable, "-m", "cpkit", "lab", "--name=met", "--nproc=1", "--no-browser"]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setenv(name, str(home / name))
        lab = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, text=True)

        def text() -> str:
            return (home / "log").read_text()

        until(lambda: "/lab/tree/workspace/01_padding" in text() or lab.poll(), 60)
        assert lab.poll() is None, text()
        yield lab
        lab.terminate()
        lab.wait(20)
        left = left_after(
            10, lambda: list(processes_with("JUPYTER_RUNTIME_DIR", home / names[0]).values())
        )
        assert left == []
        assert "1 workers 'met' are ready" in text()
        log.close()


def move_away(here: RuntimeDir, elsewhere: Path) -> None:
    here.connection_file.rename(elsewhere)


def name_another_agent(here: RuntimeDir, elsewhere: Path) -> None:
    connection = here.connection()
    here.connection_file.rename(elsewhere)
    other = msgspec.structs.replace(connection, agent=process_id(), owner=None)
    write_private(here.connection_file, other)


def name_no_socket(here: RuntimeDir, elsewhere: Path) -> None:
    connection = here.connection()
    here.connection_file.rename(elsewhere)
    other = msgspec.structs.replace(connection, endpoint="ipc:///tmp/cpkit-removed/control")
    write_private(here.connection_file, other)


def forget_rank_0(here: RuntimeDir, elsewhere: Path) -> None:
    here.connection_file.rename(elsewhere)
    (here.startup_dir / "rank 0").rename(here.startup_dir / "rank 2")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (move_away, "connection.json was removed"),
        (name_another_agent, "connection.json is of other workers"),
        (name_no_socket, "socket /tmp/cpkit-removed/control was removed"),
        (forget_rank_0, "rank 0 serves on another node"),
    ],
)
def test_workers_that_run_but_cannot_be_reached_are_named_soon(
    first: subprocess.Popen[str],
    tmp_path: Path,
    damage: Callable[[RuntimeDir, Path], None],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for limit in ("END_S", "UNREACHABLE_S"):
        monkeypatch.setattr(f"cpkit.control.readiness.{limit}", 0.3)
    here, kept = RuntimeDir("met"), tmp_path / "kept"
    damage(here, kept)
    try:
        assert main(["status", "--name", "met"]) == 1
    finally:
        kept.replace(here.connection_file)
        if damage is forget_rank_0:
            (here.startup_dir / "rank 2").rename(here.startup_dir / "rank 0")
    error = capsys.readouterr().err
    assert words in error
    assert "stop --name met" in error
    assert main(["status", "--name", "met"]) == 0


def test_running_workers_are_described_with_the_command_that_stops_them(
    first: subprocess.Popen[str],
) -> None:
    said = _workers_for_lab(_parser().parse_args(["lab", "--name", "met"]))
    assert "'met' are already running and will be used: 1 rank since 20" in said
    assert f"started by `make lab` (process {first.pid}); they end with it." in said
    assert "./launch_workers.sh stop --name met" in said
    assert "make lab NAME=" in said


@pytest.mark.parametrize(
    ("option", "asked"), [("--nproc=2", "nproc=2"), ("--device=cuda", "device='cuda'")]
)
def test_a_lab_that_requests_other_workers_is_refused(
    first: subprocess.Popen[str], option: str, asked: str
) -> None:
    with pytest.raises(cpkit.OtherWorkers, match=f"asked for {asked}") as caught:
        _workers_for_lab(_parser().parse_args(["lab", "--name=met", option]))
    assert_names_the_lab(str(caught.value), first.pid)


def test_starting_other_workers_of_the_same_name_is_refused(
    first: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["start", "--name=met", "--nproc=2"]) == 1
    said = capsys.readouterr().err
    assert "workers named 'met' are already running" in said
    assert_names_the_lab(said, first.pid)


def assert_names_the_lab(said: str, pid: int) -> None:
    """Check that the message names the workers, their owner, and both remedies."""
    assert "1 rank since 20" in said
    assert f"`make lab` (process {pid}); they end with it" in said
    assert f"{sys.executable} -m cpkit stop --name met" in said
    assert "choose another name" in said


def test_connect_attaches_unless_it_requests_other_workers(
    first: subprocess.Popen[str],
) -> None:
    for options in ({}, {"nproc": 1}, {"nproc": 1, "device": "cpu"}, {"launch": False}):
        with cpkit.connect("met", **options) as lab:
            assert lab.world_size == 1
            assert not lab.owned
    for launch in (True, False):
        with pytest.raises(cpkit.OtherWorkers) as caught:
            cpkit.connect("met", launch=launch, nproc=8, device="cuda")
        assert "nproc=8 and device='cuda'" in str(caught.value)
        assert "already run on cpu: 1 rank" in str(caught.value)
        assert "cpkit.connect('met').stop()" in str(caught.value)
    for options in ({"nproc": 0}, {"device": "gpu"}, {"name": 4}):
        with pytest.raises(ValueError, match="must be"):
            cpkit.connect(**{"name": "met", **options})


@pytest.mark.parametrize("module", ["ipykernel_launcher", "http.server"])
def test_the_kind_of_owner_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "workspace/02_symmetric_memory.ipynb")
    command = [sys.executable, "-m", module]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as owner:
        until(psutil.Process(owner.pid).cmdline)  # empty directly after the exec
        said = describe(here(process_id(owner.pid)))
        owner.kill()
    if module == "ipykernel_launcher":
        wanted = f"the notebook 02_symmetric_memory.ipynb (kernel: process {owner.pid})"
    else:
        wanted = f"process {owner.pid} (`{sys.executable} -m http.server`)"
    assert said.endswith(f", started by {wanted}; they end with it")


def test_other_origins_are_named() -> None:
    assert describe(connection()) == "1 rank, started on h"
    assert "started by launch_workers.sh; they run until they are stopped" in describe(here(None))
    assert f"started by this process ({process_id().pid}); " in describe(here(process_id()))


def here(owner: ProcessId | None) -> Connection:
    return msgspec.structs.replace(connection(), host=socket.gethostname(), owner=owner)
