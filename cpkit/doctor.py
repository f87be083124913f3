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

from cpkit.control.launch import names
from cpkit.control.place import Place
from cpkit.findings import Finding

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


def examine() -> Iterator[Finding]:
    """Look at everything, cheapest first."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    yield from _packages()
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    advice = "four ranks will take turns: timings are of a crowded machine" if cores < 4 else ""
    yield Finding("cores", f"{cores} usable", advice)
    memory = psutil.virtual_memory()
    yield Finding(
        "memory", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB available"
    )
    yield _limits()
    yield _shared_memory()
    yield from _torch()
    yield from _gpus()
    yield _sockets()
    place = Place("default")
    yield Finding("runtime directory", str(place.directory.parent))
    yield Finding("workers running", ", ".join(names()) or "none")


def report() -> str:
    """All findings as aligned text."""
    lines = []
    for subject, found, advice in examine():
        lines.append(f"{subject:18} {found}")
        if advice:
            lines.append(f"{'':18}   → {advice}")
    return "\n".join(lines)


def _packages() -> Iterator[Finding]:
    for name in _PACKAGES:
        try:
            yield Finding(name, version(name))
        except PackageNotFoundError:
            advice = f"{sys.executable} -m pip install -e '.[notebooks]'"
            yield Finding(name, "not installed", advice)


def _limits() -> Finding:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = "every rank opens some 100: raise it with ulimit -n" if files < 1024 else ""
    return Finding("limits", f"{files} open files", advice)


def _shared_memory() -> Finding:
    from cpkit.shm import free_bytes, shm_dir

    free = free_bytes()
    advice = ""
    if free < _ENOUGH_SHM_BYTES:
        advice = "too little for large gathers: in a container, give it --shm-size=2g"
    return Finding("shared memory", f"{free / _GIB:.1f} GiB free in {shm_dir()}", advice)


def _torch() -> Iterator[Finding]:
    import torch.distributed as dist

    backends = [
        name
        for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available()))
        if there
    ]
    advice = "" if "gloo" in backends else "this build of torch has no gloo; install another"
    yield Finding("collectives", ", ".join(backends) or "none", advice)


def _gpus() -> Iterator[Finding]:
    from cpkit.doctor_gpu import examine_gpus

    yield from examine_gpus()


def _sockets() -> Finding:
    room = zmq.IPC_PATH_MAX_LEN - len(f"{tempfile.gettempdir()}/cpkit-12345678/control")
    advice = "TMPDIR is too long for a socket; /tmp is used instead" if room <= 0 else ""
    curve = "with" if zmq.has("curve") else "WITHOUT"
    return Finding(
        "control socket", f"ipc below {tempfile.gettempdir()}, {curve} CURVE keys", advice
    )
