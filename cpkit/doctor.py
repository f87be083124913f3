"""Report what cpkit can do on this machine, and what is missing: `python -m cpkit doctor`."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
import zmq

from cpkit import settings
from cpkit.algorithms import TABLE
from cpkit.control import mps
from cpkit.control.launcher import names
from cpkit.control.runtime_dir import SET_RUNTIME_DIR, runtime_root
from cpkit.devices import loaded_nccl_version
from cpkit.memory.nccl_settings import settings_of_this_process, window_problem
from cpkit.memory.path import NCCL_RACY, BufferLocation, BufferPair, decide, nccl_is_racy, nccl_rule
from cpkit.os_errors import describe
from cpkit.settings import shm_dir
from cpkit.sync.free_memory import memory_limits
from cpkit.sync.shm import free_bytes

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
_ENOUGH_BYTES = 1 << 30


class Check(NamedTuple):
    """The subject of a check, what was found, and advice if that is not enough."""

    subject: str
    found: str
    advice: str = ""


def examine() -> Iterator[Check]:
    """Yield all checks, the cheapest first. A check that fails is a finding too."""
    yield Check("python", f"{platform.python_version()} on {platform.platform()}")
    for subject, checks in _CHECKS.items():
        try:
            yield from checks()
        except Exception as error:  # noqa: BLE001 - what fails here is a finding
            yield Check(subject, "cannot be examined", describe(error))


def report() -> str:
    """Return all checks as aligned text."""
    lines = []
    for subject, found, advice in examine():
        lines.append(f"{subject:26} {found}")
        if advice:
            lines.append(f"{'':26}   → {advice}")
    return "\n".join(lines)


def _packages() -> Iterator[Check]:
    for name in _PACKAGES:
        try:
            yield Check(name, version(name))
        except PackageNotFoundError:
            advice = f"{sys.executable} -m pip install -e '.[notebooks]'"
            yield Check(name, "not installed", advice)


def _settings() -> Iterator[Check]:
    for setting in settings.SETTINGS:
        value = settings.chosen(setting)
        found = f"default: {setting.default.replace('`', '')}" if value is None else repr(value)
        meaning = setting.meaning.replace("`", "")
        yield Check(setting.name, f"{found} ({meaning})", settings.problem_of(setting))


def _cores() -> Iterator[Check]:
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    advice = "four ranks share them, so timings include waiting for a core" if cores < 4 else ""
    yield Check("cores", f"{cores} usable", advice)


def _memory() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    yield Check(
        "memory", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB available"
    )


def _limits() -> Iterator[Check]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = "each rank opens about 100: raise the limit with ulimit -n" if files < 1024 else ""
    yield Check("limits", f"{files} open files", advice)


def _free_memory() -> Iterator[Check]:
    """Check every limit of the memory; ranks on the CPU can use what the tightest one leaves."""
    limits = memory_limits()
    least = min(limits, key=lambda limit: limit.free_bytes)
    for limit in limits:
        advice = limit.advice if limit.free_bytes < _ENOUGH_BYTES else ""
        subject = "memory limit" + (", the tightest" if limit is least else "")
        yield Check(subject, limit.words, advice)


def _shared_memory() -> Iterator[Check]:
    free = shutil.disk_usage(shm_dir()).free
    advice = ""
    if free < _ENOUGH_BYTES:
        advice = "too little for large gathers: start a container with --shm-size=2g"
    usable = free_bytes()
    found = f"{free / _GIB:.1f} GiB free in {shm_dir()}"
    if usable < free:
        found += f", and the memory limits leave {usable / _GIB:.1f} GiB of it"
    yield Check("shared memory", found, advice)


def _torch() -> Iterator[Check]:
    backends = [
        name
        for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available()))
        if there
    ]
    advice = "" if "gloo" in backends else "this build of torch has no gloo; install another"
    yield Check("collectives", ", ".join(backends) or "none", advice)


def _sockets() -> Iterator[Check]:
    room = zmq.IPC_PATH_MAX_LEN - len(f"{tempfile.gettempdir()}/cpkit-12345678/control")
    advice = "TMPDIR is too long for a socket; /tmp is used instead" if room <= 0 else ""
    curve = "with" if zmq.has("curve") else "WITHOUT"
    yield Check("control socket", f"ipc below {tempfile.gettempdir()}, {curve} CURVE keys", advice)


def _runtime_directory() -> Iterator[Check]:
    """Check that workers can be started: the directory, or its nearest parent, is writable."""
    root = runtime_root()
    existing = next(path for path in (root, *root.parents) if os.access(path, os.F_OK))
    advice = ""
    try:
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"is the file system full?")
    except OSError as error:
        advice = f"no file can be written in {existing} ({error.strerror}): {SET_RUNTIME_DIR}"
    yield Check("runtime directory", str(root), advice)
    yield Check("workers running", ", ".join(names()) or "none")


# ------------------------------------------------------------------------------ GPUs

_IN_POOL = BufferLocation(segment=0, offset=0)
_ORDINARY = BufferLocation(other="ordinary memory", fault="unregistered")


def _gpus() -> Iterator[Check]:
    """Check the GPUs, the links between them, MPS, NCCL, and the paths that follow from them."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield _no_gpu()
        yield from _nccl_race()
        yield from _paths("posix", "ranks on the CPU push through POSIX shared memory")
        return
    yield from _devices(count)
    yield from _links(count)
    yield _mps()
    yield from _nccl()
    yield _triton()
    yield from _paths("cuda", "ranks that share a GPU push through torch's symmetric memory")
    if count > 1 and dist.is_nccl_available():
        yield from _paths(
            settings_of_this_process().transport, "ranks with one GPU each gather with NCCL"
        )


