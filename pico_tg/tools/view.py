"""How a sample looks: as plain text, colored for a terminal, and as a page of its own.

Pure functions from records to text. All of them take the bytes together to characters first, since
only those can be shown; a character of several bytes has the highest weight of any of them, counts
as routed if one of them was, and as drafted if all of them were.
"""

import codecs
import itertools
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..evaluation import Evaluation
    from ..generation import GeneratedByte

BAD = "\ufffd"  # stands for bytes that are not UTF-8
RESET = "\x1b[0m"

# 256-color codes of (background, text) by eighths of the router weight: greys up to 0.5, oranges
# above it, where bytes are routed; each pair is legible by itself, on dark and on light terminals
SHADES = (
    None,
    (238, 231),
    (240, 231),
    (242, 231),
    (94, 231),
    (130, 231),
    (166, 16),
    (208, 16),
)


@dataclass(frozen=True)
class Character:
    """One character of a sample, or a few bytes that are none.

    text: the character, or U+FFFD; data: its bytes; records: those of the bytes that were
    generated, which are all but those that the prompt ended in.
    """

    text: str
    data: bytes
    records: tuple["GeneratedByte", ...]

    @property
    def valid(self) -> bool:
        """Whether the bytes are UTF-8."""
        return self.text.encode() == self.data

    @property
    def weight(self) -> float:
        """The highest router weight of its bytes."""
        return max((record.router_weight for record in self.records), default=0.0)

    @property
    def routed(self) -> int:
        """How many of its bytes went through the latent blocks."""
        return sum(record.router_decision for record in self.records)

    @property
    def drafted(self) -> bool:
        """Whether all of its bytes were accepted drafts."""
        return bool(self.records) and all(record.drafted for record in self.records)


def characters(records: Iterable["GeneratedByte"], begun: bytes = b"") -> Iterator[Character]:
    """The characters of one sample, each as soon as its last byte is there.

    Bytes that cannot become a character are given out as U+FFFD as soon as that is certain, and the
    stream goes on behind them. `begun`: bytes that come before the first record, see
    `split_prompt`.
    """
    data, kept = begun, []

    def decided() -> Iterator[Character]:
        nonlocal data, kept
        while data:
            try:
                text, size = data.decode(), len(data)
            except UnicodeDecodeError as error:
                if error.end == len(data) and error.reason == "unexpected end of data":
                    return
                text, size = BAD, error.end
            generated = len(kept) - (len(data) - size)
            yield Character(text, data[:size], tuple(kept[: max(generated, 0)]))
            data, kept = data[size:], kept[max(generated, 0) :]

    for record in records:
        data += bytes([record.byte])
        kept.append(record)
        yield from decided()
    if data:
        yield Character(BAD, data, tuple(kept))


