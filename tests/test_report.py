"""What is shown of a sample, and that it is shown as soon as it is decided."""

import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pico_tg.generation import GeneratedByte
from pico_tg.tools.html import html_page
from pico_tg.tools.terminal import (
    RESET,
    characters,
    colored_text,
    decode_text,
    split_prompt,
    split_samples,
    visible,
)


def record(
    byte: int, weight: float = 0.1, drafted: bool = False, logprob: float = -1.0, sample: int = 0
) -> GeneratedByte:
    return GeneratedByte(byte, weight, weight > 0.5, logprob, drafted, sample)


def records(data: bytes, weights: list[float] | None = None) -> list[GeneratedByte]:
    return [record(b, w) for b, w in zip(data, weights or [0.1] * len(data), strict=True)]


def test_decode_text_goes_on_after_bad_bytes():
    data = "é€".encode() + b"\xff" + b"a" + "é".encode()[:1]
    assert "".join(decode_text(records(data))) == "é€�a�"


def test_decode_text_marks_characters_not_bytes():
    assert "".join(decode_text(records("aéb".encode(), [0.9, 0.1, 0.9, 0.1]), "_")) == "_a_éb"


GOOD = [text.encode() for text in ("a", "\n", "é", "€", "😀", "\ufffd")]
CUT_OFF = [b"\xc3", b"\xe2", b"\xe2\x82", b"\xf0\x9f"]
NEVER = [b"\xff", b"\x80", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80"]
PARTS = st.sampled_from(GOOD + CUT_OFF + NEVER)


@given(st.one_of(st.binary(max_size=12), st.lists(PARTS, max_size=6).map(b"".join)), st.data())
def test_characters_are_those_of_python(data, draw):
    """Wherever the prompt ends, the text is that of all bytes; each byte is in one character."""
    cut = draw.draw(st.integers(0, len(data)))
    text, begun = split_prompt(data[:cut])
    found = list(characters(records(data[cut:]), begun))
    assert text + "".join(c.text for c in found) == data.decode(errors="replace")
    assert b"".join(c.data for c in found) == begun + data[cut:]
    generated = [r.byte for c in found for r in c.records]
    assert bytes(generated) == data[cut:]
    for c in found:
        assert c.data.endswith(bytes(r.byte for r in c.records))
        assert c.valid == (c.data.decode(errors="ignore") == c.text)


@pytest.mark.parametrize(
    ("data", "after"),
    [
        (b"ab", ["a", "b"]),
        ("é!".encode(), ["", "é", "!"]),
        (b"\xffa", ["�", "a"]),
        (b"\xe2\x82a", ["", "", "�a"]),
        (b"\xe2\xc3\xa9", ["", "�", "é"]),
    ],
)
def test_text_comes_as_soon_as_it_is_decided(data, after):
    """After each byte, whatever no later byte can change is there."""
    taken = 0

    def source():
        nonlocal taken
        for r in records(data):
            taken += 1
            yield r

    came = [""] * len(data)
    for piece in decode_text(source()):
        came[taken - 1] += piece
    assert came == after


def test_a_character_has_the_highest_weight_of_its_bytes():
    (c,) = characters([record(0xC3, 0.2, True), record(0xA9, 0.7, True)])
    assert (c.weight, c.routed, c.drafted) == (0.7, 1, True)
    (c,) = characters([record(0xC3, 0.2, False), record(0xA9, 0.1, True)])
    assert (c.weight, c.routed, c.drafted) == (0.2, 0, False)
    (c,) = characters([record(0xA9, 0.3, True)], begun=b"\xc3")
    assert (c.text, c.weight, c.drafted) == ("é", 0.3, True)
    (c,) = characters([], begun=b"\xc3")
    assert (c.text, c.weight, c.drafted) == ("�", 0.0, False)


def test_split_samples():
    """In order, also empty ones, and without reading further than needed."""
    source = iter([record(97, sample=1), record(98, sample=1), record(99, sample=3)])
    split = [bytes(r.byte for r in sample) for sample in split_samples(source, 5)]
    assert split == [b"", b"ab", b"", b"c", b""]
    source = iter([record(97), record(98)])
    assert next(next(split_samples(source, 1))).byte == 97
    assert next(source).byte == 98


SGR = re.compile(r"\x1b\[[\d;]*m")


def test_coloured_text():
    shown = list(colored_text([record(97, 0.0), record(98, 0.9), record(99, 0.1, True)]))
    assert shown[0] == "a"
    assert re.fullmatch(r"\x1b\[48;5;\d+;38;5;\d+mb\x1b\[0m", shown[1])
    assert shown[2] == f"\x1b[4mc{RESET}"
    # each step of weight looks different, 0.5 like what is below it
    steps = [next(colored_text([record(97, (i + 0.5) / 8)])) for i in range(8)]
    assert len(set(steps)) == 8
    assert next(colored_text([record(97, 0.5)])) == steps[3]
    assert next(colored_text([record(97, 1.0)])) == steps[7]


@given(st.binary(max_size=30), st.data())
def test_colours_end_with_every_piece(data, draw):
    weights = [draw.draw(st.floats(0, 1)) for _ in data]
    shown = list(colored_text(records(data, weights), "_"))
    for piece in shown:
        codes = SGR.findall(piece)
        assert not codes or (len(codes) == 2 and codes[1] == RESET)
        assert "\n" not in piece or piece.endswith("\n")  # the break itself is not colored
        assert piece.count("\x1b") == len(codes)
    plain = SGR.sub("", "".join(shown)).replace(" \n", "\n").replace("_", "")
    assert plain == visible(data.decode(errors="replace")).replace(" \n", "\n").replace("_", "")


def test_visible():
    assert visible("a\tb\n\x1b[31m\r\x7f\x85é\u200d") == "a\tb\n\\x1b[31m\\r\\x7f\\x85é\u200d"


class Page(HTMLParser):
    """The text of a page by where it is, its tips, and whether its tags fit together."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.samples: list[list[tuple[str, dict]]] = []  # (text, attributes of its element)
        self.headings: list[str] = []
        self.feed(page)
        self.close()
        assert [tag for tag, _ in self.open if tag not in ("html", "li")] == []

    def handle_starttag(self, tag, attrs):
        assert not {"src", "href", "onclick"} & dict(attrs).keys()
        assert tag not in ("script", "link", "img", "iframe")
        if dict(attrs).get("class") == "text" and tag == "div":
            self.samples.append([])
        if tag != "meta":
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self.open[-1][0] == "li" != tag:  # whose end tag may be left out
            self.open.pop()
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tags = [tag for tag, _ in self.open]
        if "div" in tags and self.samples:
            within = next(a for tag, a in reversed(self.open) if tag in ("b", "span", "div"))
            self.samples[-1].append((data, within))
        if tags[-1:] == ["h1"]:
            self.headings.append(data)

    def text(self, number: int = 0) -> str:
        return "".join(text for text, _ in self.samples[number])


def test_html_page():
    sample = [
        record(ord("<"), 0.25, logprob=math.log(0.5)),
        record(ord("\n"), 0.75, drafted=True),
        record(0xC3, 0.125),
        record(0xA9, 0.75, drafted=True),
        record(0xFF, 0.0),
        record(0x1B, 0.0),
    ]
    source = html_page(b'The\t  "<b>"\n', [sample], "<small>, run a", {"seed": 3, "a&b": "<i>"})
    assert "http" not in source
    assert "@import" not in source
    assert "url(" not in source
    assert "prefers-color-scheme: dark" in source
    assert "white-space: break-spaces" in source
    page = Page(source)
    assert page.headings == ["<small>, run a"]
    assert page.text() == 'The\t  "<b>"\n<\né\\xff\\x1b'
    assert page.samples[0][0] == ('The\t  "<b>"\n', {"class": "prompt"})
    less, newline, accented, bad, escape = (attributes for _, attributes in page.samples[0][1:])
    assert less == {
        "style": "--w:0.25",
        "data-tip": "“<” U+003C · byte 0x3c · router weight 0.25, not routed · probability 50 % · "
        "not drafted",
    }
    assert newline["class"].split() == ["r", "d", "n"]
    assert "line feed · byte 0x0a · router weight 0.75, routed" in newline["data-tip"]
    assert "accepted draft" in newline["data-tip"]
    assert accented["class"] == "r"
    assert accented["style"] == "--w:0.75"
    first, second = accented["data-tip"].split("\n")
    assert first.startswith("“é” U+00E9 · byte 1 of 2 0xc3 · router weight 0.12, not routed")
    assert second.startswith("“é” U+00E9 · byte 2 of 2 0xa9 · router weight 0.75, routed")
    assert bad["data-tip"].startswith("not UTF-8 · byte 0xff")
    assert escape["data-tip"].startswith("“\\x1b” U+001B · byte 0x1b")
    assert "6 bytes, 33% routed, 33% accepted drafts" in source


def test_html_page_of_several_samples():
    """Each after the prompt, empty ones too; a character may begin in the prompt."""
    page = html_page(b"caf\xc3", [records(b"\xa9!"), [], records(b"a")], "t", {})
    parsed = Page(page)
    assert [parsed.text(i) for i in range(3)] == ["café!", "caf\\xc3", "caf\\xc3a"]
    assert all(f"Sample {i} of 3" in page for i in (1, 2, 3))
    assert "0 bytes" in page
    assert "byte 2 of 2 0xa9" in parsed.samples[0][1][1]["data-tip"]
    assert "data-tip" not in parsed.samples[1][1][1]


def test_html_page_without_a_prompt():
    page = html_page(b"", [records(b"a")], "t", {})
    assert "prompt</span>" not in page
    assert Page(page).text() == "a"
    assert "prompt</span>" in html_page(b"b", [records(b"a")], "t", {})


def test_nothing_is_hidden_in_a_page():
    """What shows nothing, or could turn the text around, is written as an escape."""
    text = "a\u202eb\u200dc\u2028d\0e\r\nf\u00a0g\u3000h\ue000i\x85"
    page = Page(html_page(text.encode(), [records(text.encode())], "t", {}))
    shown = "a\\u202eb\\u200dc\\u2028d\\x00e\\r\nf\u00a0g\u3000h\\ue000i\\x85"
    assert page.text() == shown * 2
