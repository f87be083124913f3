"""Devices and streams: which device a tensor is on, and whether a gather accepts it."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Generic, TypeVar

import torch
from torch.autograd import forward_ad

from cpkit import settings


def device_type(x: object) -> str:
    """Return "cuda" for a CUDA tensor, "cpu" for everything else; never raises."""
    try:
        return "cuda" if isinstance(x, torch.Tensor) and x.is_cuda else "cpu"
    except Exception:  # noqa: BLE001 - a subclass can raise anything; check_tensor reports it
        return "cpu"


def use_local_gpu(*, shared: bool = False) -> None:
    """Select the GPU of `LOCAL_RANK` (set by torchrun) as this process's current device.

    If there are more ranks than GPUs, several ranks share each GPU; with `shared`, all ranks use
    GPU 0. Call this before `init_context_parallel`, which records each rank's GPU. Does nothing
    without a GPU.
    """
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(0 if shared else local_rank % torch.cuda.device_count())


def gpu_id() -> str:
    """Return the UUID of this process's GPU; empty without one."""
    if settings.passed_on(settings.DEVICE) == "cpu" or not torch.cuda.is_available():
        return ""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def advice_on_idle_gpus(rank: int, hosts: list[str], gpus: list[str], n_visible: int) -> str:
    """Return advice when ranks share this rank's GPU although its machine has idle ones.

    Only the first of these ranks gets it; otherwise it is empty. `hosts` and `gpus` are those of
    all ranks, `n_visible` is how many GPUs this rank sees.

    >>> advice_on_idle_gpus(0, ["a", "a"], ["gpu-1", "gpu-1"], 2).partition(":")[0]
    'ranks 0, 1 use one GPU, and 1 of the 2 GPUs of this machine are idle'
    >>> advice_on_idle_gpus(0, ["a", "a"], ["gpu-1", "gpu-1"], 1)
    ''
    """
    used = {gpu for host, gpu in zip(hosts, gpus, strict=True) if host == hosts[rank]}
    sharing = [r for r, gpu in enumerate(gpus) if gpu and gpu == gpus[rank]]
    if len(sharing) < 2 or rank != sharing[0] or len(used) >= n_visible:
        return ""
    return (
        f"ranks {', '.join(map(str, sharing))} use one GPU, and {n_visible - len(used)} of the "
        f"{n_visible} GPUs of this machine are idle: call cpkit.devices.use_local_gpu() before "
        f"init_context_parallel, or set CUDA_VISIBLE_DEVICES to share one on purpose"
    )


@cache
def loaded_nccl_version() -> tuple[int, ...]:
    """Return the version of the NCCL library that this process uses, for example (2, 28, 9).

    `torch.cuda.nccl.version()` is the version that torch was compiled with. The library that is
    loaded can be another one (LD_PRELOAD, a newer nvidia-nccl package). If NCCL is linked into
    torch, there is no such library, and torch's version is the right one.
    """
    number = ctypes.c_int()
    try:
        library = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOW | os.RTLD_NOLOAD)
        status = library.ncclGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        status = -1
    if status != 0:
        version: tuple[int, ...] = torch.cuda.nccl.version()  # noqa: TID251 - there is no other
        return version
    major, rest = divmod(number.value, 10000)
    return major, rest // 100, rest % 100


def finish() -> None:
    """Wait until the GPU has finished all work of this process; do nothing without a GPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def is_plain_view(x: torch.Tensor) -> bool:
    """Return False for lazily conjugated or negated views: their memory holds different values."""
    return not (x.is_conj() or x.is_neg())


def has_memory(x: torch.Tensor) -> bool:
    """Return True when the tensor is empty or has an address.

    False for tensors that wrap others (DTensor), for zero tensors of autograd, inside
    torch.func transforms, and once the storage was freed (FSDP).
    """
    try:
        return bool(x.data_ptr()) or not x.numel()
    except RuntimeError:  # inside torch.func transforms
        return False


def check_tensor(name: str, x: object) -> None:
    """Check that a gather can read and write this tensor at its address. Raises ValueError."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} is {type(x).__name__}; it must be a tensor")
    if type(x) is not torch.Tensor:
        check_readable(name, x)
    _check_device(name, x)
    if x.is_nested:
        problem = "is nested"
    elif x.layout is not torch.strided:
        problem = f"has layout {x.layout}"
    elif x.is_quantized:
        problem = "is quantized"
    elif not has_memory(x):
        problem = f"is a {type(x).__name__} without memory of its own"
    else:
        return
    raise ValueError(
        f"{name} {problem}; it must be an ordinary strided tensor. Pass x.to_local() of a DTensor, "
        f"x.dequantize() of a quantized tensor, x.to_dense() of a sparse one, or x.clone()"
    )


def check_readable(name: str, x: object) -> None:
    """Check that a tensor has a shape, a dtype and so on. Raises ValueError."""
    if not isinstance(x, torch.Tensor) or (type(x) is torch.Tensor and not x.is_nested):
        return
    try:
        _ = x.shape, x.dtype, x.device, x.layout, x.is_nested, x.requires_grad
    except Exception as error:
        kind = f"a {type(x).__name__} that cannot be read ({error})"
        raise ValueError(
            f"{name} is {'nested' if type(x) is torch.Tensor else kind}; it must be an ordinary "
            f"strided tensor. Pass x.as_subclass(torch.Tensor), or initialize its module first"
        ) from error