def split_prompt(prompt: bytes) -> tuple[str, bytes]:
    """The text of a prompt, and the bytes of a character that it ends in the middle of.

    A sample may complete that character. Bytes that are not UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return decoder.decode(prompt), decoder.getstate()[0]


def split_samples(
    records: Iterable["GeneratedByte"], count: int
) -> Iterator[Iterator["GeneratedByte"]]:
    """The records of each of `count` samples, which may be empty; to be read in that order."""
    source = iter(records)
    ahead: list[GeneratedByte] = []  # the first record of a later sample

    def sample(number: int) -> Iterator["GeneratedByte"]:
        while record := ahead.pop() if ahead else next(source, None):
            if record.sample != number:
                ahead.append(record)
                return
            yield record

    return map(sample, range(count))


def decode_text(
    records: Iterable["GeneratedByte"], mark: str = "", begun: bytes = b""
) -> Iterator[str]:
    """The text of one sample as far as it is decided after each byte; `mark` before routed bytes.

    A byte that is not valid UTF-8 becomes U+FFFD. The mark of a byte inside a character stands
    before that character. `begun`: see `characters`.
    """
    for character in characters(records, begun):
        yield mark * character.routed + character.text


def colored_text(
    records: Iterable["GeneratedByte"], mark: str = "", begun: bytes = b""
) -> Iterator[str]:
    """`decode_text` with ANSI colors: background by router weight, accepted drafts underlined.

    Each piece ends with a reset, so that the terminal is never left colored. A line break is shown
    as a shaded space before it. Control characters are made visible.
    """
    for character in characters(records, begun):
        shade = SHADES[max(0, math.ceil(character.weight * len(SHADES)) - 1)]
        codes = ["4"] if character.drafted else []
        if shade:
            codes += [f"48;5;{shade[0]}", f"38;5;{shade[1]}"]
        # a colored line break would color the rest of the line in many terminals
        text, after = (" ", "\n") if character.text == "\n" else (visible(character.text), "")
        shown = f"\x1b[{';'.join(codes)}m{text}{RESET}" if codes else text
        yield mark * character.routed + shown + after


def visible(text: str) -> str:
    """The text with escapes such as \\x1b for control characters, but for line breaks and tabs.

    A terminal would obey them.
    """
    return "".join(
        _escape(c) if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def _escape(character: str) -> str:
    """How Python would write a character that is not ASCII or shows nothing: \\x1b, \\u200e."""
    return character.encode("unicode_escape").decode()


STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f4f0; --card: #fffefb; --ink: #22201d; --muted: #6d675f; --line: #e2ddd3;
  --heat: 244 140 36; --dot: #8f2d04; --draft: #2a6fdb; --tip: #22201d; --tip-ink: #fbf8f2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #161412; --card: #1f1c19; --ink: #ece6dc; --muted: #a29a8d; --line: #37322c;
    --heat: 206 94 12; --dot: #ffd9a8; --draft: #78aefc; --tip: #ece6dc; --tip-ink: #1f1c19;
  }
}
* { box-sizing: border-box }
body {
  margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.25rem 7rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  print-color-adjust: exact; -webkit-print-color-adjust: exact;
}
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere }
h2 { font-size: 1rem; margin: 2rem 0 .6rem; display: flex; flex-wrap: wrap; gap: .1rem .8rem }
h2 small { font-weight: 400; font-size: .875rem; color: var(--muted); align-self: center }
dl, .legend {
  display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0; font-size: .875rem;
}
dl div { display: flex; gap: .4rem }
dt { color: var(--muted) }
dd { margin: 0; overflow-wrap: anywhere }
.legend {
  list-style: none; padding: .65rem 0; margin-top: 1.1rem; color: var(--muted);
  border: solid var(--line); border-width: 1px 0; row-gap: .5rem; align-items: center;
}
.legend .text { padding: 0; border: 0; background: none; display: inline; font-size: .875rem }
.scale {
  display: inline-block; width: 7rem; height: .8rem; vertical-align: -.1rem; margin: 0 .3rem;
  border-radius: 3px; background: linear-gradient(90deg, rgb(var(--heat) / 0), rgb(var(--heat)));
  box-shadow: 0 0 0 1px var(--line);
}
.text {
  padding: 1.1rem 1.25rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; white-space: break-spaces; overflow-wrap: anywhere; tab-size: 8;
  font: .95rem/2 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
.prompt { color: var(--muted) }
b {
  font-weight: inherit; padding: .3em 0 .08em; color: var(--ink);
  background: rgb(var(--heat) / var(--w)); border-bottom: 2px solid transparent;
  background-clip: padding-box;
}
b.d { border-bottom-color: var(--draft) }
b.r {
  background-image: radial-gradient(circle at 50% .22em, var(--dot) 1.5px, transparent 2.2px);
}
b.n::before { content: "\\21b5"; opacity: .6 }
i { font-style: normal; font-size: .75em }
[data-tip]:hover { outline: 2px solid var(--ink); outline-offset: -1px; border-radius: 2px }
[data-tip]:hover::after {
  content: attr(data-tip); position: fixed; z-index: 1; left: 50%; bottom: 1.1rem;
  transform: translateX(-50%); width: max-content; max-width: calc(100vw - 2rem);
  padding: .55rem .9rem; border-radius: 8px; background: var(--tip); color: var(--tip-ink);
  font: .875rem/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  white-space: pre-wrap; pointer-events: none; box-shadow: 0 4px 18px rgb(0 0 0 / .3);
}
"""


