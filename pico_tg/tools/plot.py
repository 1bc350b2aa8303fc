"""Line charts as self-contained SVG files, without a plotting package."""

import math
from dataclasses import dataclass, replace
from html import escape
from unicodedata import east_asian_width

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


def svg(panels: list[Panel]) -> str:
    """The panels, one below the other, as one SVG. A panel grows if its names need space."""
    panels = [replace(panel, height=max(panel.height, _names_height(panel))) for panel in panels]
    names = [_shortened(line.name) for panel in panels for line in panel.lines]
    right = WIDTH - 24 - SAMPLE - max([*map(_text_width, names), 0])
    height = sum(panel.height for panel in panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    top = 0
    for number, panel in enumerate(panels):
        parts += [f'<g transform="translate(0 {top})">', *_draw(panel, right, f"inside{number}")]
        parts.append("</g>")
        top += panel.height
    return "\n".join([*parts, "</svg>\n"])


def _draw(panel: Panel, right: int, clip: str) -> list[str]:
    points = [(x, y) for line in panel.lines for x, y in _finite(line)] or [(0.0, 0.0)]
    start, end = min(x for x, _ in points), max(x for x, _ in points)
    x_ticks = ticks(start, end)
    # the lines end at the names; the last tick may be further right
    x_end = end if end > start else x_ticks[-1]
    low, high = panel.y_range or (min(y for _, y in points), max(y for _, y in points))
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
    if _text_width(name) <= MAX_NAME:
        return name
    start, end = name[: len(name) // 2], name[len(name) // 2 :]
    while _text_width(f"{start}…{end}") > MAX_NAME:
        start, end = (start[:-1], end) if len(start) > len(end) else (start, end[1:])
    return f"{start}…{end}"


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS of the points: the first, the last, each stretch's lowest and highest."""
    if len(points) <= POINTS:
        return points
    inner, stretches, kept = points[1:-1], POINTS // 2 - 1, [points[0]]
    for i in range(stretches):
        part = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
        at = {choose(range(len(part)), key=lambda n: part[n][1]) for choose in (min, max)}
        kept += [part[n] for n in sorted(at)]
    return [*kept, points[-1]]


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
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scale = 1e3 if suffix == "k" else size
            return f"{value / scale:.4g}{suffix}"
    return f"{value:.4g}"


def smoothed(values: list[float], weight: float) -> list[float]:
    """Exponential moving averages; `weight` is that of the newest value. Not biased to zero."""
    averages, total, norm = [], 0.0, 0.0
    for value in values:
        total = (1 - weight) * total + weight * value
        norm = (1 - weight) * norm + weight
        averages.append(total / norm)
    return averages


def training_chart(runs: dict[str, list[dict]]) -> str:
    """SVG of training runs by name, over bytes: bits per byte, routing gap, share routed, lr."""
    bits, gaps, rates, learning_rates = [], [], [], []
    for number, (name, records) in enumerate(runs.items()):
        color = COLORS[number % len(COLORS)]
        dash = number // len(COLORS) % len(DASHES)
        seen = [record["bytes"] for record in records]
        measured = [r for r in records if "validation_bits_per_byte" in r]
        weight = min(1.0, 20 / len(records))
        measures = [r["bits_per_byte"] for r in records]
        averages = zip(measures, smoothed(measures, weight), strict=True)
        train = [bits if bits > mean + PEAK else mean for bits, mean in averages]
        routed = smoothed([r["router_rate"] for r in records], weight)
        validation = [r["validation_bits_per_byte"] for r in measured]
        bits += [
            Line("" if measured else name, seen, train, color, dash, thin=True),
            Line(name, [r["bytes"] for r in measured], validation, color, dash),
        ]
        compared = [r for r in measured if "validation_routing_gap" in r]
        gap = [r["validation_routing_gap"] for r in compared]
        gaps.append(Line(name, [r["bytes"] for r in compared], gap, color, dash))
        rates.append(Line(name, seen, routed, color, dash))
        learning_rates.append(Line(name, seen, [r["lr"] for r in records], color, dash))
    # clip the first steps, which begin at 8 bits: the rest would be flat
    values = [y for line in bits for y in line.ys if math.isfinite(y)] or [0.0, 8.0]
    ends = [line.ys[-1] for line in bits if line.ys] or [8.0]
    y_range = (min(values), min(max(values), max(ends) + 1.5))
    seen, title = (
        "bytes seen",
        "Bits per byte, held out (thick) and in training (thin: averages and peaks, with tags)",
    )
    gap = Panel(gaps, "Causal routing minus top-k, held out", seen, "bits per byte", height=250)
    return svg(
        [
            Panel(bits, title, seen, "bits per byte", y_range),
            *([gap] if any(line.ys for line in gaps) else []),  # runs of earlier versions have none
            Panel(rates, "Share of bytes routed, averages", seen, "share", height=250),
            Panel(learning_rates, "Learning rate", seen, "learning rate", height=250),
        ]
    )
