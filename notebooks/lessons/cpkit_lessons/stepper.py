"""A panel that runs a gather with the chosen cp_size and algorithm, and draws its stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import ipywidgets as widgets

from cpkit.lab import Lab
from cpkit.notebook.grids import stage_grid
from cpkit.notebook.live import IsNewest
from cpkit_lessons.step_panel import StepPanel


class Choice(NamedTuple):
    """The settings of one gather."""

    cp_size: int
    algorithm: str


class Stepper(StepPanel[Choice]):
    """Run a real gather after each change, and draw its stages."""

    description = "Panel: choose cp_size and algorithm, see the stages"

    def __init__(self, lab: Lab, lengths: Sequence[int], cp_size: int) -> None:
        self.cp_size = widgets.SelectionSlider(
            options=lab.cp_sizes, value=cp_size, description="cp_size", continuous_update=False
        )
        self.algorithm = widgets.Dropdown(
            options=lab.status().algorithms, value="padded", description="algorithm"
        )
        self.cp_size.add_class("cp-size")
        self._lab, self._lengths = lab, list(lengths)
        super().__init__([self.cp_size, self.algorithm])

    def _setting(self) -> Choice:
        return Choice(self.cp_size.value, self.algorithm.value)

    def _show(self, setting: Choice, is_newest: IsNewest) -> str:
        gathered = self._lab.gather(self._lengths, setting.cp_size, algorithm=setting.algorithm)
        if not is_newest():
            return ""
        self._draw(stage_grid(gathered).update_layout(uirevision=str(setting)))
        return "all bytes are correct"
