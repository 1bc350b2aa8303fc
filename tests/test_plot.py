"""Charts: valid XML, every line in it, round ticks."""

import math
from xml.etree import ElementTree

import pytest

from pico_tg.plot import WIDTH, Line, Panel, smoothed, svg, ticks

SVG = "{http://www.w3.org/2000/svg}"


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
        Line("b", [0, 2], [3.0, 2.0], "#654321", dashed=True),
        Line("nothing yet", [], [], "#000000"),
    ]
    root = ElementTree.fromstring(svg([Panel(lines, "T & t", "steps", "bits")]))
    texts = {element.text: element for element in root.iter(f"{SVG}text")}
    assert {"T & t", "steps", "bits", "a <run>", "b"} <= texts.keys()
    paths = [p for p in root.iter(f"{SVG}path") if p.get("stroke") in ("#123456", "#654321")]
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


def test_smoothing_starts_at_the_first_value():
    assert smoothed([4.0, 4.0, 4.0], 0.1) == pytest.approx([4, 4, 4])
    assert smoothed([1.0, 2.0], 1.0) == [1, 2]
