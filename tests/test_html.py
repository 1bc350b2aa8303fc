"""Pages of samples: what each byte's details are, and that nothing in a text breaks the page."""

import dataclasses
import math
from html.parser import HTMLParser

from helpers import record, records

from pico_tg.tools.html import html_page, mark_up
from pico_tg.tools.terminal import characters


class Page(HTMLParser):
    """The text of a page by where it is, its tips, and whether its tags fit together."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.samples: list[list[tuple[str, dict]]] = []  # (text, attributes of its element)
        self.headings: list[str] = []
        self.feed(page)
        self.close()
        assert [tag for tag, _ in self.open] == ["html"]

    def handle_starttag(self, tag, attrs):
        assert not {"src", "href", "onclick"} & dict(attrs).keys()
        assert tag not in ("script", "link", "img", "iframe")
        if dict(attrs).get("class") == "text" and tag == "div":
            self.samples.append([])
        if tag not in ("meta", "input"):
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tags = [tag for tag, _ in self.open]
        if tags[1:2] == ["div"] and self.samples:
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
        "style": "--w:.25;--s:.12",
        "data-tip": "“<” 0x3c · router weight 0.25 · probability 50 %, 1.0 bits",
    }
    assert newline["class"].split() == ["d", "n"]
    assert "line feed 0x0a · router weight 0.75, routed" in newline["data-tip"]
    assert "accepted draft" in newline["data-tip"]
    assert "class" not in accented  # one of its bytes is no draft
    first, second = accented["data-tip"].split("\n")
    assert first.startswith("“é” byte 1 of 2 0xc3 · router weight 0.12 · ")
    assert second.startswith("“é” byte 2 of 2 0xa9 · router weight 0.75, routed · ")
    assert bad["data-tip"].startswith("not UTF-8 0xff")
    assert escape["data-tip"].startswith("“\\x1b” 0x1b")
    assert "The router sends 33% of the bytes through the deep blocks" in source
    assert "<small>6 bytes</small>" in source


def test_two_shades():
    """By the highest router weight of its bytes, and by the surprisal of all of them, up to 8 bits.

    A rule may leave out bytes of any weight: they are not as dark as routed ones.
    """
    bits = [3.0, 2.0, 1.0, 0.0, 16.0]
    sample = [
        record(byte, weight, logprob=-b * math.log(2))
        for byte, weight, b in zip("aéb!".encode(), [0.1, 0.2, 0.9, 0.0, 0.4], bits, strict=True)
    ]
    sample[4] = dataclasses.replace(sample[4], router_weight=0.9)  # and not routed
    page = Page(html_page(b"", [sample], "t", {}))
    assert [a.get("style") for _, a in page.samples[0]] == [
        "--w:.10;--s:.38",
        "--w:.90;--s:.38",
        None,
        "--w:.50;--s:1.00",
    ]


def test_a_conclusion_in_place_of_the_routers():
    page = html_page(b"", [records(b"a")], "t", {}, conclusion="1.5 bits & more.")
    assert '<p class="conclusion">1.5 bits &amp; more.</p>' in page
    assert "The router sends" not in page


def test_a_page_is_small():
    """Less than 120 bytes for each byte of text, of different weights and probabilities."""
    sample = [record(97 + i % 26, i / 1000, logprob=-i / 100) for i in range(1000)]
    assert len(html_page(b"", [sample], "t", {})) < 120_000


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
    assert 'class="prompt"' not in page
    assert "drafts" not in page.split("</style>")[1]  # none was drafted
    assert Page(page).text() == "a"
    assert 'class="prompt"' in html_page(b"b", [records(b"a")], "t", {})


def test_nothing_is_hidden_in_a_page():
    """What shows nothing, or could turn the text around, is written as an escape.

    A line break of Windows is one, of two bytes.
    """
    text = "a\u202eb\u200dc\u2028d\0e\r\nf\u00a0g\u3000h\ue000i\x85\rj"
    page = Page(html_page(text.encode(), [records(text.encode())], "t", {}))
    shown = "a\\u202eb\\u200dc\\u2028d\\x00e\nf\u00a0g\u3000h\\ue000i\\x85\\rj"
    assert page.text() == shown * 2
    (line_break,) = (a for part, a in page.samples[0] if part == "\n")
    assert line_break["class"] == "n"
    assert "\nline break byte 2 of 2 0x0a" in line_break["data-tip"]


def test_no_character_is_markup():
    """The web page inserts what `mark_up` returns: whatever the model writes, tags are our own."""
    found = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, {name for name, _ in attrs}))

    written = bytes(range(256)) + "".join(map(chr, range(0x3000))).encode()
    tags = Tags()
    for character in characters(records(written)):
        tags.feed(mark_up(character))
    tags.close()
    assert {tag for tag, _ in found} == {"b", "i"}
    assert set.union(*(names for _, names in found)) <= {"class", "style", "data-tip"}
    assert len([tag for tag, _ in found if tag == "b"]) > 0x3000
