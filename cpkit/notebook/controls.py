"""The explorer's controls: their options, and the workloads that they select."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
import msgspec
import traitlets

from cpkit.batch import STRATEGIES
from cpkit.control.errors import BadRequest
from cpkit.control.messages import MAX_SEQUENCES, Workload
from cpkit.notebook.live import close_widgets, controls_box

Values = dict[str, Any]  # of controls, by their names
PRESETS: dict[str, Values] = {
    "one sequence of 4096 tokens": {"lengths": "4096"},
    "one long sequence: 32768": {"lengths": "32768"},
    "one long and seven short": {"lengths": "8192, 7*256"},
    "ragged batch: 4097, 812, 95": {"lengths": "4097, 812, 95"},
    "16 sequences of 4097 tokens": {"lengths": "16*4097"},
    "many short: 256 sequences of 16": {"lengths": "256*16"},
    "small: 64 tokens": {"lengths": "64"},
}
ROWS: dict[str, Values] = {
    "Llama 3: K and V, 8 heads of 128": {
        "heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
        "tensors": 2,
    },
    "DeepSeek: one latent of 576": {
        "heads": 1,
        "head_dim": 576,
        "dtype": "bfloat16",
        "tensors": 1,
    },
    "index keys of 128 bytes": {
        "heads": 1,
        "head_dim": 128,
        "dtype": "float8_e4m3fn",
        "tensors": 1,
    },
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
                f"lengths {text!r:.100}: cannot read {part.strip()!r:.40}; write the tokens per "
                f"sequence, for example 4097, 812 or 16*4097"
            )
        count = int(match[1] or 1)
        if len(lengths) + count > MAX_SEQUENCES:
            raise ValueError(f"lengths {text!r:.100}: write at most {MAX_SEQUENCES} sequences")
        lengths += [int(match[2])] * count
    return tuple(lengths)


TENSORS = (1, 2, 3, 4)
MOST_SLIDERS = 8  # sequences that have a slider each
LONGEST_SLIDER = 8192  # tokens; a longer length extends its slider


class Toggles(widgets.HBox):  # type: ignore[misc]
    """A row of buttons that are each on or off; `value` has the names of those that are on.

    The names are in the order of the buttons. By keyboard: Tab, then the space bar.
    """

    value = traitlets.Tuple()

    def __init__(self, names: Sequence[str], value: Sequence[str]) -> None:
        self.buttons = {
            name: widgets.ToggleButton(
                description=name, tooltip=f"measure {name}", layout={"width": "auto"}
            )
            for name in names
        }
        super().__init__(list(self.buttons.values()), layout={"flex_flow": "row wrap"})
        self.value = tuple(value)
        for button in self.buttons.values():
            button.observe(self._read, "value")

    @traitlets.validate("value")
    def _in_order(self, proposal: dict[str, Any]) -> tuple[str, ...]:
        return tuple(name for name in self.buttons if name in proposal["value"])

    @traitlets.observe("value")
    def _show(self, change: dict[str, Any]) -> None:
        for name, button in self.buttons.items():
            button.value = name in change["new"]
            # A shade alone is hard to see, and has no name for a screen reader.
            button.description = f"✓ {name}" if button.value else name

    def _read(self, _: object) -> None:
        # While `_show` sets several buttons, the value already is the new one.
        on = tuple(name for name, button in self.buttons.items() if button.value)
        if len(set(on) ^ set(self.value)) == 1:
            self.value = on


class LengthSliders(widgets.VBox):  # type: ignore[misc]
    """One slider per sequence of a batch of up to eight; they and the text follow each other."""

    def __init__(self, text: widgets.Text) -> None:
        super().__init__()
        self._text, self._sliders = text, list[widgets.IntSlider]()
        self._is_following = False
        text.observe(self._follow, "value")
        self._follow()

    def _follow(self, _: object = None) -> None:
        """Show the text's lengths; no slider if there are too many, or the text has an error."""
        try:
            lengths = parse_lengths(self._text.value)
        except ValueError:
            lengths = ()
        shown = lengths if len(lengths) <= MOST_SLIDERS else ()
        while len(self._sliders) < len(shown):
            self._sliders.append(self._slider(len(self._sliders)))
        self._is_following = True
        for slider, length in zip(self._sliders, shown, strict=False):
            slider.max = max(slider.max, length)
            slider.value = length
        self._is_following = False
        self.children = self._sliders[: len(shown)]

    def close(self) -> None:
        """Close the sliders too, also those that are not shown."""
        for slider in self._sliders:
            close_widgets(slider)
        super().close()

    def _slider(self, sequence: int) -> widgets.IntSlider:
        slider = widgets.IntSlider(
            value=1,
            min=1,
            max=LONGEST_SLIDER,
            description=f"sequence {sequence}",
            tooltip="tokens of this sequence",
            continuous_update=False,
        )
        slider.observe(self._write, "value")
        return slider

    def _write(self, _: object) -> None:
        if not self._is_following:  # a person moved it
            self._text.value = ", ".join(str(slider.value) for slider in self.children)


