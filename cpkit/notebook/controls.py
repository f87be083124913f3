"""The explorer's controls: their options, and the workload that they select."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets

from cpkit.algorithms import ALGORITHM_CHOICES
from cpkit.control.messages import MAX_SEQUENCES, Workload
from cpkit.layout import STRATEGIES
from cpkit.notebook.live import controls_box

PRESETS: dict[str, str] = {
    "one sequence of 4096 tokens": "4096",
    "one long sequence: 32768": "32768",
    "ragged batch: 4097, 812, 95": "4097, 812, 95",
    "16 sequences of 4097 tokens": "16*4097",
    "small: 64 tokens": "64",
}
HEADS = (1, 2, 4, 8, 16, 32)
HEAD_DIMS = (64, 128, 192, 256, 576)
DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn")


def parse_lengths(text: str) -> tuple[int, ...]:
    """Parse sequence lengths: `4096`, `4097, 812` or `16*4097`. Raises ValueError."""
    lengths: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:(\d{1,6})\s*[*×x]\s*)?(\d{1,9})\s*", part)
        if not match:
            raise ValueError(
                f"lengths {text!r}: cannot read {part.strip()!r}; write the tokens per sequence, "
                f"for example 4097, 812 or 16*4097"
            )
        count = int(match[1] or 1)
        if len(lengths) + count > MAX_SEQUENCES:
            raise ValueError(f"lengths {text!r}: write at most {MAX_SEQUENCES} sequences")
        lengths += [int(match[2])] * count
    return tuple(lengths)


OWN_LENGTHS = "own lengths"


class Controls:
    """The widgets that select one workload."""

    def __init__(self, cp_sizes: Sequence[int], start: Workload) -> None:
        self.cp_size = _slider("cp_size", cp_sizes, start.cp_size, "ranks that share the sequences")
        self.heads = _slider("heads", HEADS, start.heads, "heads per row")
        self.head_dim = _slider("head_dim", HEAD_DIMS, start.head_dim, "elements per head")
        self.dtype = _choice("dtype", DTYPES, start.dtype)
        self.algorithm = _choice("algorithm", ALGORITHM_CHOICES, start.algorithm)
        self.strategy = _choice("strategy", STRATEGIES, start.strategy)
        self.preset = _choice("preset", [OWN_LENGTHS, *PRESETS], OWN_LENGTHS)
        self.lengths = widgets.Text(
            value=", ".join(str(length) for length in start.lengths),
            description="lengths",
            tooltip="tokens per sequence: 4097, 812 or 16*4097",
            continuous_update=False,
        )
        self.symmetric = widgets.Checkbox(value=start.symmetric, description="symmetric memory")
        self._tensors = start.tensors
        for name in ("cp_size", "heads", "head_dim", "dtype", "algorithm", "strategy", "lengths"):
            getattr(self, name).add_class(name.replace("_", "-"))
        self.preset.observe(self._apply_preset, "value")
        self.lengths.observe(self._name_preset, "value")

    def workload(self) -> Workload:
        """Return the selected workload. Raises ValueError if the lengths cannot be parsed."""
        return Workload(
            cp_size=self.cp_size.value,
            lengths=parse_lengths(self.lengths.value),
            strategy=self.strategy.value,
            algorithm=self.algorithm.value,
            symmetric=self.symmetric.value,
            heads=self.heads.value,
            head_dim=self.head_dim.value,
            dtype=self.dtype.value,
            tensors=self._tensors,
        )

    def observed(self) -> tuple[Any, ...]:
        """Return the widgets whose values define the workload."""
        shape = (self.cp_size, self.heads, self.head_dim, self.dtype)
        return (*shape, self.algorithm, self.strategy, self.lengths, self.symmetric)

    def box(self) -> widgets.Widget:
        """Return all controls in three columns."""
        columns = (
            (self.cp_size, self.algorithm, self.symmetric),
            (self.lengths, self.preset, self.strategy),
            (self.heads, self.head_dim, self.dtype),
        )
        return controls_box([widgets.VBox(column) for column in columns], flex_flow="row wrap")

    def _apply_preset(self, change: dict[str, Any]) -> None:
        if change["new"] in PRESETS:
            self.lengths.value = PRESETS[change["new"]]

    def _name_preset(self, change: dict[str, Any]) -> None:
        """Show the name of a preset only while its lengths are selected."""
        names = {lengths: name for name, lengths in PRESETS.items()}
        self.preset.value = names.get(change["new"], OWN_LENGTHS)


def _slider(name: str, options: Sequence[int], value: int, tip: str) -> widgets.SelectionSlider:
    chosen = sorted({*options, value})
    return widgets.SelectionSlider(
        options=chosen, value=value, description=name, tooltip=tip, continuous_update=False
    )


def _choice(name: str, options: Sequence[str], value: str) -> widgets.Dropdown:
    return widgets.Dropdown(
        options=list(dict.fromkeys([*options, value])), value=value, description=name
    )
