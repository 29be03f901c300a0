"""Line charts as SVG text: axes with round ticks, units in the labels, colours left to the page's style.

A chart is drawn for a width of about 420 px and scales with its column, so that its text stays readable on a
phone. Classes used: `grid`, `axis`, `tick`, `label`, `guide`, `value`, `over` (text on lines), `faint`, and
`line` and `dots` with `series-0`, `series-1` … for the colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import Literal, TypeAlias

Point: TypeAlias = tuple[float, float]
SeriesStyle: TypeAlias = Literal["line", "dotted_line", "faint"]

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 30, 46
LOG_RATIO = 10.0
"""A y axis is logarithmic when the largest value is this many times the smallest."""

MAX_POINTS = 240
"""Of one series: more could not be told apart at this width."""

COLOURS = 4
"""Of series; more begin again with the first."""

MAX_DOTS = 60
"""A series of more points is drawn without dots."""


@dataclass(frozen=True, slots=True)
class Series:
    """Points that belong together."""

    label: str
    points: tuple[Point, ...]
    """Ascending in x; those that are not finite are left out."""
    style: SeriesStyle = "line"
    """`dotted_line` marks its points and writes the values of the first and the last beside them."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing of some series over one x axis."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    guide: tuple[float, str] | None = None
    """A horizontal line at a value, and what it means."""


def draw_chart(chart: Chart) -> str:
    """The chart as an `svg` element; a sentence instead where no series has a finite point."""
    drawn = [Series(one.label, thin_out(_finite(one.points)), one.style) for one in chart.series]
    points = [point for one in drawn for point in one.points]
    if not points:
        return f'<p class="empty">{escape(chart.title)}: nothing was measured.</p>'
    plane = _Plane(points, [chart.guide[0]] if chart.guide else [])
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_describe(chart, drawn))}">',
        _draw_grid(plane),
        _draw_labels(chart, plane),
        _draw_guide(chart, plane),
        *(_draw_series(_classes(drawn, one), one, plane) for one in drawn),
        _draw_legend(drawn),
        "</svg>",
    ]
    return "".join(parts)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values within [low, high]; steps are 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The values 1, 2 and 5 times powers of ten within [low, high]; powers alone beyond three decades."""
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    return [value for value in values if low * 0.999 <= value <= high * 1.001]


def thin_out(points: Sequence[Point], limit: int = MAX_POINTS) -> tuple[Point, ...]:
    """At most `limit` points: the first and the last, and between them the means of equal runs."""
    if len(points) <= limit:
        return tuple(points)
    inner = points[1:-1]
    runs = limit - 2
    means: list[Point] = []
    for run in range(runs):
        part = inner[run * len(inner) // runs : (run + 1) * len(inner) // runs]
        means.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return (points[0], *means, points[-1])


def smooth(points: Sequence[Point], window: int) -> tuple[Point, ...]:
    """Running mean of y over up to `window` points centred on each; what is not finite is dropped."""
    finite = _finite(points)
    sums = [0.0, *accumulate(y for _, y in finite)]
    half = window // 2
    smoothed: list[Point] = []
    for index, (x, _) in enumerate(finite):
        start, end = max(0, index - half), min(len(finite), index + half + 1)
        smoothed.append((x, (sums[end] - sums[start]) / (end - start)))
    return tuple(smoothed)


def short_number(value: float) -> str:
    """A tick's text: thousands as k, millions as M, no digits that say nothing."""
    for factor, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{suffix}"
    return f"{value:.3g}"


