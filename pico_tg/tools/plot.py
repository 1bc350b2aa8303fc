"""Line charts as self-contained SVG files, without a plotting package."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from unicodedata import east_asian_width

from .report import GAP

# distinguishable on white, also with the common color deficiencies (Okabe and Ito, 2008)
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("", "6 4", "2 3", "9 3 2 3")  # stroke-dasharray, for more lines than colors
WIDTH = 760
LEFT, TOP, BOTTOM = 80, 44, 48  # margins of a panel, px; the right one fits the names
ROW = 17  # height of a name, px
SAMPLE = 22  # length of the piece of a line before its name, px
MAX_NAME = 270  # width of a name, px
POINTS = 1500  # of a line, at most: about two for each pixel
PEAK = 1.0  # bits per byte above the average, at which a step of training is drawn as it is
EARLY = 0.25  # part of each run whose bits per byte, which fall from 8, need not be in the picture


@dataclass(frozen=True)
class Line:
    """One line of a chart: name, points and look."""

    name: str
    xs: list[float]
    ys: list[float]
    color: str
    dash: int = 0  # index into DASHES
    thin: bool = False


@dataclass(frozen=True)
class Panel:
    """One chart: lines, with names at their ends; `y_range` clips them."""

    lines: list[Line]
    title: str
    x_label: str
    y_label: str
    y_range: tuple[float, float] | None = None
    height: int = 400


def svg(panels: list[Panel], notes: Sequence[str] = ()) -> str:
    """The panels, one below the other, as one SVG, with one range of x; notes: lines below them.

    A panel grows if its names need space.
    """
    panels = [replace(panel, height=max(panel.height, _names_height(panel))) for panel in panels]
    names = [_shortened(line.name) for panel in panels for line in panel.lines]
    right = WIDTH - 24 - SAMPLE - max([*map(_text_width, names), 0])
    height = sum(panel.height for panel in panels) + ROW * (len(notes) + bool(notes))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    xs = [x for panel in panels for line in panel.lines for x, _ in _finite(line)] or [0.0]
    top = 0
    for number, panel in enumerate(panels):
        drawn = _draw(panel, right, f"inside{number}", min(xs), max(xs))
        parts += [f'<g transform="translate(0 {top})">', *drawn, "</g>"]
        top += panel.height
    for row, note in enumerate(notes, 1):
        parts.append(f'<text x="{LEFT}" y="{top + ROW * row}" fill="#555">{escape(note)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _draw(panel: Panel, right: int, clip: str, start: float, end: float) -> list[str]:
    x_ticks = ticks(start, end)
    # the lines end at the names; the last tick may be further right
    x_end = end if end > start else x_ticks[-1]
    ys = _heights(panel.lines) or [0.0]
    low, high = panel.y_range or (min(ys), max(ys))
    y_ticks = ticks(low, high, about=panel.height // 70)
    bottom = panel.height - BOTTOM

    def at_x(x: float) -> float:
        return LEFT + (x - x_ticks[0]) / (x_end - x_ticks[0]) * (right - LEFT)

    def at_y(y: float) -> float:
        return bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - TOP)

    parts = [
        f'<text x="{LEFT}" y="26" font-size="16" font-weight="600">{escape(panel.title)}</text>'
    ]
    for y in y_ticks:
        parts.append(
            f'<path d="M{LEFT} {at_y(y):.1f}H{right}" stroke="#ddd"/><text x="{LEFT - 8}" '
            f'y="{at_y(y) + 4:.1f}" text-anchor="end" fill="#555">{_short(y)}</text>'
        )
    for x in (x for x in x_ticks if x <= x_end):
        parts.append(
            f'<text x="{at_x(x):.1f}" y="{bottom + 18}" text-anchor="middle" '
            f'fill="#555">{_short(x)}</text>'
        )
    parts += [
        f'<path d="M{LEFT} {bottom}H{right}" stroke="#555"/>',
        f'<text x="{(LEFT + right) / 2:.0f}" y="{bottom + 38}" text-anchor="middle">'
        f"{escape(panel.x_label)}</text>",
        f'<text transform="translate(16 {(TOP + bottom) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(panel.y_label)}</text>',
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP - 4}" width="{right - LEFT + 4}" '
        f'height="{bottom - TOP + 8}"/></clipPath>',
    ]
    ends = []
    for line in panel.lines:
        points = [(f"{at_x(x):.1f}", f"{at_y(y):.1f}") for x, y in _thinned(_finite(line))]
        if not points:
            continue
        if len(points) == 1:
            parts.append(
                f'<circle cx="{points[0][0]}" cy="{points[0][1]}" r="{2 if line.thin else 4}" '
                f'fill="{line.color}" clip-path="url(#{clip})"/>'
            )
        else:
            parts.append(
                f'<path d="M{"L".join(map(" ".join, points))}" fill="none" {_style(line)} '
                f'stroke-linejoin="round" clip-path="url(#{clip})"/>'
            )
        if line.name:
            ends.append((min(max(float(points[-1][1]), TOP), bottom), line))
    # write names beside the ends of their lines, moved apart if they would overlap
    ends.sort(key=lambda end: end[0])
    for y, (_, line) in zip(_apart([y for y, _ in ends], bottom), ends, strict=True):
        name = _shortened(line.name)
        whole = "" if name == line.name else f"<title>{escape(line.name)}</title>"
        parts.append(
            f'<path d="M{right + 10} {y:.1f}h{SAMPLE}" {_style(line)}/>'
            f'<text x="{right + 16 + SAMPLE}" y="{y + 4:.1f}" fill="{line.color}">'
            f"{escape(name)}{whole}</text>"
        )
    return parts


def _style(line: Line) -> str:
    dash = f' stroke-dasharray="{DASHES[line.dash]}"' if line.dash else ""
    look = 'stroke-width="1" stroke-opacity="0.5"' if line.thin else 'stroke-width="2"'
    return f'stroke="{line.color}" {look}{dash}'


def _names_height(panel: Panel) -> int:
    return TOP + BOTTOM + ROW * sum(bool(line.name and _finite(line)) for line in panel.lines)


def _apart(heights: list[float], bottom: float) -> list[float]:
    """Ascending heights, moved to be at least a row apart and not below `bottom`."""
    moved = list(heights)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + ROW)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], bottom - ROW * (len(moved) - 1 - i))
    return moved


def _text_width(text: str) -> int:
    """An upper estimate of the width of a text, px."""
    return sum(14 if east_asian_width(letter) in "WF" else 9 for letter in text)


def _shortened(name: str) -> str:
    """The name, without its middle if it is wider than MAX_NAME: names often differ at the end."""
    kept, shown = len(name), name
    while _text_width(shown) > MAX_NAME:
        kept -= 2
        shown = f"{name[: kept // 2]}…{name[-(kept // 2) :]}"
    return shown


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS of the points: the first, the last, and the highest of each stretch."""
    if len(points) <= POINTS:
        return points
    size = math.ceil(len(points) / (POINTS - 2))
    parts = (points[i : i + size] for i in range(0, len(points), size))
    return [points[0], *(max(part, key=lambda point: point[1]) for part in parts), points[-1]]


