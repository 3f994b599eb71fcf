"""Axes span their data with round numbers; curves leave gaps where values are not finite."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from emoscale.evaluation.charts import bar_chart, interval_mark, line_chart, number, ticks


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.2, 0.71), (-3, 1200), (1e-7, 5e-5), (5, 5), (0, 0), (-2, -2)])
def test_ticks_are_round_and_span_the_data(low: float, high: float) -> None:
    found = ticks(low, high, 4)
    assert found[0] <= low + 1e-9 * abs(low)
    assert found[-1] >= high - 1e-9 * abs(high)
    assert 3 <= len(found) <= 7
    step = found[1] - found[0]
    lead = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(lead - one) for one in (1, 2, 2.5, 5, 10)) < 1e-3


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (-1.5, "−1.5"), (12345, "12.3k"), (2.5e6, "2.5M"), (5e-5, "5.0e−5"), (math.nan, "–")],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_curve_stays_inside_and_breaks_at_nan() -> None:
    values = [1.0, 2.0, math.nan, 4.0, math.inf, 3.0, 2.0]
    svg = line_chart("loss", {"run": (range(7), values)})
    path = re.search(r'<path class="curve c0" d="([^"]+)"', svg).group(1)
    assert path.count("M") == 3
    points = np.array([pair.split(",") for pair in re.split("[ML]", path)[1:]], float)
    assert len(points) == 5
    assert points[:, 0].min() >= 0
    assert points[:, 0].max() <= 340
    assert points[:, 1].min() >= 0
    assert points[:, 1].max() <= 190
    assert points[np.argmax([1, 2, 4, 3, 2]), 1] == points[:, 1].min()


def test_noisy_curve_gets_a_running_mean_and_a_smooth_one_does_not() -> None:
    steps = np.arange(300)
    noisy = line_chart("loss", {"run": (steps, np.random.default_rng(0).normal(size=300))})
    smooth = line_chart("lr", {"run": (steps, steps / 300)})
    assert "faint" in noisy
    assert "faint" not in smooth


def test_long_curves_are_thinned() -> None:
    svg = line_chart("loss", {"run": (np.arange(100_000), np.arange(100_000.0))})
    assert len(svg) < 20_000


def test_odd_curves_are_drawn() -> None:
    assert "<circle" in line_chart("loss", {"run": ([5], [1.0])})
    assert "no finite value" in line_chart("loss", {"run": ([1, 2], [math.nan, math.nan])})
    two = line_chart("uar", {"a": ([1, 2], [0.1, 0.2]), "b": ([], [])})
    assert "c0" in two
    assert "&lt;b&gt;" in line_chart("<b>", {"a": ([1, 2], [0.1, 0.2])})


def test_interval_mark_is_to_scale() -> None:
    svg = interval_mark(0.0, -1.0, 1.0, start=-1, end=1, reference=0.0)
    dot = float(re.search(r'cx="([\d.]+)"', svg).group(1))
    low, high = (float(x) for x in re.search(r'whisker" x1="([\d.]+)" x2="([\d.]+)"', svg).groups())
    assert dot == pytest.approx((low + high) / 2)


def test_bars_are_as_long_as_their_values() -> None:
    drawn = bar_chart("time <s>", {"ours": 1.0, "padded & eager": 4.0, "none": 0.0})
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', drawn)]
    assert widths[0] == pytest.approx(widths[1] / 4, abs=0.1)
    assert widths[2] == 0
    assert "time &lt;s&gt;" in drawn
    assert "padded &amp; eager" in drawn
    ElementTree.fromstring(drawn)