class _Plane:
    """Where values lie in the drawing."""

    def __init__(self, points: Sequence[Point], also_shown: Sequence[float]) -> None:
        xs = [x for x, _ in points]
        ys = [y for _, y in points] + list(also_shown)
        self.x_low, self.x_high = min(0.0, *xs), max(xs) or 1.0
        self.logarithmic = min(ys) > 0 and max(ys) / min(ys) >= LOG_RATIO
        if self.logarithmic:
            self.y_low, self.y_high = min(ys) / 1.15, max(ys) * 1.15
            self.y_ticks = log_ticks(self.y_low, self.y_high)
        else:
            # From zero, so that half as much looks half as much.
            self.y_low, self.y_high = min(0.0, *ys), (max(ys) or 1.0) * 1.08
            self.y_ticks = linear_ticks(self.y_low, self.y_high)
        self.x_ticks = linear_ticks(self.x_low, self.x_high)

    def x(self, value: float) -> float:
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1.0)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        scale: Callable[[float], float] = math.log if self.logarithmic else float
        low, high = scale(self.y_low), scale(self.y_high)
        return HEIGHT - BOTTOM - (scale(value) - low) / ((high - low) or 1.0) * (HEIGHT - TOP - BOTTOM)

    def y_text(self, value: float) -> str:
        if self.logarithmic or len(self.y_ticks) < 2 or abs(self.y_high) >= 1e3:
            return short_number(value)
        decimals = max(0, -math.floor(math.log10(self.y_ticks[1] - self.y_ticks[0]) + 1e-9))
        return f"{value:.{decimals}f}"


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _describe(chart: Chart, drawn: Sequence[Series]) -> str:
    ends = [
        f"{one.label} from {one.points[0][1]:.3g} to {one.points[-1][1]:.3g}" for one in drawn if one.points
    ]
    return f"{chart.title}, {chart.y_label}, over {chart.x_label}: {'; '.join(ends)}"


def _draw_grid(plane: _Plane) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts: list[str] = []
    for value in plane.y_ticks:
        y = plane.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("tick", LEFT - 7, y + 4, plane.y_text(value), "end"))
    for value in plane.x_ticks:
        x = plane.x(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(_text("tick", x, bottom + 17, short_number(value), "middle"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    return "".join(parts)


def _draw_labels(chart: Chart, plane: _Plane) -> str:
    y_label = f"{chart.y_label}, log scale" if plane.logarithmic else chart.y_label
    middle = (LEFT + WIDTH - RIGHT) / 2
    return _text("label", 2, 14, y_label, "start") + _text(
        "label", middle, HEIGHT - 8, chart.x_label, "middle"
    )


def _draw_guide(chart: Chart, plane: _Plane) -> str:
    if chart.guide is None:
        return ""
    value, label = chart.guide
    y = plane.y(value)
    line = f'<line class="guide" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    # Below its left end: a falling curve is far above it there, and writes its last value at the right. Above
    # it where the axis is too near.
    text_y = y + 14 if y + 14 < HEIGHT - BOTTOM else y - 5
    return line + _text("tick over", LEFT + 6, text_y, label, "start")


def _classes(drawn: Sequence[Series], series: Series) -> str:
    if series.style == "faint":
        return "faint"
    return f"line series-{[one for one in drawn if one.style != 'faint'].index(series) % COLOURS}"


def _draw_series(classes: str, series: Series, plane: _Plane) -> str:
    if not series.points:
        return ""
    at = [(plane.x(x), plane.y(y)) for x, y in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    parts = [f'<polyline class="{classes}" points="{path}"/>']
    if series.style == "dotted_line":
        parts += _draw_dots(classes, series, at) if len(at) <= MAX_DOTS else []
        parts.append(_text("value", at[0][0] + 8, at[0][1] + 3, f"{series.points[0][1]:.3g}", "start"))
        if len(at) > 1:
            parts.append(_text("value", at[-1][0], at[-1][1] - 9, f"{series.points[-1][1]:.3g}", "end"))
    return "".join(parts)


def _draw_dots(classes: str, series: Series, at: Sequence[Point]) -> list[str]:
    dots: list[str] = []
    for (x, y), (original_x, value) in zip(at, series.points, strict=True):
        said = escape(f"{series.label}: {value:.4g} at {original_x:,.0f}")
        circle = f'<circle class="dots {classes}" cx="{x:.1f}" cy="{y:.1f}" r="3.2">'
        dots.append(f"{circle}<title>{said}</title></circle>")
    return dots


def _draw_legend(drawn: Sequence[Series]) -> str:
    if len(drawn) < 2:
        return ""
    parts: list[str] = []
    right = float(WIDTH - RIGHT)
    for series in reversed(drawn):
        # 6.2 px is a generous mean width of a letter at 12 px: SVG cannot be asked for the real one.
        start = right - 6.2 * len(series.label) - 24
        classes = _classes(drawn, series)
        parts.append(f'<line class="{classes}" x1="{start:.0f}" x2="{start + 18:.0f}" y1="10" y2="10"/>')
        parts.append(_text("tick", start + 23, 14, series.label, "start"))
        right = start - 10
    return "".join(parts)


def _text(kind: str, x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