class Controls:
    """The widgets that select one workload, and the algorithms that are compared on it."""

    def __init__(
        self,
        cp_sizes: Sequence[int],
        start: Workload,
        algorithms: Sequence[str],
        choices: Sequence[str],
        *,
        on_gpu: bool,
    ) -> None:
        if start.captured and not on_gpu:
            raise BadRequest("captured is True, but these workers run on the CPU: leave it out")
        self.cp_size = _slider("cp_size", cp_sizes, start.cp_size, "ranks that share the sequences")
        self.heads = _slider("heads", HEADS, start.heads, "heads per row")
        self.head_dim = _slider("head_dim", HEAD_DIMS, start.head_dim, "elements per head")
        self.dtype = _choice("dtype", DTYPES, start.dtype)
        self.tensors = _slider("tensors", TENSORS, start.tensors, "tensors per gather: K, V, …")
        self.algorithms = Toggles(choices, algorithms)
        self.strategy = _choice("strategy", STRATEGIES, start.strategy)
        self.lengths = widgets.Text(
            value=", ".join(str(length) for length in start.lengths),
            description="lengths",
            tooltip="tokens per sequence: 4097, 812 or 16*4097",
            continuous_update=False,
        )
        self.each_length = LengthSliders(self.lengths)
        self.symmetric = widgets.Checkbox(value=start.symmetric, description="symmetric memory")
        self.captured = widgets.Checkbox(
            value=start.captured,
            description="captured in a CUDA graph",
            tooltip="measure replays, which skip the work of the host",
        )
        self._launch = (self.captured,) if on_gpu else ()
        if not on_gpu:
            close_widgets(self.captured)  # it is not shown
        self.preset = self._presets("preset", PRESETS, "own lengths")
        self.rows = self._presets("rows", ROWS, "own rows")
        for name in ("cp_size", "heads", "head_dim", "dtype", "algorithms", "strategy", "lengths"):
            getattr(self, name).add_class(name.replace("_", "-"))

    def workloads(self) -> tuple[Workload, ...]:
        """Return the selected workload once per algorithm.

        Raises ValueError if the lengths cannot be parsed, or no algorithm is selected.
        """
        if not self.algorithms.value:
            raise ValueError("no algorithm is selected; select at least one")
        workload = Workload(
            cp_size=self.cp_size.value,
            lengths=parse_lengths(self.lengths.value),
            strategy=self.strategy.value,
            symmetric=self.symmetric.value,
            heads=self.heads.value,
            head_dim=self.head_dim.value,
            dtype=self.dtype.value,
            tensors=self.tensors.value,
            captured=self.captured.value,
        )
        return tuple(
            msgspec.structs.replace(workload, algorithm=name) for name in self.algorithms.value
        )

    def observed(self) -> tuple[Any, ...]:
        """Return the widgets whose values define the workload."""
        shape = (self.cp_size, self.heads, self.head_dim, self.dtype, self.tensors)
        return (*shape, self.algorithms, self.strategy, self.lengths, self.symmetric, self.captured)

    def box(self) -> widgets.Widget:
        """Return all controls: the algorithms above three columns."""
        columns = (
            (self.cp_size, self.symmetric, *self._launch),
            (self.lengths, self.each_length, self.preset, self.strategy),
            (self.rows, self.heads, self.head_dim, self.dtype, self.tensors),
        )
        boxes = widgets.HBox(
            [widgets.VBox(column) for column in columns], layout={"flex_flow": "row wrap"}
        )
        return controls_box([widgets.VBox([self.algorithms, boxes])])

    def _presets(self, name: str, presets: dict[str, Values], own: str) -> widgets.Dropdown:
        """Return a choice of presets. It shows one only while the controls have its values."""
        choice = _choice(name, [own, *presets], own)

        def apply(change: dict[str, Any]) -> None:
            for control, value in presets.get(change["new"], {}).items():
                getattr(self, control).value = value

        def show_selected(_: object = None) -> None:
            current = {control: getattr(self, control).value for control in concerned}
            found = (preset for preset, values in presets.items() if values == current)
            choice.value = next(found, own)

        concerned = next(iter(presets.values()))
        for control in concerned:
            getattr(self, control).observe(show_selected, "value")
        show_selected()
        choice.observe(apply, "value")
        return choice


def _slider(name: str, options: Sequence[int], value: int, tip: str) -> widgets.SelectionSlider:
    chosen = sorted({*options, value})
    return widgets.SelectionSlider(
        options=chosen, value=value, description=name, tooltip=tip, continuous_update=False
    )


def _choice(name: str, options: Sequence[str], value: str) -> widgets.Dropdown:
    return widgets.Dropdown(
        options=list(dict.fromkeys([*options, value])), value=value, description=name
    )