def plain_class(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor of a subclass as a torch.Tensor, without a call of the subclass."""
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(torch.Tensor)


def _check_device(name: str, x: torch.Tensor) -> None:
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} is on {x.device}; move it to the CPU or to this rank's GPU")
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        raise ValueError(
            f"{name} is on {x.device}, and this rank's GPU is cuda:{torch.cuda.current_device()}; "
            f"move it there, or call torch.cuda.set_device before init_context_parallel"
        )


def needs_grad(x: torch.Tensor) -> bool:
    """Return True when autograd would record an operation on this tensor."""
    return x.requires_grad and torch.is_grad_enabled()


def check_no_grad(name: str, x: torch.Tensor) -> None:
    """Check that a gather would not drop this tensor's gradient. Raises ValueError."""
    if needs_grad(x):
        raise ValueError(
            f"{name} requires grad, and a gather has no backward: its gradient would be dropped. "
            f"For inference pass {name}.detach(), or call inside torch.no_grad(). To train, give "
            f"the gather a backward as docs/training.md does"
        )
    if forward_ad.unpack_dual(x).tangent is not None:
        raise ValueError(
            f"{name} has a forward-mode tangent, which a gather would drop. Pass "
            f"torch.autograd.forward_ad.unpack_dual({name}).primal, and gather the tangent too"
        )


def is_capturing(device: str) -> bool:
    """Return True while a CUDA graph is captured on the current stream."""
    if device != "cuda" or not torch.cuda.is_initialized():  # without CUDA, torch raises below
        return False
    return bool(torch._C._cuda_isCurrentStreamCapturing())


_T = TypeVar("_T")


class Replay(Generic[_T]):
    """A captured call: it launches the same work again, into the same result.

    It keeps what its graph uses, and releases it when it is dropped. All replays share memory for
    what they compute in between, so a result is valid until another Replay is launched, and they
    must be launched in one stream order.
    """

    def __init__(self, call: Callable[[], _T]) -> None:
        """Capture `call`, which has run before. Collective if the call is.

        Freeing GPU memory would invalidate the capture, so no garbage is collected during it, and
        other threads may do what they like.
        """
        self._kept: list[object] = []
        self._graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()
        try:
            with (
                _keeping_in(self._kept),
                torch.cuda.graph(
                    self._graph, pool=_memory_owner().pool(), capture_error_mode="thread_local"
                ),
            ):
                self.result = call()
        finally:
            if collects:
                gc.enable()

    def __call__(self) -> _T:
        """Launch the work on the current stream, and return the result."""
        self._graph.replay()
        return self.result


@cache
def _memory_owner() -> torch.cuda.CUDAGraph:
    """Return a graph that is never dropped, and owns the memory in which all others allocate.

    With memory of its own, each dropped graph would leave some behind, until torch runs out of it.
    """
    owner = torch.cuda.CUDAGraph()
    with torch.cuda.graph(owner, capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")
    return owner


_replayed: list[object] = []
_keeper: ContextVar[list[object]] = ContextVar("keeper", default=_replayed)


@contextmanager
def _keeping_in(kept: list[object]) -> Iterator[None]:
    token = _keeper.set(kept)
    try:
        yield
    finally:
        _keeper.reset(token)


def keep_for_replays(device: str, *objects: object) -> None:
    """Keep objects that a captured CUDA graph uses alive: with its Replay, or to the process's end.

    Replays use them again, even after the pool, cache or plan that holds them now is gone. There is
    no notification when a graph of a caller is dropped, so its objects are never released.
    """
    if is_capturing(device):
        _keeper.get().extend(objects)


def raw_stream() -> int:
    """Return the current stream's handle without a Stream object, which takes microseconds."""
    handle: int = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
    return handle


def check_can_grow(device: str) -> None:
    """Check that a symmetric pool on this device can be made or grown now. Raises ValueError."""
    if is_capturing(device):
        raise ValueError(
            "a symmetric pool cannot be made or grown while a CUDA graph is captured: before the "
            'capture, call symmetric_pool(group, "cuda").warm_up(max_tokens, …), or run the same '
            "gather once"
        )


def check_stream(stream: object) -> None:
    """Check that `stream` is a CUDA stream, or None for the current one. Raises ValueError."""
    if not (stream is None or isinstance(stream, torch.cuda.Stream)):
        raise ValueError(
            f"stream is {stream!r:.80}; it must be a torch.cuda.Stream, or None for the current one"
        )


_NO_SWITCH: AbstractContextManager[None] = nullcontext()


def on_stream(
    stream: torch.cuda.Stream | None, *inputs: torch.Tensor
) -> AbstractContextManager[None]:
    """Run the block on `stream`, after all earlier work of the current stream (None: on that one).

    current   … make k ┐                          ┌ wait_stream(stream) ─ read whole
    stream             └ wait ─ gather k ─────────┘ (by the caller)
    """
    return _NO_SWITCH if stream is None else _after_current(stream, inputs)


@contextmanager
def _after_current(stream: torch.cuda.Stream, inputs: tuple[torch.Tensor, ...]) -> Iterator[None]:
    stream.wait_stream(torch.cuda.current_stream())
    for x in inputs:
        if x.device.type == "cuda":
            x.record_stream(stream)  # its memory is not reused before `stream` has read it
    with torch.cuda.stream(stream):
        yield