def html_page(
    prompt: bytes,
    samples: Sequence[Sequence["GeneratedByte"]],
    title: str,
    facts: Mapping[str, object],
    name: str = "Sample",
) -> str:
    """A page of its own (no script, no other file) with samples and what is known of their bytes.

    Shaded by router weight, a dot over routed bytes, a line under accepted drafts; what is known of
    a byte is shown while the pointer is on it. `facts` are listed under the title; `name` is what a
    sample is called.
    """
    listed = "".join(
        f"<div><dt>{escape(fact)}</dt><dd>{escape(str(value))}</dd></div>"
        for fact, value in facts.items()
    )
    text, begun = split_prompt(prompt)
    before = f'<span class="prompt">{_markup(text)}</span>' if text else ""
    routed = "".join(f'<b class="r" style="--w:.7">{letter}</b>' for letter in "routed")
    parts = [
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1>\n<dl>{listed}</dl>",
        '<ul class="legend">',
        '<li>router weight 0<span class="scale"></span>1',
        f'<li><span class="text">{routed}</span> through the latent blocks',
        '<li><span class="text"><b class="d" style="--w:0">accepted draft</b></span>',
        '<li><span class="text prompt">prompt</span>' if prompt else "",
        "<li>point at a byte for more\n</ul>",
    ]
    for number, records in enumerate(samples, 1):
        heading = f"{name} {number} of {len(samples)}" if len(samples) > 1 else name
        marked = "".join(map(_mark_up_character, characters(records, begun)))
        parts.append(f"<h2>{heading} <small>{_shares(records)}</small></h2>")
        parts.append(f'<div class="text">{before}{marked}</div>')
    return "\n".join(filter(None, parts)) + "\n"


def _shares(records: Sequence["GeneratedByte"]) -> str:
    if not records:
        return "0 bytes"
    routed = sum(record.router_decision for record in records) / len(records)
    drafted = sum(record.drafted for record in records) / len(records)
    count = "1 byte" if len(records) == 1 else f"{len(records):,} bytes"
    return f"{count}, {routed:.0%} routed, {drafted:.0%} accepted drafts"


def _mark_up_character(character: Character) -> str:
    shown = _markup(character.text)
    if not character.valid:
        shown = "<i>" + "".join(f"\\x{byte:02x}" for byte in character.data) + "</i>"
    if not character.records:
        return f'<span class="prompt">{shown}</span>'
    classes = [
        name
        for name, given in (
            ("r", character.routed),
            ("d", character.drafted),
            ("n", character.text == "\n"),
        )
        if given
    ]
    named = f' class="{" ".join(classes)}"' if classes else ""
    tip = escape("\n".join(_tips(character))).replace("\n", "&#10;")
    return f'<b{named} style="--w:{character.weight:.2f}" data-tip="{tip}">{shown}</b>'


def _markup(text: str) -> str:
    """Escaped for HTML; characters that show nothing, or turn the text around, as escapes."""
    return "".join(
        f"<i>{escape(''.join(map(_escape, group)))}</i>" if hidden else escape("".join(group))
        for hidden, group in itertools.groupby(text, _is_hidden)
    )


def _is_hidden(c: str) -> bool:
    """Control and format characters, separators, surrogates, unassigned ones; not \\n and \\t."""
    category = unicodedata.category(c)
    return (category[0] == "C" or category in ("Zl", "Zp")) and c not in "\n\t"


