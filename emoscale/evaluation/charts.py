"""Line charts and interval marks as inline SVG; the page's CSS variables colour them, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 12, 26
POINTS = 400
"""Points drawn of one curve; longer ones are averaged in equal pieces."""
SMOOTH_FROM = 60
"""Noisy curves of at least this many points are drawn faint, with a running mean over them."""
NOISE = 0.005
"""A curve is noisy when it is typically farther than this share of the axis from its running mean."""
COLOURS = 6

Curve = tuple[Sequence[float], Sequence[float]]


def line_chart(title: str, curves: Mapping[str, Curve]) -> str:
    """Draw curves (name → x, y) over one pair of axes; values that are not finite leave a gap."""
    drawn = {name: _thinned(np.asarray(x, float), np.asarray(y, float)) for name, (x, y) in curves.items()}
    finite = np.concatenate([y[np.isfinite(y)] for _, y in drawn.values()])
    xs = np.concatenate([x for x, _ in drawn.values()])
    if len(finite) == 0:
        caption = f"<figcaption>{escape(title)}</figcaption>"
        return f'<figure class="chart">{caption}<p class="empty">no finite value</p></figure>'
    y_ticks, x_ticks = ticks(float(finite.min()), float(finite.max()), 4), ticks(float(xs.min()), float(xs.max()), 5)
    y_low, y_high = min(y_ticks[0], finite.min()), max(y_ticks[-1], finite.max())
    x_low, x_high = xs.min(), max(xs.max(), xs.min() + 1e-9)

    def place(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return np.stack([across, down], axis=1)

    parts = []
    for tick in y_ticks:
        (_, at), *_ = place(np.array([x_low]), np.array([tick]))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in (tick for tick in x_ticks if x_low <= tick <= x_high):
        (at, _), *_ = place(np.array([tick]), np.array([y_low]))
        parts.append(f'<text class="tick" x="{at:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number(tick)}</text>')
    for order, (x, y) in enumerate(drawn.values()):
        colour = f"c{order % COLOURS}"
        mean = _running_mean(y, len(y) // 20) if len(y) >= SMOOTH_FROM else y
        known = np.isfinite(y)
        apart = np.abs(y[known] - mean[known])
        noisy = len(apart) > 0 and np.median(apart) > NOISE * (y_high - y_low)
        if noisy:
            parts.append(_path(place(x, y), f"curve faint {colour}"))
        parts.append(_path(place(x, mean if noisy else y), f"curve {colour}"))
    last = {name: number(_last(y)) for name, (_, y) in drawn.items()}
    spoken = escape(f"{title}: last " + ", ".join(f"{name} {value}" for name, value in last.items()))
    shown = escape(" · ".join(last.values()))
    return (
        f'<figure class="chart"><figcaption>{escape(title)}<span class="last">{shown}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{spoken}">{"".join(parts)}</svg></figure>'
    )


def bar_chart(title: str, values: Mapping[str, float]) -> str:
    """Draw one bar per name, from zero on a linear scale, with its value behind it."""
    longest, step, left = max(values.values()), 22, 150
    height = TOP + step * len(values) + 4
    parts = []
    for order, (name, value) in enumerate(values.items()):
        top, wide = TOP + step * order, max(value / longest, 0.0) * (WIDTH - left - 60)
        parts.append(f'<text class="tick" x="{left - 6}" y="{top + 12}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect style="fill:var(--c{order % COLOURS})" x="{left}" y="{top + 2}" width="{wide:.1f}" height="{step - 8}"/>')
        parts.append(f'<text class="tick" x="{left + wide + 5:.1f}" y="{top + 12}">{number(value)}</text>')
    spoken = escape(f"{title}: " + ", ".join(f"{name} {number(value)}" for name, value in values.items()))
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{spoken}">{"".join(parts)}</svg></figure>'
    )


def legend(names: Sequence[str]) -> str:
    """Give the colour key of charts drawn with these curve names in this order."""
    keys = "".join(f'<span><i class="key k{order % COLOURS}"></i>{escape(name)}</span>' for order, name in enumerate(names))
    return f'<p class="legend">{keys}</p>'


def interval_mark(value: float, low: float, high: float, *, start: float, end: float, reference: float | None = None) -> str:
    """Draw a dot with whiskers on a scale from `start` to `end`; `reference` (such as 0) gets a hairline."""
    wide, middle = 150, 9

    def at(x: float) -> float:
        return 6 + (x - start) / max(end - start, 1e-9) * (wide - 12)

    line = "" if reference is None else f'<line class="zero" x1="{at(reference):.1f}" x2="{at(reference):.1f}" y1="0" y2="18"/>'
    return (
        f'<svg class="mark" viewBox="0 0 {wide} 18" width="{wide}" height="18" aria-hidden="true">{line}'
        f'<line class="whisker" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="{middle}" y2="{middle}"/>'
        f'<circle class="dot" cx="{at(value):.1f}" cy="{middle}" r="3.6"/></svg>'
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """Give about `count` round numbers (1, 2, 2.5 or 5 times a power of ten) that span low … high."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def number(value: float) -> str:
    """Write a number for an axis or a cell: short, with k and M above ten thousand, powers below a thousandth."""
    size = abs(value)
    if not math.isfinite(value):
        return "–"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if 0 < size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def _last(y: NDArray[np.float64]) -> float:
    finite = y[np.isfinite(y)]
    return float(finite[-1]) if len(finite) else math.nan


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    if len(x) <= POINTS:
        return x, y
    pieces = np.array_split(np.arange(len(x)), POINTS)
    return np.array([x[piece].mean() for piece in pieces]), np.array([y[piece].mean() for piece in pieces])


def _running_mean(y: NDArray[np.float64], half: int) -> NDArray[np.float64]:
    known = np.isfinite(y)
    kernel = np.ones(2 * half + 1)
    total = np.convolve(np.where(known, y, 0.0), kernel, mode="same")
    weight = np.convolve(known.astype(float), kernel, mode="same")
    return np.where(known, total / np.maximum(weight, 1), np.nan)


def _path(points: NDArray[np.float64], css: str) -> str:
    steps, pen = [], "M"
    for across, down in points:
        if not math.isfinite(down):
            pen = "M"
            continue
        steps.append(f"{pen}{across:.1f},{down:.1f}")
        pen = "L"
    if len(steps) == 1:
        across, down = steps[0][1:].split(",")
        return f'<circle class="point {css}" cx="{across}" cy="{down}" r="2.5"/>'
    return f'<path class="{css}" d="{"".join(steps)}"/>'
