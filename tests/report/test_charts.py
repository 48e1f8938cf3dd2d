"""Curves of several seeds, and the same chart as SVG and PNG."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest

from tppo.report.charts import Line, line_chart, reward_lines, save_line_chart


def test_rows_of_several_seeds_are_a_mean_and_a_band():
    rows = [
        {"model": "token", "step": step, "seed": seed, "auc": 0.5 + 0.1 * seed + step}
        for seed in (0, 2)
        for step in (0, 8)
    ]
    rows.append({"model": "sentence", "step": 8, "seed": 0, "auc": 0.4})
    rows.append({"model": "sentence", "step": 16, "seed": 0, "auc": None})
    token, rival = reward_lines(rows, "auc")
    assert (token.x, token.y) == ([0, 8], pytest.approx([0.6, 8.6]))
    assert token.band == pytest.approx([0.2 / 2**0.5] * 2)
    assert (rival.x, rival.y, rival.band) == ([8], [0.4], None)
    assert [line.y for line in reward_lines(rows, "loss")] == [[], []]


def test_png_in_the_colours_of_the_page(tmp_path):
    line = Line("tppo", "token level", [0, 1, 2], [0.5, None, 0.7], [0.1, None, None])
    own = Line("#ff0000", "own", [0, 1, 2], [0.6, 0.6, 0.6])
    assert save_line_chart(tmp_path / "chart.png", [line, own], "title", "step")
    pixels = np.round(matplotlib.image.imread(tmp_path / "chart.png")[..., :3] * 255).astype(int)
    found = {tuple(pixel) for pixel in pixels.reshape(-1, 3)}
    assert (0x0B, 0x72, 0x85) in found, "--tppo of the page in light colours"
    assert (0xFF, 0, 0) in found
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert "var(--tppo)" in line_chart([line, own], "title", "step")
    assert not save_line_chart(tmp_path / "none.png", [Line("tppo", "a", [1], [None])], "title", "step")
    assert not (tmp_path / "none.png").exists()