def _no_gpu() -> Check:
    if torch.version.cuda is not None:
        return Check("GPUs", "none: torch sees no GPU")
    has_driver = Path("/dev/nvidiactl").exists()
    advice = "this machine has an NVIDIA GPU: run make lab TORCH=cuda" if has_driver else ""
    return Check("GPUs", "none: torch is a CPU build", advice)


def _devices(count: int) -> Iterator[Check]:
    for number in range(count):
        about = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        yield Check(
            f"GPU {number}",
            f"{about.name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free, "
            f"{about.multi_processor_count} multiprocessors, compute {about.major}.{about.minor}",
        )


def _links(count: int) -> Iterator[Check]:
    if count == 1:
        yield Check(
            "peer access",
            "one GPU: ranks share it",
            "timings measure one shared memory, not a link between GPUs",
        )
    else:
        missing = [
            f"{a}→{b}"
            for a in range(count)
            for b in range(count)
            if a != b and not torch.cuda.can_device_access_peer(a, b)
        ]
        advice = "groups with such a pair have no symmetric memory" if missing else ""
        found = f"missing for {', '.join(missing)}" if missing else "between all GPUs"
        yield Check("peer access", found, advice)
    if os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST") == "1":
        yield Check("multicast", "switched off by TORCH_SYMM_MEM_DISABLE_MULTICAST")
    else:
        has = count > 1 and _has_multicast()
        why = "" if has else "needs several GPUs behind one NVSwitch; cpkit's kernels do not use it"
        yield Check("multicast", "supported" if has else "not supported", why)


def _has_multicast() -> bool:
    from torch._C._autograd import DeviceType
    from torch._C._distributed_c10d import _SymmetricMemory

    return bool(_SymmetricMemory.has_multicast_support(DeviceType.CUDA, 0))


def _mps() -> Check:
    if mps.is_configured():
        return Check("MPS", f"daemon at {os.environ['CUDA_MPS_PIPE_DIRECTORY']}")
    if mps.is_installed():
        return Check("MPS", "installed; workers that share a GPU start their own daemon")
    cost = "ranks that share a GPU are time-sliced: a barrier takes milliseconds, not microseconds"
    return Check("MPS", "not installed", cost)


def _version() -> str:
    return ".".join(map(str, loaded_nccl_version()))


def _nccl() -> Iterator[Check]:
    if not dist.is_nccl_available():
        yield Check("NCCL", "this build of torch has none", "ranks use gloo, through host memory")
        return
    version = loaded_nccl_version()
    newer = (
        "receive-only registration (the seed, #24040) falls back: use padded_symm or direct, or "
        "NCCL 2.29.2 or newer"
    )
    rules = {
        "none": ("no symmetric kernels", "symmetric memory needs NCCL 2.27 or newer"),
        "both": ("an all-gather is symmetric if both buffers are registered", newer),
        "recv": ("an all-gather is symmetric if the receive buffer is registered", ""),
    }
    found, advice = rules[nccl_rule(version)]
    yield Check("NCCL", f"{_version()}: {found}", advice)
    if problem := window_problem({0: settings_of_this_process()}):
        yield Check("NCCL windows", "none", problem)
    yield from _nccl_race()


def _nccl_race() -> Iterator[Check]:
    """Check the NCCL of torch's CUDA build, which needs no GPU; a CPU build has none."""
    if dist.is_nccl_available() and nccl_is_racy(loaded_nccl_version()):
        first, last = (".".join(map(str, v)) for v in NCCL_RACY)
        yield Check(
            "NCCL race",
            f"torch {torch.__version__} with NCCL {_version()}: from {first} to {last}, symmetric "
            f"kernels do not wait for the kernel before them",
            "CUDA graphs can give wrong results silently (sglang#37768): install torch 2.14.1 or "
            "newer, which brings NCCL 2.30.7 (make lab TORCH=cuda; pip: -c constraints/cuda.txt)",
        )


def _triton() -> Check:
    try:
        import triton
    except ImportError:
        return Check("triton", "not installed", "'direct' on CUDA needs it: pip install triton")
    return Check("triton", str(triton.__version__))


def _paths(transport: str, words: str) -> Iterator[Check]:
    """Yield the path of each algorithm over one transport."""
    yield Check("paths", words)
    for row in TABLE.values():
        name = row.name
        if row.passes == ("wire",):  # stores into the peers' outputs, without a collective
            yield Check(f"  {name}", "symmetric")
            continue
        send = _IN_POOL if row.symmetric_send else _ORDINARY
        recv = _IN_POOL if row.symmetric_recv else _ORDINARY
        report = decide([BufferPair(send, recv)], 0, transport)
        path = report.path
        if name == "padded" and transport == "cuda":
            path, advice = "staged", "NCCL refuses two ranks on one GPU"
        elif name == "padded":
            advice = "by design: it uses the ordinary collective"
        else:
            advice = report.reason if path == "fallback" else ""
        yield Check(f"  {name}", path, advice)


_CHECKS: dict[str, Callable[[], Iterator[Check]]] = {  # the cheapest first
    "packages": _packages,
    "cores": _cores,
    "memory": _memory,
    "memory limits": _free_memory,
    "limits": _limits,
    "shared memory": _shared_memory,
    "collectives": _torch,
    "GPUs": _gpus,
    "control socket": _sockets,
    "runtime directory": _runtime_directory,
    "settings": _settings,
}
