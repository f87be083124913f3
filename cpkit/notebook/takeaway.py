"""What can be taken away from the explorer: setting as code, samples as CSV and JSON, pictures."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

import ipywidgets as widgets
import msgspec

from cpkit import __version__
from cpkit.control.messages import Message, Sample, Workload
from cpkit.notebook.plot import LivePlot

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
    """Return one line per sample: its number, its launch, and the columns of a sweep."""
    import pandas as pd

    rows = [
        {"sequence": sample.sequence, "captured": sample.workload.captured} | sample.row()
        for sample in samples
    ]
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


class TakeButtons:
    """The buttons, and the line that says what was taken."""

    def __init__(
        self, plot: LivePlot, code: Callable[[], str], samples: Callable[[], Sequence[Sample]]
    ) -> None:
        self.said = widgets.HTML(_dom_classes=("cpkit-taken",))
        self.buttons = [
            _button("Copy code", "copy", "Python of this setting", self._copy_code),
            _button("CSV", "download", "the samples as a table", self._download_csv),
            _button("JSON", "download", "the samples, to load again", self._download_json),
            _button("PNG", "image", "the figure as pixels", lambda: self._take_picture("png")),
            _button("SVG", "image", "the figure as vectors", lambda: self._take_picture("svg")),
        ]
        self._plot, self._code, self._samples = plot, code, samples

    def _copy_code(self) -> None:
        try:
            text = self._code()
        except ValueError:  # the status line has the error
            return
        self._plot.hand_out(text)
        self.said.value = f"In the clipboard:<pre>{html.escape(text)}</pre>"

    def _download_csv(self) -> None:
        self._download("csv", as_csv)

    def _download_json(self) -> None:
        self._download("json", as_json)

    def _download(self, kind: str, text_of: Callable[[Sequence[Sample]], str]) -> None:
        samples = self._samples()
        if not samples:
            self.said.value = "Nothing is measured yet."
            return
        name = _file_name(kind)
        self._plot.hand_out(text_of(samples), name)
        self.said.value = f"{len(samples)} samples are in {name} of your downloads."

    def _take_picture(self, kind: str) -> None:
        name = _file_name(kind)
        self._plot.hand_out_picture(name)
        self.said.value = f"The figure is in {name} of your downloads."


def _file_name(kind: str) -> str:
    return f"cpkit-{time.strftime('%Y-%m-%d-%H%M%S')}.{kind}"


def _button(name: str, icon: str, tip: str, take: Callable[[], None]) -> widgets.Button:
    button = widgets.Button(description=name, icon=icon, tooltip=tip, layout={"width": "auto"})
    button.add_class(f"take-{name.rsplit(maxsplit=1)[-1].lower()}").on_click(lambda _: take())
    return button
