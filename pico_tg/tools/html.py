"""One HTML file: text shaded by router weight or surprisal, and the details of each byte."""

import itertools
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from ..generation import GeneratedByte
from ..progress import escape_code
from .terminal import Character, characters, split_prompt

FULL_BITS = 8  # surprisal, in bits, of the darkest shade

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
    samples: Sequence[Sequence[GeneratedByte]],
    title: str,
    facts: Mapping[str, object],
    name: str = "Sample",
    surprisal: bool = False,
) -> str:
    """A self-contained page, without scripts, that shows samples and the details of their bytes.

    Characters are shaded by router weight, with a dot over routed characters and a line under
    accepted drafts; hovering over a character shows the details of its bytes. `facts` are listed
    under the title; `name` is the heading of a sample. With `surprisal`, each sample is shown
    again, shaded by the surprisal of the byte after each character: 0 to FULL_BITS bits.
    """
    listed = "".join(
        f"<div><dt>{escape(fact)}</dt><dd>{escape(str(value))}</dd></div>"
        for fact, value in facts.items()
    )
    text, begun = split_prompt(prompt)
    before = f'<span class="prompt">{_markup(text)}</span>' if text else ""
    routed = "".join(f'<b class="r" style="--w:.7">{letter}</b>' for letter in "routed")
    drafted = any(record.drafted for records in samples for record in records)
    parts = [
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1>\n<dl>{listed}</dl>",
        '<ul class="legend">',
        '<li>router weight 0<span class="scale"></span>1',
        f'<li><span class="text">{routed}</span> through the latent blocks',
        '<li><span class="text"><b class="d" style="--w:0">accepted draft</b></span>' * drafted,
        '<li><span class="text prompt">prompt</span>' if prompt else "",
        "<li>point at a byte for more\n</ul>",
    ]
    for number, records in enumerate(samples, 1):
        heading = f"{name} {number} of {len(samples)}" if len(samples) > 1 else name
        marked = "".join(map(_mark_up_character, characters(records, begun)))
        parts.append(f"<h2>{heading} <small>{_shares(records)}</small></h2>")
        parts.append(f'<div class="text">{before}{marked}</div>')
        if surprisal:
            scale = f'0<span class="scale"></span>{FULL_BITS} bits'
            parts.append(f"<h2>Surprisal of the next byte <small>{scale}</small></h2>")
            parts.append(f'<div class="text">{before}{_by_surprisal(records, begun)}</div>')
    return "\n".join(filter(None, parts)) + "\n"


def _shares(records: Sequence[GeneratedByte]) -> str:
    if not records:
        return "0 bytes"
    routed = sum(record.router_decision for record in records) / len(records)
    drafted = sum(record.drafted for record in records) / len(records)
    count = "1 byte" if len(records) == 1 else f"{len(records):,} bytes"
    return f"{count}, {routed:.0%} routed" + (f", {drafted:.0%} accepted drafts" if drafted else "")


def _by_surprisal(records: Sequence[GeneratedByte], begun: bytes) -> str:
    """The marked-up text of a sample, shaded by the surprisal of the byte after each character."""
    parts, end = [], 0
    for character in characters(records, begun):
        end += len(character.records)
        bits = -records[end].logprob / math.log(2) if end < len(records) else 0.0
        parts.append(_mark_up_character(character, min(1.0, bits / FULL_BITS)))
    return "".join(parts)


def _mark_up_character(character: Character, shade: float | None = None) -> str:
    shown = _markup(character.text)
    if not character.valid:
        shown = "<i>" + "".join(f"\\x{byte:02x}" for byte in character.data) + "</i>"
    if not character.records:
        return f'<span class="prompt">{shown}</span>'
    marks = {"r": character.routed, "d": character.drafted, "n": character.text == "\n"}
    classes = " ".join(name for name, given in marks.items() if given)
    named = f' class="{classes}"' if classes else ""
    tip = escape("\n".join(_tips(character))).replace("\n", "&#10;")
    shade = character.weight if shade is None else shade
    return f'<b{named} style="--w:{shade:.2f}" data-tip="{tip}">{shown}</b>'


def _markup(text: str) -> str:
    """The text in HTML, with escapes for invisible characters and those that change direction."""
    return "".join(
        f"<i>{escape(''.join(map(escape_code, group)))}</i>" if hidden else escape("".join(group))
        for hidden, group in itertools.groupby(text, _is_hidden)
    )


def _is_hidden(c: str) -> bool:
    """Whether c is a control or format character, separator or unassigned; not \n and \t."""
    category = unicodedata.category(c)
    return (category[0] == "C" or category in ("Zl", "Zp")) and c not in "\n\t"


def _tips(character: Character) -> Iterator[str]:
    """The details of each generated byte of a character, one line each."""
    names = {" ": "space", "\n": "line feed", "\t": "tab"}
    name = names.get(character.text)
    if name is None:
        shown = escape_code(character.text) if _is_hidden(character.text) else character.text
        name = f"“{shown}” U+{ord(character.text):04X}" if character.valid else "not UTF-8"
    size, first = len(character.data), len(character.data) - len(character.records)
    for number, record in enumerate(character.records, first + 1):
        place = f" {number} of {size}" if size > 1 else ""
        routed = "routed" if record.router_decision else "not routed"
        drafted = " · accepted draft" if record.drafted else ""
        yield (
            f"{name} · byte{place} 0x{record.byte:02x} · router weight {record.router_weight:.2f}, "
            f"{routed} · probability {100 * math.exp(record.logprob):.3g} %{drafted}"
        )
