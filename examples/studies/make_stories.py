"""Build `stories`, 21 MB of English fairy tales and adventure novels, as train.txt and valid.txt.

python examples/studies/make_stories.py TALES/data NOVELS/corpus stories

TALES and NOVELS are clones of two repositories of https://github.com:
selinawaang/CS2470-Gender-Bias-in-Children-s-Fairy-Tales and
computationalstylistics/100_english_novels.

The texts are those of Project Gutenberg: 47 books of fairy tales, legends and myths, and 21 novels
printed from 1838 to 1921. They are in the public domain in the United States; elsewhere that
depends on the year in which an author or translator died. One book is one document. Five books are
held out: valid.txt gets up to 52,000 bytes of each, and train.txt none.

The script keeps prose, in ASCII: paragraphs that begin with a letter or a quotation mark and end
with punctuation, each on one line. It leaves out headings, tables of contents, verse, footnotes and
the first twentieth of the paragraphs of each book, often a preface.
"""

import argparse
import re
import unicodedata
from pathlib import Path

NOVELS = [
    "Burnett_Garden_1911", "Burnett_Lord_1886", "Burnett_Princess_1905",
    "Chesterton_Innocence_1911", "Chesterton_Napoleon_1904", "Chesterton_Thursday_1908",
    "Dickens_Expectations_1861", "Dickens_Oliver_1839", "Doyle_Hound_1902", "Doyle_Lost_1912",
    "Doyle_Micah_1889", "Forster_View_1908", "Gaskell_Ruth_1855", "Haggard_Mines_1885",
    "Haggard_She_1887", "Haggard_Sheallan_1921", "Kipling_Captains_1896", "Stevenson_Arrow_1888",
    "Stevenson_Catriona_1893", "Stevenson_Treasure_1883", "Ward_Milly_1881",
]  # fmt: skip
HELD_OUT = ("82", "89", "94", "Burnett_Princess_1905", "Doyle_Lost_1912")
HELD_OUT_BYTES = 52_000  # of each book, at most
NOT_ENGLISH = ("80", "92")
MARK = re.compile(r"\*\*\* ?(START|END) OF.*")
PLAIN = {
    '"': "\u201c\u201d\u00ab\u00bb",  # quotation marks
    "'": "\u2018\u2019\u00b4",
    "-": "\u2013",
    "--": "\u2014",
    "ae": "\u00e6",
    "Ae": "\u00c6",
    "oe": "\u0153",
    "": "_*",  # marks of italics
}
TRANSLATION = str.maketrans({c: plain for plain, fancy in PLAIN.items() for c in fancy})


def prose(text: str) -> list[str]:
    """The paragraphs of a book that are prose, in ASCII, without line breaks."""
    text = text.replace("\r\n", "\n")
    marks = [match.span() for match in MARK.finditer(text)]
    if len(marks) >= 2:  # between Project Gutenberg's header and its license
        text = text[marks[0][1] : marks[1][0]]
    text = re.sub(r"\[[^\]]*\]", "", text.translate(TRANSLATION))
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.strip("\n").split("\n")
        verse = len(lines) > 1 and all(line.startswith("  ") for line in lines)
        joined = " ".join(paragraph.split())
        whole = re.match(r"[A-Za-z\"']", joined) and re.search(r"[.!?,:;-][\"')]*$", joined)
        if whole and not verse and not joined.isupper() and "Gutenberg" not in joined:
            kept.append(joined)
    return kept[len(kept) // 20 :]  # without prefaces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tales", type=Path, help="the folder data of the first repository")
    parser.add_argument("novels", type=Path, help="the folder corpus of the second one")
    parser.add_argument("output", type=Path, help="folder to write train.txt and valid.txt to")
    args = parser.parse_args()
    books = sorted(path for path in args.tales.glob("*.txt") if path.stem not in NOT_ENGLISH)
    books += [args.novels / f"{name}.txt" for name in NOVELS]
    documents: dict[str, list[str]] = {"train": [], "valid": []}
    for path in books:
        paragraphs = prose(path.read_text("utf-8-sig", errors="replace"))
        if path.stem in HELD_OUT:
            text = ""
            while paragraphs and len(text) + len(paragraphs[0]) < HELD_OUT_BYTES:
                text += paragraphs.pop(0) + "\n"
            documents["valid"].append(text)
        else:
            documents["train"].append("".join(f"{paragraph}\n" for paragraph in paragraphs))
    args.output.mkdir(parents=True, exist_ok=True)
    for split, texts in documents.items():
        path = args.output / f"{split}.txt"
        path.write_text("<|endoftext|>".join(texts))
        print(f"{path}: {len(texts)} books, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