def _tips(character: Character) -> Iterator[str]:
    """What is known of each byte, a line each."""
    names = {" ": "space", "\n": "line feed", "\t": "tab"}
    name = names.get(character.text)
    if name is None:
        shown = _escape(character.text) if _is_hidden(character.text) else character.text
        name = f"“{shown}” U+{ord(character.text):04X}" if character.valid else "not UTF-8"
    size, first = len(character.data), len(character.data) - len(character.records)
    for number, record in enumerate(character.records, first + 1):
        place = f" {number} of {size}" if size > 1 else ""
        routed = "routed" if record.router_decision else "not routed"
        drafted = "accepted draft" if record.drafted else "not drafted"
        yield (
            f"{name} · byte{place} 0x{record.byte:02x} · router weight {record.router_weight:.2f}, "
            f"{routed} · probability {100 * math.exp(record.logprob):.3g} % · {drafted}"
        )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns: the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def describe_evaluation(measured: "Evaluation") -> str:
    """The figures of an evaluation as tables."""
    heads = len(measured.head_accuracy)
    head = [
        ("bytes of text", f"{measured.bytes:,}"),
        ("bytes before each, if there are", f"{measured.context_len:,}"),
        ("bits per byte", f"{measured.bits_per_byte:.4f}"),
        ("without the latent blocks", f"{measured.bits_per_byte_without_latent:.4f}"),
        ("router rate", f"{measured.router_rate:.1%}"),
        ("accepted drafts a pass, by the text", f"{measured.accepted_text:.2f} of {heads - 1}"),
        ("accepted drafts a pass, greedily", f"{measured.accepted_greedy:.2f} of {heads - 1}"),
    ]
    guesses = [("byte", "right", "all drafts so far, by the text", "greedily")]
    by_text, greedy = measured.drafts_right_text, measured.drafts_right_greedy
    for k, right in enumerate(measured.head_accuracy):
        drafts = (f"{by_text[k - 1]:.1%}", f"{greedy[k - 1]:.1%}") if k else ("", "")
        guesses.append((f"{k + 1} ahead", f"{right:.1%}", *drafts))
    places = [("where the router fires", "of bytes", "of decisions", "rate")]
    for name, place in measured.places.items():
        values = (place.share_of_bytes, place.share_of_decisions, place.rate)
        places.append((_words(name), *(f"{value:.1%}" for value in values)))
    matches = [("decisions as word boundaries", "precision", "recall", "F1")]
    for name, match in (
        ("router", measured.boundaries),
        ("random, same rate", measured.boundaries_random),
    ):
        values = (match.precision, match.recall, match.f1)
        matches.append((name, *(f"{value:.3f}" for value in values)))
    return "\n\n".join(map(table, (head, guesses, places, matches)))


def describe_model(facts: Mapping[str, Any]) -> str:
    """What `pico_tg.describe` returned, as tables."""
    parts, operations = facts["parameters"], facts["operations_a_byte"]
    length = operations["context_len"]
    sizes = [(name, str(value)) for name, value in facts["model"].items()]
    parameters = [("parameters", ""), *((_words(name), f"{n:,}") for name, n in parts.items())]
    routed = f"{operations['decoding_router_rate']:.0%} routed"
    costs = [
        (f"operations a byte, context {length:,}", ""),
        ("forward", f"{operations['forward']:,.0f}"),
        ("training", f"{operations['training']:,.0f}"),
        (f"decoding, after {length:,} bytes, {routed}", f"{operations['decoding']:,.0f}"),
        ("memory of decoding's caches", f"{facts['cache_bytes']:,} bytes"),
    ]
    parts = [sizes, parameters, costs]
    if run := facts.get("run"):
        data = [("data " + name, str(v)) for name, v in run["dataset"].items() if v is not None]
        own = [(name, str(value)) for name, value in run["settings"].items()]
        own += [("base_weights", run["base_weights"])] if run["base_weights"] else []
        parts.append([("run", run["name"]), ("steps", f"{run['steps']:,}"), *data, *own])
        rows = [("checkpoint", "MB", "bits/byte", "validation", "router rate")]
        for checkpoint in run["checkpoints"]:
            figures = [
                format(checkpoint[name], style) if name in checkpoint else "-"
                for name, style in (
                    ("bits_per_byte", ".4f"),
                    ("validation_bits_per_byte", ".4f"),
                    ("router_rate", ".1%"),
                )
            ]
            size = f"{checkpoint['bytes'] / 1e6:.2f}"
            rows.append((f"step {checkpoint['step']}", size, *figures))
        parts.append(rows)
    return "\n\n".join(map(table, parts))


def _words(name: str) -> str:
    return name.replace("_", " ")
