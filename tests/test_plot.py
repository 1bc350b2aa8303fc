"""Charts: valid XML, every line in it, round ticks, names that fit."""

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from pico_tg.tools.plot import (
    COLORS,
    POINTS,
    WIDTH,
    Line,
    Panel,
    settled,
    smoothed,
    svg,
    ticks,
    training_chart,
)

SVG = "{http://www.w3.org/2000/svg}"


def curves(root):
    """The paths that are lines of the chart, not of its frame or beside a name."""
    return [path for path in root.iter(f"{SVG}path") if path.get("clip-path")]


def drawn(*lines, **options):
    return ElementTree.fromstring(svg([Panel(list(lines), "title", "x", "y", **options)]))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 600, [0, 100, 200, 300, 400, 500, 600]), (1.9, 3.1, [1.8, 2, 2.2, 2.4, 2.6, 2.8, 3, 3.2])],
)
def test_ticks_are_round_and_enclose(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (5, 5), (-3, 1e-9), (1e6, 1e9), (0.1, 0.1001)])
def test_ticks_of_odd_ranges(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 12
    assert found[0] <= low
    assert found[-1] >= high or math.isclose(found[-1], high)


def test_chart():
    lines = [
        Line("a <run>", [0, 1, 2], [3.0, 2.0, math.nan], "#123456"),
        Line("b", [0, 2], [3.0, 2.0], "#654321", dash=1),
        Line("nothing yet", [], [], "#000000"),
    ]
    root = ElementTree.fromstring(svg([Panel(lines, "T & t", "steps", "bits")]))
    texts = {element.text: element for element in root.iter(f"{SVG}text")}
    assert {"T & t", "steps", "bits", "a <run>", "b"} <= texts.keys()
    paths = [p for p in curves(root) if p.get("stroke") in ("#123456", "#654321")]
    assert [p.get("d").count("L") for p in paths] == [1, 1]  # the NaN is left out
    assert [p.get("stroke-dasharray") is not None for p in paths] == [False, True]
    # both lines end at the same height: their names do not overlap
    heights = [float(texts[name].get("y")) for name in ("a <run>", "b")]
    assert abs(heights[0] - heights[1]) >= 15
    numbers = [float(n) for p in paths for n in p.get("d")[1:].replace("L", " ").split()]
    assert all(0 <= x <= WIDTH for x in numbers[::2])
    assert all(0 <= y <= 400 for y in numbers[1::2])


def test_a_chart_without_points_is_still_one():
    ElementTree.fromstring(svg([Panel([], "empty", "x", "y")]))


@pytest.mark.parametrize("x", [0, 1, 65536, -3])
def test_one_point_is_a_circle(x):
    root = drawn(Line("one", [x], [2.5], "#123456"))
    (circle,) = root.iter(f"{SVG}circle")
    assert circle.get("fill") == "#123456"
    assert 0 < float(circle.get("cx")) < WIDTH
    assert 44 < float(circle.get("cy")) < 352
    assert not curves(root)
    labels = [text.text for text in root.iter(f"{SVG}text") if text.get("text-anchor") == "middle"]
    assert len(set(labels)) == len(labels)  # its x axis has different ticks


def test_long_lines_are_thinned():
    """To a bounded size, with both ends where they were."""
    count = 200_000
    ys = [2.0 + 1 / (1 + x) for x in range(count)]
    text = svg([Panel([Line("a", list(range(count)), ys, "#123456")], "t", "x", "y")])
    assert len(text) < 50_000
    (path,) = curves(ElementTree.fromstring(text))
    points = [tuple(map(float, p.split())) for p in path.get("d")[1:].split("L")]
    assert POINTS / 2 < len(points) <= POINTS
    assert points[0] == (80, 44)
    assert points[-1][1] == pytest.approx(352, abs=0.1)
    assert points[-1][0] == max(x for x, _ in points)
    steps = [b[0] - a[0] for a, b in pairwise(points)]
    assert max(steps) < 1.5
    short = drawn(Line("a", list(range(POINTS)), ys[:POINTS], "#123456"))
    assert curves(short)[0].get("d").count("L") == POINTS - 1


def test_names_fit_beside_the_lines():
    names = ["b", "soap-with-a-rate-of-0.006", "漢字" * 30, "x" * 100 + " <7>"]
    for count in range(1, len(names) + 1):
        lines = [Line(name, [0, 1], [0, i], "#123456") for i, name in enumerate(names[:count])]
        root = drawn(*lines)
        texts = [text for text in root.iter(f"{SVG}text") if text.get("fill") == "#123456"]
        assert len(texts) == count
        for text in texts:
            wide = sum(1.0 if ord(letter) > 0x3000 else 0.66 for letter in text.text)
            assert float(text.get("x")) + 13 * wide < WIDTH
        # what is left of the lines is most of the width, and wider for a short name
        right = float(re.findall(r"L([\d.]+) ", curves(root)[0].get("d"))[-1])
        assert right > (600 if count == 1 else 380)
    shown = {text.text: text for text in texts}
    assert names[1] in shown
    (cut,) = (text for text in shown if text.startswith("xxx"))
    assert "…" in cut
    assert cut.endswith("x <7>")
    assert shown[cut].find(f"{SVG}title").text == names[3]  # a tooltip


def test_many_names_do_not_overlap():
    lines = [Line(f"line {i}", [0, 1], [0, i % 5], "#123456") for i in range(40)]
    root = drawn(*lines, height=250)
    texts = [text for text in root.iter(f"{SVG}text") if text.get("fill") == "#123456"]
    heights = sorted(float(text.get("y")) for text in texts)
    assert len(heights) == 40
    assert all(b - a >= 16.9 for a, b in pairwise(heights))
    assert heights[0] >= 40
    assert heights[-1] < float(root.get("height"))


def test_runs_differ_in_color_or_dash():
    records = [
        {"bytes": b, "bits_per_byte": 3.0, "router_rate": 0.1 * b, "lr": 1e-3 / b}
        for b in (1, 2, 3)
    ]
    records[-1] |= {"validation_bits_per_byte": 3.1, "validation_routing_gap": 0.1}
    count = 2 * len(COLORS) + 1
    root = ElementTree.fromstring(training_chart({f"run {i}": records for i in range(count)}))
    looks = [(path.get("stroke"), path.get("stroke-dasharray")) for path in curves(root)]
    assert len(set(looks)) == count
    assert len(looks) == 3 * count  # training, routing and learning rate
    assert len(list(root.iter(f"{SVG}circle"))) == 2 * count  # held out and gap, measured once
    names = [text.text for text in root.iter(f"{SVG}text")]
    last = ("3.1", "0.1", "0.3", "0.00033")
    assert all(names.count(f"run {i} {value}") == 1 for i in range(count) for value in last)


def test_panels_that_show_nothing_are_left_out():
    """A gap of at most 0.02, a share routed and a learning rate that never change."""
    records = [{"bytes": b, "bits_per_byte": 3.0, "router_rate": 1.0, "lr": 0.1} for b in (1, 2)]
    records[0] |= {"validation_bits_per_byte": 3.1, "validation_routing_gap": 0.021}
    records[1] |= {"validation_bits_per_byte": 3.1, "validation_routing_gap": -0.3}
    level = training_chart({"run": records})
    records[0]["validation_routing_gap"] = 0.02
    without_gap = training_chart({"run": records})
    changing = training_chart({"run": [records[0], records[1] | {"router_rate": 0.9, "lr": 0.2}]})
    titles = [
        "Bits per byte",
        "Causal routing minus top-k",
        "Share of bytes routed",
        "Learning rate",
    ]
    found = [[f">{title}" in text for title in titles] for text in (level, without_gap, changing)]
    assert found == [[True, True, False, False], [True, *3 * [False]], [True, False, True, True]]


def test_panels_share_the_axis():
    """A figure that was first measured late starts where the others are at that time."""
    late, whole = Line("", [50, 100], [1, 2], "#123456"), Line("", [0, 100], [1, 2], "#654321")
    root = ElementTree.fromstring(svg([Panel([line], "t", "x", "y") for line in (whole, late)]))
    starts = [float(re.match(r"M([\d.]+)", path.get("d"))[1]) for path in curves(root)]
    ends = [re.search(r"L([\d.]+) ", path.get("d"))[1] for path in curves(root)]
    assert starts[1] - starts[0] == pytest.approx((float(ends[0]) - starts[0]) / 2, abs=0.1)
    assert ends[0] == ends[1]


def test_the_height_is_that_of_the_later_part():
    """The steep beginning of each line does not count, however low it is; points alone do."""
    falling = Line("", list(range(101)), [8.0] * 25 + [2.0] * 76, "#123456")
    short = Line("", list(range(11)), [8.0] * 2 + [2.5] * 9, "#123456")
    low_first = Line("", [0, 50, 100], [1.5, 2.0, 1.8], "#123456")
    assert settled([falling]) == (2.0, 2.0)
    assert settled([falling, short]) == (2.0, 2.5)
    assert settled([falling, low_first]) == (1.5, 2.0)
    assert settled([Line("", [7], [3.0], "#123456")]) == (3.0, 3.0)
    low, high = settled([])
    assert low < high


def test_data_and_notes_are_in_the_picture():
    records = [{"bytes": 1, "bits_per_byte": 3.0, "router_rate": 0.5, "lr": 1e-3}]
    root = ElementTree.fromstring(training_chart({"a": records}, "<tales>", ["a note & more"]))
    texts = {element.text: element for element in root.iter(f"{SVG}text")}
    assert any(text.startswith("Bits per byte of <tales>") for text in texts)
    assert float(texts["a note & more"].get("y")) < float(root.get("height"))


def test_a_peak_is_drawn_however_short():
    """One step of 30,000, which averages and thinning would hide."""

    def chart(peak: float) -> str:
        records = [
            {"bits_per_byte": 2.0, "router_rate": 0.25, "lr": 0.001, "bytes": step}
            for step in range(1, 30_001)
        ]
        records[12_344]["bits_per_byte"] = peak
        return training_chart({"run": records})

    def heights(peak: float) -> list[float]:
        (line, *_) = curves(ElementTree.fromstring(chart(peak)))
        points = line.get("d")[1:].split("L")
        assert len(points) <= POINTS
        return [float(point.split()[1]) for point in points]

    assert max(heights(2.0)) - min(heights(2.0)) < 1
    assert max(heights(9.0)) - min(heights(9.0)) > 100
    assert "averages and peaks" in chart(9.0)


def test_smoothing_starts_at_the_first_value():
    assert smoothed([4.0, 4.0, 4.0], 0.1) == pytest.approx([4, 4, 4])
    assert smoothed([1.0, 2.0], 1.0) == [1, 2]
