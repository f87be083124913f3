"""Colours that all readers can distinguish, a text alternative for every figure, and pictures."""

from __future__ import annotations

import itertools
from base64 import b64decode
from io import BytesIO

import numpy as np
import plotly.graph_objects as go
import pytest
from PIL import Image

from cpkit.algorithms import ALGORITHMS
from cpkit.notebook import show, style
from cpkit_lessons import figures
from tests.helpers.drawn import LAYOUT


def test_a_figure_without_a_text_alternative_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a title and a text alternative"):
        style.finish(go.Figure(), title="t", alt="", height=100)


def test_a_recorded_figure_is_marked_in_title_and_text() -> None:
    figure = figures.recorded(
        figures.padding_grid(LAYOUT), machine="H200", date="2026-11-24", source="results/h200.json"
    )
    words = "Recorded on H200, 2026-11-24 (results/h200.json); not measured here."
    assert figure.layout.title.text.startswith("Recorded: ")
    assert figure.layout.title.subtitle.text.startswith(words)
    assert words in figures.text_alternative(figure)
    with pytest.raises(ValueError, match="pass machine"):
        figures.recorded(figures.padding_grid(LAYOUT), machine="H200", date="", source="x")


# Machado, Oliveira and Fernandes 2009: dichromatic vision as a matrix (linear RGB, severity 1).
VISION = {
    "protanopia": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deuteranopia": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "tritanopia": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}


@pytest.mark.parametrize("vision", [None, *VISION])
def test_rank_colours_differ_for_every_kind_of_vision(vision: str | None) -> None:
    colors = [*style.RANK_COLORS, style.WRONG]
    seen = [_lab(color, VISION[vision] if vision else np.eye(3)) for color in colors]
    distances = [float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)]
    assert min(distances) > 10, "2.3 is just noticeable; cells also have text"


def test_without_a_browser_there_is_no_picture_and_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CPKIT_STATIC", "1")
    monkeypatch.setenv("BROWSER_PATH", "/nonexistent")
    assert "image/png" not in show.bundle(figures.padding_grid(LAYOUT))


@pytest.mark.parametrize(
    ("path", "words"), [("/bin/false", "/bin/false did not draw"), ("/nonexistent", "not an exec")]
)
def test_the_reason_for_a_missing_picture_is_one_line(
    monkeypatch: pytest.MonkeyPatch, path: str, words: str
) -> None:
    monkeypatch.setenv("BROWSER_PATH", path)
    with pytest.raises(show.NoPicture, match=words) as caught:
        show.png(figures.padding_grid(LAYOUT))
    assert "\n" not in str(caught.value)


def test_every_algorithm_has_a_line_style() -> None:
    assert style.ALGORITHM_LINES.keys() >= set(ALGORITHMS)


@pytest.mark.browser
@pytest.mark.slow("starts a browser, as test_pictures_and_a_trace_are_saved does")
def test_a_picture_is_drawn_if_there_is_a_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    if show.find_browser() is None:
        pytest.skip("no Chromium or Chrome on this machine: apt-get install chromium")
    monkeypatch.setenv("CPKIT_STATIC", "1")
    drawn = b64decode(show.bundle(figures.padding_grid(LAYOUT))["image/png"])
    assert 5_000 < len(drawn) < 25_000, "256 colours need a third of the browser's bytes"
    colors = {
        f"#{bytes(c).hex()}" for _, c in Image.open(BytesIO(drawn)).convert("RGB").getcolors()
    }
    assert set(style.RANK_COLORS[:4]) <= colors, "the palette keeps the colours of the ranks"


def _lab(color: str, vision: object) -> np.ndarray:
    """Return CIE L*a*b* of a `#rrggbb` colour as seen with this vision."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(vision) @ linear, 0, 1)
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    x, y, z = np.cbrt(np.maximum(np.array(to_xyz) @ linear / (0.9505, 1.0, 1.089), 0.009))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])
