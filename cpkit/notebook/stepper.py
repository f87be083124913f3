"""A small panel: choose cp_size and algorithm, and the workers gather anew, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

import ipywidgets as widgets

from cpkit.algorithms import AlgorithmName
from cpkit.lab import Lab
from cpkit.notebook.grids import stage_grid
from cpkit.notebook.live import LivePanel


class Wish(NamedTuple):
    """One gather to look at."""

    cp_size: int
    algorithm: AlgorithmName


class Stepper(LivePanel[Wish]):
    """Each change runs a real gather and draws its stages."""

    words = "Panel: choose cp_size and algorithm, see the stages"

    def __init__(self, lab: Lab, lengths: Sequence[int], cp_size: int) -> None:
        self.cp_size = widgets.SelectionSlider(
            options=lab.cp_sizes, value=cp_size, description="cp_size", continuous_update=False
        )
        self.algorithm = widgets.Dropdown(
            options=get_args(AlgorithmName), value="padded", description="algorithm"
        )
        self.cp_size.add_class("cp-size")
        self._lab, self._lengths = lab, list(lengths)
        super().__init__([self.cp_size, self.algorithm])

    def _wish(self) -> Wish:
        return Wish(self.cp_size.value, self.algorithm.value)

    def _follow(self, wish: Wish, is_newest: Callable[[], bool]) -> str:
        gathered = self._lab.gather(self._lengths, wish.cp_size, algorithm=wish.algorithm)
        if not is_newest():
            return ""
        self._draw(stage_grid(gathered).update_layout(uirevision=str(wish)))
        return "every byte checked"
