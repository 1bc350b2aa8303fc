"""What the commands print at their end."""

import pytest
from helpers import records

from pico_tg.generation import Stats
from pico_tg.tools.report import describe_routing, describe_stats, printable, table


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
        "share of bytes routed: 19.8%",
    ]
    alone = describe_stats(Stats(bytes=9, passes=9, routed=1, seconds=1.0))  # of one head
    assert "draft" not in alone
    assert "bytes/s: 0.0" in describe_stats(Stats())  # no byte


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.9, 0.1, 0.1, 0.9, 0.1], "40% of the bytes through the deep blocks: "
         "100% of the spaces and 33% of the bytes inside words."),
        ([0.1] * 5, "none of the bytes through the deep blocks."),
        ([0.9] * 5, "100% of the bytes through the deep blocks."),
    ],
)  # fmt: skip
def test_the_sentence_about_the_router(weights, expected):
    """ " caf": what is inside a word comes after its first byte; what is absent is not named."""
    assert describe_routing(records(b" cafe", weights)) == f"The router sends {expected}"
    assert describe_routing(records(b"..", [0.1, 0.9])).endswith(
        "50% of the bytes through the deep blocks."
    )


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
