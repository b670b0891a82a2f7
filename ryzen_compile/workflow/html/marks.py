"""What charts are drawn with: bars with whiskers and their values, points with names, axes with plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ryzen_compile.workflow import wording
from ryzen_compile.workflow.html.svg_figure import LINE, MUTED, plain_numbers

LOG_FROM = 30.0  # times that one value is the other: on a linear axis the smaller one would not be seen
NAME_LENGTH = 20  # characters beside a bar or a point


@dataclass(frozen=True)
class Bar:
    """``ends`` are those of its whisker; ``label`` is the value as text, the number itself unless given."""

    name: str
    value: float
    color: str
    ends: tuple[float, float] | None = None
    label: str = ""

    @property
    def text(self) -> str:
        return short(self.label or wording.number(self.value, 3))

    @property
    def reach(self) -> float:
        """Where what is drawn of it ends on the right; 0 at least."""
        values = (0.0, self.value, self.ends[1] if self.ends is not None else 0.0)
        return max(value for value in values if math.isfinite(value))


def draw_bars(axes: Any, title: str, bars: Sequence[Bar]) -> None:
    """Bars from the top down, values behind them; a value that is no number has its text and no bar.

    Values too far apart for one linear axis become points on a logarithmic one, where a bar would have no length.
    """
    values = [bar.value for bar in bars if math.isfinite(bar.value)]
    logarithmic = len(values) == 2 and min(values) > 0 and max(values) > LOG_FROM * min(values)
    for at, bar in enumerate(bars):
        if logarithmic:
            axes.plot(bar.value, at, marker="o", markersize=7, color=bar.color, clip_on=False)
        elif math.isfinite(bar.value):
            axes.barh(at, bar.value, height=0.62, color=bar.color)
        if bar.ends is not None and (bar.ends[0] > 0 or not logarithmic):
            axes.plot(bar.ends, [at, at], color=MUTED, linewidth=1, marker="|", markersize=6, clip_on=False)
        right = bar.reach or (min(values) if logarithmic else 0.0)
        axes.annotate(bar.text, (right, at), (5, 0), textcoords="offset points", va="center", color=MUTED)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 2, max(bar.reach for bar in bars) * 3)
    else:
        farthest = max((bar.reach for bar in bars), default=0.0)
        least = min((bar.ends[0] if bar.ends is not None else bar.value for bar in bars if bar.value < 0), default=0.0)
        span = (farthest - least) or 1.0
        axes.set_xlim(least, farthest + 0.3 * span)  # room for the values
        axes.axvline(0, color=LINE, linewidth=1)
    axes.set_title(title)
    name_rows(axes, [bar.name for bar in bars])
    axes.set_xticks([])
    axes.minorticks_off()
    axes.spines[["left", "bottom"]].set_visible(False)


def name_rows(axes: Any, names: Sequence[str]) -> None:
    """Names beside rows 0, 1, ... from the top down."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)


def label_points(axes: Any, points: Sequence[tuple[float, float, float, str]]) -> None:
    """Names beside markers of (x, y, area in square points), each where it meets no other name or marker, if there is
    such a place around it. Axes must have their final limits."""
    figure = axes.figure
    figure.draw_without_rendering()
    pixels = figure.dpi / 72
    centres = [axes.transData.transform((x, y)) for x, y, _, _ in points]
    radii = [pixels * math.sqrt(area / math.pi) for _, _, area, _ in points]
    taken = [(cx - r, cy - r, cx + r, cy + r) for (cx, cy), r in zip(centres, radii, strict=True)]
    for i, (x, y, _, name) in enumerate(points):
        label = axes.annotate(name, (x, y), (0, 0), textcoords="offset points", color=MUTED)
        extent = label.get_window_extent()
        size = (extent.width, extent.height)
        others = [box for j, box in enumerate(taken) if j != i]

        def clashes(place: _Place, centre: Any = centres[i], size: Any = size, others: Any = others) -> float:
            box = _box(centre, place, size, pixels)
            return sum(_overlap(box, other) for other in others) + _outside(box, figure)

        best = min(_places(radii[i] / pixels + 3), key=clashes)
        taken.append(_box(centres[i], best, size, pixels))
        label.set(position=best[:2], horizontalalignment=best[2], verticalalignment=best[3])


def number_axes(axes: Any) -> None:
    """Plain numbers on both axes, faint lines across."""
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    axes.grid(visible=True, axis="y")
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelcolor=MUTED)
    axes.spines["left"].set_visible(False)


def whole_ticks(axis: Any) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def short(name: str) -> str:
    """``name`` as it fits beside a bar."""
    name = " ".join(wording.printable(name).split())
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "\u2026"


_Box = tuple[float, float, float, float]  # left, bottom, right, top
_Place = tuple[float, float, str, str]  # offset in points, and which end of the text is there
_SHARES = {"left": 0.0, "center": 0.5, "right": 1.0, "bottom": 0.0, "top": 1.0}


def _places(radius: float) -> list[_Place]:
    """Around a marker, the best first."""
    near = 0.7 * radius
    return [
        (radius, 0, "left", "center"),
        (near, near, "left", "bottom"),
        (near, -near, "left", "top"),
        (-radius, 0, "right", "center"),
        (-near, near, "right", "bottom"),
        (-near, -near, "right", "top"),
        (0, radius, "center", "bottom"),
        (0, -radius, "center", "top"),
    ]


def _box(centre: tuple[float, float], place: _Place, size: tuple[float, float], pixels: float) -> _Box:
    """Of a text of ``size`` pixels."""
    left = centre[0] + pixels * place[0] - _SHARES[place[2]] * size[0]
    bottom = centre[1] + pixels * place[1] - _SHARES[place[3]] * size[1]
    return left, bottom, left + size[0], bottom + size[1]


def _overlap(a: _Box, b: _Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def _outside(box: _Box, figure: Any) -> float:
    """How much of a box the figure cuts off."""
    whole = (0.0, 0.0, float(figure.bbox.width), float(figure.bbox.height))
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, whole)
