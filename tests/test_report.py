"""What the commands print at their end."""

import pytest

from pico_tg.generation import Stats
from pico_tg.tools.report import describe_stats, printable, table


def test_table():
    assert table([("name", "value"), ("a", "1,000"), ("long name", "2")]) == (
        "name       value\na          1,000\nlong name      2"
    )


def test_stats():
    stats = Stats(
        bytes=101,
        passes=50,
        routed=20,
        drafts=150,
        accepted=51,
        first_byte_seconds=2.0,
        seconds=4.0,
    )
    assert describe_stats(stats).splitlines() == [
        "bytes: 101",
        "bytes/s: 25.2 (50.0 after the first byte)",
        "time to the first byte: 2.00 s",
        "passes: 50 (2.02 bytes a pass)",
        "accepted bytes a pass: 1.02 (of 3.00 drafts)",
        "router rate: 19.8%",
    ]
    assert "bytes/s: 0.0" in describe_stats(Stats())  # no byte


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\tb\né😀", "a\tb\né😀"),
        ("mod\udce8le", "mod\ufffdle"),  # Latin-1 in a file's name
        ("modell-\udcc3\udcbc", "modell-ü"),  # UTF-8 that an ASCII locale read
        ("\ud800\x01\x1b", "\ufffd\ufffd\ufffd"),
    ],
)
def test_printable(text, expected):
    assert printable(text) == expected
    assert printable(text).encode()
