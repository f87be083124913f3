"""CPU or CUDA: which device a tensor is on, whether we may use it, and on which stream."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def device_type(x: object) -> str:
    """A tensor's device, "cpu" or "cuda"; "cpu" for all else, which is refused elsewhere."""
    return "cuda" if isinstance(x, torch.Tensor) and x.device.type == "cuda" else "cpu"


def default_device() -> str:
    """What a worker's rank runs on, chosen by its agent: `CPKIT_DEVICE`, default "cpu"."""
    return os.environ.get("CPKIT_DEVICE", "cpu")


def use_local_gpu(*, shared: bool = False) -> None:
    """Make the GPU of `LOCAL_RANK` (set by torchrun) this process's current one.

    Ranks that outnumber the GPUs share them in turn; with `shared` all ranks take the first one.
    Call it before `init_context_parallel`, which records each rank's GPU. Without a GPU it does
    nothing.
    """
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(0 if shared else local_rank % torch.cuda.device_count())


def loaded_nccl_version() -> tuple[int, ...]:
    """Return the version of the NCCL library that this process uses, for example (2, 28, 9).

    `torch.cuda.nccl.version()` is the version that torch was compiled with; another library can
    take its place (LD_PRELOAD, a newer nvidia-nccl package). A torch that contains NCCL has no
    such library, and its own number is right.
    """
    number = ctypes.c_int()
    try:
        library = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOW | os.RTLD_NOLOAD)
        status = library.ncclGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        status = -1
    if status != 0:
        version: tuple[int, ...] = torch.cuda.nccl.version()
        return version
    major, rest = divmod(number.value, 10000)
    return major, rest // 100, rest % 100


def finish() -> None:
    """Wait until the GPU has done all that this process asked of it; nothing without a GPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def stores_as_shown(x: torch.Tensor) -> bool:
    """Whether what is stored into its memory is what it shows; a conjugated view shows another."""
    return not (x.is_conj() or x.is_neg())


def device_problem(name: str, x: torch.Tensor) -> str:
    """Why a gather can't take a tensor on this device; empty when it can."""
    if x.device.type not in ("cpu", "cuda"):
        return f"{name} is on {x.device}; gathers take CPU and CUDA tensors"
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return (
            f"{name} is on {x.device}, and this rank's GPU is cuda:{torch.cuda.current_device()}; "
            f"move it there, or call torch.cuda.set_device before init_context_parallel"
        )
    return ""


def grad_problem(name: str, x: torch.Tensor) -> str:
    """Why autograd would lose this tensor's gradient; empty when there is none to lose."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return ""
    return (
        f"{name} requires grad, and a gather has no backward: its gradient would be dropped. For "
        f"inference pass {name}.detach(), or call inside torch.no_grad(). To train, give the "
        f"gather a backward as docs/training.md does"
    )


def is_capturing(device: str) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device == "cuda" and torch.cuda.is_current_stream_capturing()


def raw_stream() -> int:
    """The current stream's handle, without making an object for it, which takes microseconds."""
    handle: int = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
    return handle


def growth_problem(device: str) -> str:
    """Why a symmetric pool on this device can't be made or grow now; empty when it can."""
    if not is_capturing(device):
        return ""
    return (
        "a symmetric pool cannot be made or grow while a CUDA graph is captured: call "
        'symmetric_pool(group, "cuda").warm_up(max_tokens, …), or run the same gather once, first'
    )


def stream_problem(stream: object) -> str:
    """Why nothing can run on this stream; empty when it can. None is the current one."""
    if stream is None or isinstance(stream, torch.cuda.Stream):
        return ""
    return f"stream is {stream!r:.80}; it must be a torch.cuda.Stream, or None for the current one"


_HERE: AbstractContextManager[None] = nullcontext()


def on_stream(
    stream: torch.cuda.Stream | None, *inputs: torch.Tensor
) -> AbstractContextManager[None]:
    """Run on `stream`, after what the current stream has been given so far; None: right here.

    current   … make k ┐                          ┌ wait_stream(stream) ─ read whole
    stream             └ wait ─ gather k ─────────┘  the caller's
    """
    return _HERE if stream is None else _after_current(stream, inputs)


@contextmanager
def _after_current(stream: torch.cuda.Stream, inputs: tuple[torch.Tensor, ...]) -> Iterator[None]:
    stream.wait_stream(torch.cuda.current_stream())
    for x in inputs:
        if x.device.type == "cuda":
            x.record_stream(stream)  # its memory is not reused before `stream` has read it
    with torch.cuda.stream(stream):
        yield