def _finite(line: Line) -> list[tuple[float, float]]:
    pairs = zip(line.xs, line.ys, strict=True)
    return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers, evenly spaced, that enclose [low, high]."""
    if high <= low:
        around = abs(low) / 10 or 0.5
        low, high = low - around, low + around
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _short(value: float) -> str:
    """A tick's label: 1500000 as 1.5M, 0.30000000000000004 as 0.3."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def smoothed(values: list[float], weight: float) -> list[float]:
    """Exponential moving averages; `weight` is that of the newest value. Not biased to zero."""
    averages, total, norm = [], 0.0, 0.0
    for value in values:
        total = (1 - weight) * total + weight * value
        norm = (1 - weight) * norm + weight
        averages.append(total / norm)
    return averages


def training_chart(runs: dict[str, list[dict]], data: str = "", notes: Sequence[str] = ()) -> str:
    """SVG of training runs by name, over the bytes that each was trained on.

    Bits per byte; the share of bytes routed and the learning rate, if they change; the routing gap,
    if it exceeds GAP. data: what the runs were trained on, for the title; notes: lines at the end.
    """
    thin, averages, thick, gaps, shares, rates = [], [], [], [], [], []
    for number, (name, records) in enumerate(runs.items()):
        look = COLORS[number % len(COLORS)], number // len(COLORS) % len(DASHES)
        held_out = _curve(name, records, "validation_bits_per_byte", look, 4)
        mean = _curve(name, records, "bits_per_byte", look, 4, average=True)
        measures = (record["bits_per_byte"] for record in records)
        peaks = [b if b > m + PEAK else m for b, m in zip(measures, mean.ys, strict=True)]
        label = "" if held_out.xs else mean.name
        thin.append(replace(mean, name=label, ys=peaks, thin=True))
        averages.append(mean)
        thick.append(held_out)
        gaps.append(_curve(name, records, "validation_routing_gap", look))
        shares.append(_curve(name, records, "router_rate", look, average=True))
        rates.append(_curve(name, records, "lr", look))
    of = data and f" of {_shortened(data)}"
    title = f"Bits per byte{of}: held out (thick), in training (thin)"
    seen, y_range = "bytes trained on", settled(averages + thick)
    panels = [Panel(thin + thick, title, seen, "bits per byte", y_range)]
    if any(gap > GAP for gap in _heights(gaps)):
        title = "Causal routing minus top-k, held out"
        panels.append(Panel(gaps, title, seen, "bits per byte", height=250))
    for lines, title, unit in (
        (shares, "Share of bytes routed, averages", "share"),
        (rates, "Learning rate", "rate"),
    ):
        if len({f"{y:.2g}" for y in _heights(lines)}) > 1:
            panels.append(Panel(lines, title, seen, unit, height=250))
    return svg(panels, ["In training: averages and peaks, with the tags of documents.", *notes])


def settled(lines: list[Line]) -> tuple[float, float]:
    """The range of the lines' heights, without those of the steep beginning of each line."""
    return min(_heights(lines), default=0.0), max(_heights(lines, EARLY), default=8.0)


def _curve(name: str, records: list, key: str, look: tuple, digits=2, average=False) -> Line:
    """A figure of the records that have it, over the bytes; its last value follows the name."""
    found = [record for record in records if key in record]
    ys = [record[key] for record in found]
    if average:
        ys = smoothed(ys, min(1.0, 20 / len(ys)))
    label = f"{name} {ys[-1]:.{digits}g}" if ys else name
    return Line(label, [record["bytes"] for record in found], ys, *look)


def _heights(lines: list[Line], after: float = 0.0) -> list[float]:
    """The heights of all lines, without the first part `after`, 0 to 1, of each."""
    found = []
    for points in filter(None, map(_finite, lines)):
        start, end = points[0][0], points[-1][0]
        found += [y for x, y in points if x >= start + after * (end - start)]
    return found
