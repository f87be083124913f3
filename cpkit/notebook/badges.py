"""Badges: which path a gather took and what would change it, and how crowded the machine is.

A badge is a symbol, a colour and words, so that colour is never the only sign.
"""

from __future__ import annotations

import html

from cpkit.algorithms import TABLE
from cpkit.control.messages import Sample, StatusResult
from cpkit.memory.path import PathName

GOOD, WARNING, NEUTRAL = "#1a7f37", "#9a6700", "#57606a"
# Symbols of different shape: a full, a half and an empty circle.
PATHS: dict[PathName, tuple[str, str]] = {
    "symmetric": ("●", GOOD),
    "staged": ("◐", WARNING),
    "fallback": ("○", NEUTRAL),
}
_ORDINARY = tuple(row.name for row in TABLE.values() if not row.symmetric_recv)


def path_badge(sample: Sample) -> str:
    """Return the path as HTML: symbol, word, reason, and what would make it symmetric."""
    symbol, color = PATHS[sample.path]
    words = html.escape(sample.path_reason)
    remedy = to_symmetric(sample)
    if remedy:
        words += f". <i>For the symmetric path: {html.escape(remedy)}</i>"
    return f"{_badge(symbol, sample.path, color)} {words}"


def to_symmetric(sample: Sample) -> str:
    """Return what would put this gather on the symmetric path; "" if it took it."""
    work = sample.workload
    if sample.path == "symmetric":
        return ""
    if work.algorithm in _ORDINARY:
        others = ", ".join(name for name in TABLE if name not in _ORDINARY)
        tick = "" if work.symmetric else "tick “symmetric memory”, and "
        return f"{work.algorithm} uses ordinary buffers by design; {tick}select {others} or plan"
    if not work.symmetric:
        return "tick “symmetric memory”"
    return "remove the cause named here; Lab.explain shows the buffers of each rank"


def contention_badge(status: StatusResult, cp_size: int) -> str:
    """Return how many ranks share a core or a GPU, and the load, as HTML."""
    ranks = sum(worker.host == status.workers[0].host for worker in status.workers[:cp_size])
    unit, units = ("GPU", status.gpus) if status.gpus else ("core", status.cores)
    load = f"load {status.load:.1f} on {_count(status.cores, 'core')}"
    where = f"{_count(ranks, 'rank')} on {_count(units, unit)}"
    if ranks > units:
        why = f"ranks wait for a {unit}: compare ratios, and do not quote these times elsewhere"
        return f"{_badge('▲', 'crowded', WARNING)} {where}, {load}; {why}"
    if status.load > max(ranks, status.cores):
        why = "other programs use the cores: times are longer and noisier than on an idle machine"
        return f"{_badge('▲', 'busy', WARNING)} {where}, {load}; {why}"
    return f"{_badge('●', 'not crowded', GOOD)} {where}, {load}"


def _badge(symbol: str, word: str, color: str) -> str:
    # White on the colour, so that the words are legible in a light and in a dark page.
    look = f"background: {color}; color: #ffffff; padding: 1px 7px; border-radius: 9px"
    return f'<span class="cpkit-badge" style="{look}; white-space: nowrap">{symbol} {word}</span>'


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
