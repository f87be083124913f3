"""What can be taken away from the explorer: its setting as code, its samples as CSV and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import msgspec
import pandas as pd

from cpkit import __version__
from cpkit.control.messages import Message, Sample, Workload

FORMAT = "cpkit samples 1"


class SavedSamples(Message, frozen=True):
    """A file of samples."""

    format: str
    version: str
    samples: tuple[Sample, ...]


def code(name: str, workloads: Sequence[Workload]) -> str:
    """Return Python that measures these workloads on the workers of this name.

    It is complete: it names every parameter, also those with their default values.
    """
    first = msgspec.to_builtins(workloads[0])
    del first["algorithm"]
    arguments = {"lengths": list(first.pop("lengths")), **first}
    arguments["algorithms"] = [workload.algorithm for workload in workloads]
    lines = [f"    {key}={value!r}," for key, value in arguments.items()]
    setting = "\n".join(["setting = dict(", *lines, ")"])
    return (
        f"import cpkit\n\n"
        f"lab = cpkit.connect({name!r})\n"
        f"{setting}\n"
        f"for sample in lab.measure(**setting, samples=10):\n"
        f"    print(sample)\n"
        f"# in a notebook: lab.explore(**setting)\n"
    )


def as_csv(samples: Sequence[Sample]) -> str:
    """Return one line per sample: its number, and the columns of a sweep."""
    rows = [{"sequence": sample.sequence} | sample.row() for sample in samples]
    return str(pd.DataFrame(rows).to_csv(index=False))


def as_json(samples: Sequence[Sample]) -> str:
    """Return all samples with all their fields, as `load_samples` reads them."""
    return msgspec.json.encode(SavedSamples(FORMAT, __version__, tuple(samples))).decode()


def load_samples(path: str | PathLike[str]) -> tuple[Sample, ...]:
    """Return the samples of a JSON file. Raises ValueError for a file of another format."""
    try:
        saved = msgspec.json.decode(Path(path).read_bytes(), type=SavedSamples)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} has no samples of cpkit: {error}") from None
    if saved.format != FORMAT:
        raise ValueError(f"{path} has the format {saved.format!r}; it must be {FORMAT!r}")
    return saved.samples
