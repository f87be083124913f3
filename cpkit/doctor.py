"""What this machine can do for cpkit, and why not more: `python -m cpkit doctor`."""

from __future__ import annotations

import os
import platform
import resource
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import psutil
import zmq

from cpkit.control.launcher import names
from cpkit.control.runtime_dir import RuntimeDir
from cpkit.findings import Check

_PACKAGES = (
    "torch",
    "pyzmq",
    "msgspec",
    "pandas",
    "jupyterlab",
    "ipywidgets",
    "plotly",
    "anywidget",
)
_GIB = 1 << 30
_ENOUGH_SHM_BYTES = 1 << 30


def examine() -> Iterator[Check]:
    """Look at everything, cheapest first."""
    yield Check("python", f"{platform.python_version()} on {platform.platform()}")
    yield from _packages()
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    advice = "four ranks will take turns: timings are of a crowded machine" if cores < 4 else ""
    yield Check("cores", f"{cores} usable", advice)
    memory = psutil.virtual_memory()
    yield Check(
        "memory", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB available"
    )
    yield _limits()
    yield _shared_memory()
    yield from _torch()
    yield from _gpus()
    yield _sockets()
    place = RuntimeDir("default")
    yield Check("runtime directory", str(place.directory.parent))
    yield Check("workers running", ", ".join(names()) or "none")


def report() -> str:
    """All findings as aligned text."""
    lines = []
    for subject, found, advice in examine():
        lines.append(f"{subject:18} {found}")
        if advice:
            lines.append(f"{'':18}   → {advice}")
    return "\n".join(lines)


def _packages() -> Iterator[Check]:
    for name in _PACKAGES:
        try:
            yield Check(name, version(name))
        except PackageNotFoundError:
            advice = f"{sys.executable} -m pip install -e '.[notebooks]'"
            yield Check(name, "not installed", advice)


def _limits() -> Check:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = "every rank opens some 100: raise it with ulimit -n" if files < 1024 else ""
    return Check("limits", f"{files} open files", advice)


def _shared_memory() -> Check:
    from cpkit.sync.shm import free_bytes, shm_dir

    free = free_bytes()
    advice = ""
    if free < _ENOUGH_SHM_BYTES:
        advice = "too little for large gathers: in a container, give it --shm-size=2g"
    return Check("shared memory", f"{free / _GIB:.1f} GiB free in {shm_dir()}", advice)


def _torch() -> Iterator[Check]:
    import torch.distributed as dist

    backends = [
        name
        for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available()))
        if there
    ]
    advice = "" if "gloo" in backends else "this build of torch has no gloo; install another"
    yield Check("collectives", ", ".join(backends) or "none", advice)


def _gpus() -> Iterator[Check]:
    from cpkit.doctor_gpu import examine_gpus

    yield from examine_gpus()


def _sockets() -> Check:
    room = zmq.IPC_PATH_MAX_LEN - len(f"{tempfile.gettempdir()}/cpkit-12345678/control")
    advice = "TMPDIR is too long for a socket; /tmp is used instead" if room <= 0 else ""
    curve = "with" if zmq.has("curve") else "WITHOUT"
    return Check("control socket", f"ipc below {tempfile.gettempdir()}, {curve} CURVE keys", advice)
