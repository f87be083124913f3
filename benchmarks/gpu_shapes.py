"""Compare launch shapes of the gather kernel on a GPU, in one process and without signals.

    python -m benchmarks.gpu_shapes [--cp-sizes 2,8] [--mib 256]

One process stores one source into `cp` outputs and uses the whole GPU. So the times contain only
the cost of the copies, without waiting between ranks. `cpkit.kernels.launch` has the chosen shapes.
The outputs of every variant are checked before it is timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.gpu_ranks import elapsed_us
from cpkit.devices import raw_stream
from cpkit.kernels.gather_kernel import PAGE_WORDS
from cpkit.kernels.launch import Compiled, PreparedLaunch, Shape, TileTable, compiled, launch
from cpkit.kernels.tiles import tile_table
from cpkit.layout import prepare_context_parallel_metadata
from cpkit.processes import run_command

ROW_BYTES = 2048
SAMPLES, CALLS = 7, 4
SHAPES = tuple(
    Shape(tile, warps, blocks)
    for tile, warps, blocks in (
        (1024, 4, 8), (2048, 8, 4), (2048, 8, 8), (4096, 8, 2), (4096, 16, 2), (4096, 16, 4),
        (8192, 8, 2), (8192, 16, 1), (8192, 16, 2), (16384, 16, 1), (16384, 32, 1),
    )
)  # fmt: skip


@dataclass(frozen=True)
class OneProcess:
    """A group in which this process is rank 0 and owns all memory."""

    size: int
    rank: int = 0
    ranks_on_gpu: int = 1
    shares_gpu: bool = False


@dataclass(frozen=True)
class Words:
    """A page of counters that all ranks share, because there are no signals."""

    group: OneProcess
    device: torch.device
    page: int
    pages: torch.Tensor
    report: torch.Tensor
    kernels: dict[object, Compiled] = field(default_factory=dict)

    def enter(self) -> None:
        """Return at once: there is no peer."""

    def in_order(self) -> int:
        """Return the only stream."""
        return raw_stream()


def main() -> int:
    """Print the shapes, fastest first, with their ratio to the floor."""
    parser = argparse.ArgumentParser(description="Time the gather kernel's launch shapes.")
    parser.add_argument("--cp-sizes", default="2,8", help="comma-separated, default 2,8")
    parser.add_argument("--mib", type=int, default=256, help="size of the source, default 256")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu_shapes needs a CUDA device")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.mib} MiB")
    for cp_size in map(int, options.cp_sizes.split(",")):
        compare(cp_size, options.mib << 20)
    return 0


def compare(cp_size: int, nbytes: int) -> None:
    """Compare all shapes at one number of outputs."""
    source = torch.arange(nbytes // 8, dtype=torch.int64, device="cuda")
    outputs = [torch.empty_like(source) for _ in range(cp_size)]
    copy_us = time_us(lambda: outputs[0].copy_(source))
    floor_us = (cp_size + 1) / 2 * copy_us
    print(f"cp_size {cp_size}: floor {floor_us:.1f} us ({2 * nbytes / copy_us / 1e6:.2f} TB/s)")
    times = {}
    for shape in SHAPES:
        call = launcher(source, outputs, shape)
        for output in outputs:
            output.fill_(-1)
        call()
        assert all(torch.equal(output, source) for output in outputs), shape
        times[shape] = time_us(call)
    for shape, us in sorted(times.items(), key=lambda item: item[1]):
        print(f"  {us:7.1f} us  {us / floor_us:.3f} of the floor  {shape}")


def launcher(source: torch.Tensor, outputs: list[torch.Tensor], shape: Shape) -> Callable[[], None]:
    """Return a launch that copies the source to all outputs."""
    rows = source.numel() * 8 // ROW_BYTES
    runs = prepare_context_parallel_metadata([rows], 1, "contiguous").runs(0)
    tiles = tile_table(runs, [ROW_BYTES], [True], 1, shape.tile).cuda()
    bases = torch.tensor([output.data_ptr() for output in outputs], device="cuda")
    page = torch.zeros(PAGE_WORDS, dtype=torch.int64, device="cuda")
    pages = torch.full((len(outputs),), page.data_ptr(), dtype=torch.int64, device="cuda")
    words = Words(OneProcess(len(outputs)), source.device, page.data_ptr(), pages, page)

    addresses = (source.data_ptr(),), (outputs[0].data_ptr(),), (bases.data_ptr(),)
    without_signals = (False, False, False)
    kernel = compiled(words, tiles, addresses, None, 0, shape, without_signals)  # type: ignore[arg-type]
    prepared = PreparedLaunch(kernel, TileTable(tiles))

    def call() -> None:
        launch(words, prepared, addresses)  # type: ignore[arg-type]

    return call


def time_us(call: Callable[[], object]) -> float:
    """Return the median µs per call, measured by CUDA events around several calls."""

    def calls() -> None:
        for _ in range(CALLS):
            call()

    calls()
    torch.cuda.synchronize()
    return statistics.median(elapsed_us(calls) for _ in range(SAMPLES)) / CALLS


if __name__ == "__main__":
    run_command(main)
