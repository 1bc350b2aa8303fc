"""data/: every format against the plain bytes, splits, the hub, the cache under attack, windows."""

import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pico_tg.data import (
    SEQ_END,
    SEQ_START,
    Corpus,
    DataSpec,
    Windows,
    formats,
    has_validation,
    hub,
    load_data,
    load_whole,
    sources,
)
from pico_tg.data import cache as data_cache
from pico_tg.files import PicoError

SCRIPTS = Path(__file__).parent / "scripts"
TEXTS = ["first\n", "zweites: äöü 🙂", "NA", "4", 'last, "quoted"\nand long ' + "x" * 300]


def load(dataset, **options):
    return load_data(DataSpec(str(dataset), **options), progress=False)


def wrapped(texts):
    texts = [text.encode() if isinstance(text, str) else text for text in texts]
    return b"".join(SEQ_START + text + SEQ_END for text in texts)


def split_up(corpus):
    """The documents of a corpus, by its offsets, without their wrappers."""
    documents = []
    for start, stop in zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True):
        document = corpus.bytes[start:stop].tobytes()
        assert document.startswith(SEQ_START)
        assert document.endswith(SEQ_END)
        documents.append(document[len(SEQ_START) : -len(SEQ_END)])
    assert corpus.offsets[0] == 0
    assert corpus.offsets[-1] == len(corpus.bytes)
    return documents


def all_documents(loaded):
    return split_up(loaded.train) + split_up(loaded.validation)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_rows(texts, column="text"):
    return [{"id": i, column: text} for i, text in enumerate(texts)]


def corpus_of(content: bytes) -> Corpus:
    return Corpus(np.frombuffer(content, np.uint8), np.array([0, len(content)]), "test")


# Formats ------------------------------------------------------------------------------------------


def test_python_docs():
    from pydoc_data.topics import topics

    loaded = load("python-docs")
    assert all_documents(loaded) == [topics[name].encode() for name in sorted(topics)]
    assert "python-docs" in loaded.note
    assert "\n" not in loaded.note
    share = len(loaded.validation.bytes) / (len(loaded.train.bytes) + len(loaded.validation.bytes))
    assert 0.02 < share < 0.1


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet", "parquet_bytes"])
def test_format(kind, tmp_path):
    rows = as_rows(TEXTS)
    path = tmp_path / f"odd [name]*.{kind.removesuffix('_bytes')}"
    if kind == "txt":
        path.write_text("\n\n<|endoftext|>\n".join(TEXTS) + "<|endoftext|>\n", newline="")
    elif kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
        path.write_text("id,text\n" + "".join(f"{i},{q}\n" for i, q in enumerate(quoted)))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        rows = as_rows([text.encode() + b"\xff\x00" for text in TEXTS], "bytes")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    expected = [text.encode() for text in TEXTS]
    if kind == "txt":
        expected[0] = b"first"
    if kind == "parquet_bytes":
        expected = [text + b"\xff\x00" for text in expected]
    loaded = load(path)
    assert all_documents(loaded) == expected
    assert loaded.train.bytes.tobytes() == wrapped(expected[:-1])
    assert loaded.validation.bytes.tobytes() == wrapped(expected[-1:])
    assert loaded.train.bytes.dtype == np.uint8
    assert loaded.train.offsets.dtype == np.int64
    assert not loaded.train.bytes.flags.writeable


def test_csv_column_of_numbers_with_gaps(tmp_path):
    path = tmp_path / "numbers.csv"
    path.write_text("text,n\n007,1\n,\nnull,3\n")
    assert all_documents(load(path)) == [b"007", b"null"]


def test_empty_rows_are_skipped_and_column_is_chosen(tmp_path):
    rows = [{"text": "no", "other": other} for other in ("a", None, "", "b")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert all_documents(load(path, column_name="other")) == [b"a", b"b"]
    assert all_documents(load(path)) == [b"no"] * 4


def test_txt_without_marker_is_one_document_to_the_byte(tmp_path):
    content = b"\n\r\n not \xff utf-8 <|endoftex \n\n"
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_bytes(b"validation")
    loaded = load(tmp_path / "a.txt", validation_file=str(tmp_path / "b.txt"))
    assert split_up(loaded.train) == [content]
    assert split_up(loaded.validation) == [b"validation"]


def split_plainly(text: bytes) -> list[bytes]:
    if b"<|endoftext|>" not in text:
        return [text] if text else []
    return [piece for part in text.split(b"<|endoftext|>") if (piece := part.strip(b"\r\n"))]


def ignore(remark):
    """Stands in for the list of remarks."""


def split_streaming(text: bytes, chunk: int) -> list[bytes]:
    documents, open_document = [], b""
    with mock.patch.object(formats, "CHUNK", chunk):
        for piece, ends in formats.read_text(io.BytesIO(text), "a.txt", None, ignore):
            open_document += piece
            if ends:
                documents.append(open_document)
                open_document = b""
    assert open_document == b""
    return documents


@given(
    st.lists(st.sampled_from([b"\n", b"\r", b"a", b"<|", b"<|endof", b"text|>", b"<|endoftext|>"])),
    st.integers(4, 20),
)
def test_streaming_reader_equals_plain_split(parts, chunk):
    text = re.sub(rb"[\r\n]{4,}", b"\n\n\n", b"".join(parts))
    assert split_streaming(text, chunk) == split_plainly(text)


def test_marker_across_every_chunk_boundary():
    text = b"\n one \n<|endoftext|>\n\n<|endoftext|>two\r\n"
    for chunk in range(4, len(text) + 1):
        assert split_streaming(text, chunk) == [b" one ", b"two"]


def test_a_flood_of_newlines_is_not_held_in_memory():
    text = b"a" + b"\n" * 1000 + b"b" + b"\n" * 1000
    with mock.patch.object(formats, "CHUNK", 16):
        read = formats.read_text(io.BytesIO(text), "a.txt", None, ignore)
        pieces = [piece for piece, _ in read]
    assert b"".join(pieces) == text
    assert max(map(len, pieces)) <= 64


# Folders, splits, files ---------------------------------------------------------------------------


def test_folder_of_txt(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    (folder / "b.txt").write_text("b1<|endoftext|>b2")
    (folder / "a.txt").write_text("a\n")
    (folder / "deeper" / "c.txt").write_text("c")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "metadata.json").write_text("{}")
    assert all_documents(load(folder)) == [b"a\n", b"b1", b"b2", b"c"]
    loaded = load(folder, train_file="b.txt", validation_file="deeper/c.txt")
    assert split_up(loaded.train) == [b"b1", b"b2"]
    assert split_up(loaded.validation) == [b"c"]


def test_saved_datasets(tmp_path):
    one = datasets.Dataset.from_list(as_rows(["a", None, "b"]))
    two = datasets.Dataset.from_list(as_rows(["c"]))
    one.save_to_disk(tmp_path / "single")
    datasets.DatasetDict(train=one, validation=two, test=two).save_to_disk(tmp_path / "dict")
    assert all_documents(load(tmp_path / "single")) == [b"a", b"b"]
    loaded = load(tmp_path / "dict")
    assert split_up(loaded.train) == [b"a", b"b"]
    assert split_up(loaded.validation) == [b"c"]
    assert "split validation" in loaded.note


@pytest.fixture
def folder(tmp_path):
    """A folder with data files for three splits."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        write_jsonl(folder / f"{split}.jsonl", as_rows([f"{split} {i}" for i in range(4)]))
    return folder


def documents(split, *numbers):
    return [f"{split} {i}".encode() for i in numbers]


def test_folder_with_splits(folder):
    loaded = load(folder)
    assert split_up(loaded.train) == documents("train", 0, 1, 2, 3)
    assert split_up(loaded.validation) == documents("validation", 0, 1, 2, 3)

    loaded = load(folder, train_split="test", validation_split="train", validation_size=0.5)
    assert split_up(loaded.train) == documents("test", 0, 1, 2, 3)
    assert split_up(loaded.validation) == documents("train", 0, 1, 2, 3)
    assert "validation_size is not used" in loaded.note

    # the only split named validation is the one to train on, so a part of it is held out
    loaded = load(folder, train_split="validation", validation_size=1)
    assert split_up(loaded.train) == documents("validation", 0, 1, 2)
    assert split_up(loaded.validation) == documents("validation", 3)


def test_folder_with_files(folder):
    loaded = load(folder, train_file="train.jsonl", validation_file="test.jsonl")
    assert split_up(loaded.train) == documents("train", 0, 1, 2, 3)
    assert split_up(loaded.validation) == documents("test", 0, 1, 2, 3)

    loaded = load(folder, train_file="train.jsonl", validation_split="test")
    assert split_up(loaded.validation) == documents("test", 0, 1, 2, 3)

    loaded = load(folder, train_file="train.jsonl", validation_size=2)
    assert split_up(loaded.train) == documents("train", 0, 1)
    assert split_up(loaded.validation) == documents("train", 2, 3)


def test_only_split(folder):
    (folder / "train.jsonl").unlink()
    (folder / "validation.jsonl").unlink()
    assert all_documents(load(folder)) == documents("test", 0, 1, 2, 3)
    with pytest.raises(PicoError, match="no split 'train'; there is: test"):
        load(folder, train_split="train")


def write_parquet(path, rows, **options):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_readers_equal_those_of_datasets(kind, tmp_path):
    texts = [None, "", "ä\n", "x" * 100_000, *map(str, range(100)), "last"]
    rows = [{"n": n, "text": text} for n, text in enumerate(texts)]
    path = tmp_path / f"a.{kind}"
    (write_jsonl if kind == "jsonl" else write_parquet)(path, rows)
    builder = "json" if kind == "jsonl" else kind
    expected = datasets.load_dataset(builder, data_files=str(path), cache_dir=tmp_path / "datasets")
    expected = [row["text"].encode() for row in expected["train"] if row["text"]]
    assert all_documents(load(path)) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[{"text": "a"}, {"text": "b"}]', [b"a", b"b"]),
        (b'{"text":\n"a"}\n{"text":\n"b"}\n', [b"a", b"b"]),
        (b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n', [b"a", b"b"]),
        (b'{"n": 1}\r\n\r\n{"text": "a"}\r\n{"more": 2, "text": "b"}', [b"a", b"b"]),
        (b'{"text": "2020-01-01"}\n{"text": "\\ud83d\\ude42"}\n', [b"2020-01-01", "🙂".encode()]),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_forms_of_json(content, expected, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    assert all_documents(load(path)) == expected


@pytest.mark.parametrize("group", [1, 7, 1000])
def test_row_groups(group, tmp_path):
    texts = [f"document {i}" for i in range(30)]
    rows = [{"a.b": "no", "text": text, "text.more": 1} for text in texts]
    path = write_parquet(tmp_path / "a.parquet", rows, row_group_size=group)
    assert all_documents(load(path)) == [text.encode() for text in texts]
    assert all_documents(load(path, column_name="a.b")) == [b"no"] * 30


def test_csv_is_read_the_same_everywhere(tmp_path):
    content = (
        b'\xef\xbb\xbftext,n\r\nNA,1\r\n007,2\r\n" two\r\nlines ",3\r\nnull,4\r\n'
        b'"before\0after",5\r\n,6\r\n\r\n2020-01-01,7,\r\n# no comment,8,\r\n'
    )
    texts = ["NA", "007", " two\r\nlines ", "null", "before\0after", "2020-01-01", "# no comment"]
    expected = [text.encode() for text in texts]
    places = ["a.csv", "B.CSV", "folder/a.csv", "beside/a.csv", "mixed/a.CSV", "gz/a.csv.gz"]
    for place in places:
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(content) if place.endswith(".gz") else content)
    (tmp_path / "beside" / "info.json").write_text('{"rows": 8, "more": [1, 2]}')
    (tmp_path / "mixed" / "README.md").write_text("# no data")
    for place in places:
        assert all_documents(load(tmp_path / place)) == expected
    for folder in ("folder", "beside", "mixed", "gz"):
        assert all_documents(load(tmp_path / folder)) == expected
    assert "left out: info.json in" in load(tmp_path / "beside").note


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text;n\nfirst, still;1\nsecond;2\n", [b"first, still", b"second"]),
        ("text\tn\nfirst\t1\nsecond\t2\n", [b"first", b"second"]),
        ("n, text\n1, a\n2,b\n3\n", [b" a", b"b"]),
        ("text,n\nfirst,1\nsecond,2,extra\n", "line 3 has 3 fields, but the header has 2"),
        ('text\n"not closed\nsecond\n', "line 3: unexpected end of data; is a quote not closed"),
        ('text\n"a"b\n', "line 2: .* is a quote not closed"),
        ("text,text\n1,2\n", "2 columns named 'text'; rename one"),
        ("first text\nsecond text\n", "neither a column 'text' nor 'bytes'; .* first text"),
        ("text\n", "holds no text"),
    ],
)
def test_forms_of_csv(content, expected, tmp_path, cache):
    path = tmp_path / "a.csv"
    path.write_text(content)
    if isinstance(expected, str):
        check_error(cache, expected, path)
    else:
        assert all_documents(load(path)) == expected


def test_json_list_of_dates_stays_text(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(as_rows(["2020-01-01", "2021-02-03"]), indent=1))
    assert all_documents(load(path)) == [b"2020-01-01", b"2021-02-03"]


@settings(max_examples=40)
@given(st.lists(st.text(max_size=9), min_size=1), st.integers(1, 40), st.sampled_from([None, 1]))
def test_json_list_across_every_chunk_boundary(texts, chunk, indent):
    content = json.dumps([{"n": {}, "text": text} for text in texts], indent=indent)
    with mock.patch.object(formats, "CHUNK", chunk):
        read = formats.read_json(io.BytesIO(content.encode()), "a.json", None, ignore)
        assert [piece for piece, _ in read] == [text.encode() for text in texts if text]


@pytest.mark.parametrize(
    "content",
    ['[{"text": "a"}', '[{"text": "a"} {"text": "b"}]', '[{"text": "a"}] x', '[{"text": "'],
)
def test_broken_json_list(content, tmp_path, cache):
    (tmp_path / "a.json").write_text(content)
    check_error(cache, "cannot read .*a.json: JSON parse error", tmp_path / "a.json")


def test_deeply_nested_json(tmp_path, cache):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    check_error(cache, "deep.jsonl: JSON parse error: a row is nested too deeply", path)


# What is read, and what is not --------------------------------------------------------------------

STORY = "One.\n\n  Two;\n\tthree.\n"


def write_story(place):
    """A .txt at `place`, which may lie in an archive or be compressed."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.suffix == ".zip":
        with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("deep/a.txt", STORY)
            archive.writestr("__MACOSX/deep/._a.txt", "no data")
    elif place.suffix in (".gz", ".bz2", ".xz"):
        with formats.COMPRESSIONS[place.suffix](place, "wb") as file:
            file.write(STORY.encode())
    else:
        place.write_text(STORY)
    return place


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("a.txt", "README.md"),
        ("A.TXT", "LICENSE"),
        ("a.txt.gz", "picture.png"),
        ("a.txt.bz2", None),
        ("a.txt.xz", "b.py"),
        ("a.zip", "README.md"),
        ("deep/er/a.txt", "x/README.md"),
    ],
)
def test_txt_is_one_document_wherever_it_lies(name, beside, tmp_path):
    place = write_story(tmp_path / "data" / name)
    assert split_up(load_whole(DataSpec(place), progress=False)) == [STORY.encode()]
    if beside:
        (tmp_path / "data" / beside).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / beside).write_text("---\nno data\n---\n")
    loaded = load(tmp_path / "data", validation_size=0.5)
    assert split_up(load_whole(loaded.spec, progress=False)) == [STORY.encode()]
    assert ("not used" in loaded.note) == bool(beside)
    assert beside is None or f"{beside} (no format that is read)" in loaded.note


def test_everything_is_read_or_named(tmp_path):
    """Whatever the mixture: each name is in the note, and each document read or named."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("from a.txt")
    write_jsonl(folder / "b.jsonl", as_rows(["from b.jsonl"]))
    write_parquet(folder / "c.parquet", as_rows(["from c.parquet"]))
    write_story(folder / "d.zip")
    (folder / "e.csv.gz").write_bytes(gzip.compress(b"text\nfrom e.csv.gz\n"))
    (folder / "empty.txt").touch()
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "x.tar").touch()
    (folder / "link").symlink_to(tmp_path)
    found = load(folder, validation_size=1)
    assert all_documents(found) == [
        b"from a.txt",
        b"from b.jsonl",
        b"from c.parquet",
        STORY.encode(),
        b"from e.csv.gz",
    ]
    for name in ("a.txt", "b.jsonl", "c.parquet", "config.json", "d.zip/deep/a.txt"):
        assert name in found.note
    for words in (
        "empty.txt (empty)",
        "x.tar (no format that is read)",
        "link (a link",
        "left out:",
    ):
        assert words in found.note
    assert " from 6 files (" in found.note
    assert found.note == load(folder, validation_size=1).note  # from the cache, too


def test_nothing_to_read(tmp_path, cache):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("# no data")
    check_error(cache, "holds no data that can be read; the formats are", tmp_path / "folder")
    (tmp_path / "folder" / "a.json").write_text("{}")
    check_error(cache, "neither a column 'text'", tmp_path / "folder")
    (tmp_path / "bad.zip").write_text("PK nonsense")
    check_error(cache, "cannot read .*bad.zip: File is not a zip file", tmp_path / "bad.zip")


def test_pointer_of_git_lfs_is_no_text(tmp_path, cache):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "train.txt").write_text(pointer)
    check_error(
        cache, "train.txt is a pointer of Git LFS; run: git lfs pull", tmp_path / "train.txt"
    )


def test_utf16_is_said(tmp_path, cache):
    path = tmp_path / "a.txt"
    path.write_text(STORY, encoding="utf-16")
    loaded = load(path)
    assert all_documents(loaded) != [STORY.encode()]
    assert "a.txt is UTF-16 and is read byte by byte; convert the file to UTF-8" in loaded.note
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}', encoding="utf-16")
    with pytest.raises(PicoError, match="byte 0xff is not valid UTF-8; convert the file"):
        load(path)


@pytest.mark.parametrize("name", ["st*r", "[data] v1", "a::b", "what?", "ümlaut ordner", "{a,b}"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_paths_are_no_patterns(name, kind, tmp_path):
    for place, text in ((name, "mine"), ("starr", "no"), ("d v1", "no"), ("what1", "no")):
        (tmp_path / place).mkdir()
        content = {"txt": text, "csv": f"text\n{text}\n", "jsonl": json.dumps({"text": text})}
        (tmp_path / place / f"a [b]*.{kind}").write_text(content[kind])
    assert split_up(load_whole(DataSpec(tmp_path / name), progress=False)) == [b"mine"]
    file = tmp_path / name / f"a [b]*.{kind}"
    assert split_up(load_whole(DataSpec(file), progress=False)) == [b"mine"]


# Validation data are never trained on -------------------------------------------------------------


def contents(kind, texts):
    if kind == "txt":
        return "<|endoftext|>".join(texts).encode()
    if kind == "csv":
        return ("text\n" + "".join(f'"{text}"\n' for text in texts)).encode()
    if kind == "parquet":
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer)
        return buffer.getvalue()
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


LAYOUTS = {  # of the validation file, beside it others
    "valid.{}": ["train.{}"],
    "val.{}": ["train.{}", "README.md"],
    "DEV.{}": ["a.{}", "b.{}"],
    "validation-00000-of-00001.{}": ["train-00000-of-00002.{}", "train-00001-of-00002.{}"],
    "TinyStoriesV2-GPT4-valid.{}": ["TinyStoriesV2-GPT4-train.{}"],
    "data/wiki.valid.raw.{}": ["data/wiki.train.raw.{}"],
    "validation/a.{}": ["train/a.{}", "train/b.{}"],
    "dev/part 1.{}": ["training/part 1.{}", "test/part 1.{}"],
    "dev-blog.{}": ["books.{}", "train-travel.{}", "eval_x.{}"],
}


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("held_out", LAYOUTS)
def test_splits_by_name(kind, held_out, tmp_path):
    """Each document is in the split that its file's name says, and in no other."""
    expected = {"train": [], "validation": []}
    for name in (held_out, *LAYOUTS[held_out]):
        path = tmp_path / "set" / name.format(kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [f"{name} {i}" for i in range(3)]
        path.write_bytes(contents(kind, texts))
        split = sources.split_of(name.format(kind))
        if split in expected and name != "README.md":
            expected[split] += [text.encode() for text in texts]
    loaded = load(tmp_path / "set")
    assert has_validation(loaded.spec)
    assert sorted(split_up(loaded.train)) == sorted(expected["train"])
    assert split_up(loaded.validation) == expected["validation"]
    assert len(expected["validation"]) == 3
    assert f"split validation: {len(loaded.validation.bytes):,} bytes" in loaded.note
    for name in (held_out, *LAYOUTS[held_out]):
        assert name.format(kind) in loaded.note


def test_words_of_splits():
    for name, split in {
        "books.txt": "train",
        "train-travel.jsonl": "train",
        "latest.txt": "train",
        "validity/devices.txt": "train",
        "test/train.txt": "train",
        "train/test.txt": "test",
        "train_dev.txt": "validation",
        "Val2/x.txt": "validation",
        "evaluation.01.csv": "test",
        "my testing set.txt": "test",
    }.items():
        assert sources.split_of(name) == split, name


@pytest.fixture
def named(tmp_path):
    """A folder without splits, of three .txt and three .jsonl."""
    folder = tmp_path / "named"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_bytes(contents("txt", [f"{name} {i}" for i in range(3)]))
        rows = contents("jsonl", [f"{name} rows {i}" for i in range(3)])
        (folder / f"{name}.jsonl").write_bytes(rows)
    return folder


def assert_disjoint(loaded, validation, count=15):
    train = split_up(loaded.train)
    assert split_up(loaded.validation) == validation
    assert not set(train) & set(validation)
    assert len(train) == count


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_validation_file_within_the_folder_is_not_trained_on(kind, named, tmp_path, monkeypatch):
    expected = [f"c {'' if kind == 'txt' else 'rows '}{i}".encode() for i in range(3)]
    inside = named / f"c.{kind}"
    (tmp_path / "link").symlink_to(named)
    (tmp_path / f"copy.{kind}").hardlink_to(inside)
    monkeypatch.chdir(tmp_path)
    for file in (
        inside.name,  # in the data set's folder
        inside,
        f"named/../named/c.{kind}",
        f"link/c.{kind}",
        f"copy.{kind}",
    ):
        for dataset in (named, "link", "./named/"):
            loaded = load(dataset, validation_file=file)
            assert_disjoint(loaded, expected)
            assert "not used" not in loaded.note


def test_files_and_splits_named_at_once(named):
    (named / "valid.txt").write_text("v 0<|endoftext|>v 1")
    held_out = [b"v 0", b"v 1"]
    assert_disjoint(load(named), held_out, 18)
    assert_disjoint(load(named, validation_split="validation"), held_out, 18)
    assert_disjoint(load(named, validation_split="dev"), held_out, 18)
    assert_disjoint(load(named, validation_file="valid.txt"), held_out, 18)
    assert_disjoint(load(named, train_file="a.txt", validation_file="valid.txt"), held_out, 3)
    assert_disjoint(load(named, train_file="a.txt", validation_split="validation"), held_out, 3)
    loaded = load(named, validation_file="c.txt")
    assert_disjoint(loaded, [b"c 0", b"c 1", b"c 2"], 15)
    assert "not used: valid.txt (split validation)" in loaded.note


def test_same_data_for_both(named, cache):
    for options in (
        {"train_file": "a.txt", "validation_file": "a.txt"},
        {"train_file": "a.txt", "validation_split": "train"},
        {"validation_split": "train"},
    ):
        check_error(cache, "is to be both the training and the validation data", named, **options)
    check_error(cache, "is to be both", named / "a.txt", validation_file=named / "a.txt")


def test_split_names_in_a_zip(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("set/train.txt", "t 0<|endoftext|>t 1")
        archive.writestr("set/valid.txt", "v 0")
        archive.writestr("set/README.md", "no data")
    assert_disjoint(load(path), [b"v 0"], 2)
    assert "set.zip/set/README.md (no format that is read)" in load(path).note
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / "set.zip")
    assert_disjoint(load(tmp_path / "folder"), [b"v 0"], 2)


# Configurations of a clone ------------------------------------------------------------------------

CARD = """---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: en/*.jsonl
  - split: validation
    path: ["en/*-held.jsonl"]
- config_name: de
  data_dir: de
---
# Two languages
"""


@pytest.fixture
def clone(tmp_path):
    for language in ("en", "de"):
        for name in ("a", "b-held"):
            path = tmp_path / "clone" / language / f"{name}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(path, as_rows([f"{language} {name}"]))
    (tmp_path / "clone" / "README.md").write_text(CARD)
    return tmp_path / "clone"


def test_configurations_of_a_clone(clone, cache):
    check_error(cache, "has the configurations en, de; name one, as in .*clone:en", clone)
    check_error(cache, "no configuration 'fr'; there is: en, de", f"{clone}:fr")
    loaded = load(f"{clone}:en")  # the patterns overlap
    assert split_up(loaded.train) == [b"en a"]
    assert split_up(loaded.validation) == [b"en b-held"]
    assert "not used: de/a.jsonl, de/b-held.jsonl (not in the configuration)" in loaded.note
    assert all_documents(load(f"{clone}:de")) == [b"de a", b"de b-held"]
    (clone / "README.md").write_text(CARD.replace("name: de", "name: de\n  default: true"))
    assert all_documents(load(clone)) == [b"de a", b"de b-held"]
    (clone / "README.md").write_text("# Two languages")
    assert all_documents(load(f"{clone}:de")) == [b"de a", b"de b-held"]  # a folder in it
    with pytest.raises(PicoError, match="no configuration 'fr'; there is: none"):
        load(f"{clone}:fr")
    (clone / "README.md").write_text("---\nconfigs:\n- no\n---\n")
    with pytest.raises(PicoError, match=r"cannot read the configurations in .*README\.md"):
        load(clone)


# Holding out --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "held_out"), [(None, 1), (1, 1), (7, 7), (19, 19), (0.5, 10), (0.001, 1), (0.999, 19)]
)
def test_hold_out_documents(tmp_path, size, held_out):
    texts = [f"document {i:02}" for i in range(20)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    loaded = load(tmp_path / "a.txt", validation_size=size)
    assert loaded.train.documents == 20 - held_out
    assert all_documents(loaded) == [text.encode() for text in texts]
    assert f"{held_out} document" in loaded.note


@pytest.mark.parametrize("size", [None, 0.5, 0.999, 1e-9])
@pytest.mark.parametrize("length", [2, 3, 1000, 50_000])
def test_hold_out_of_one_document(tmp_path, size, length):
    content = np.random.default_rng(0).integers(0, 256, length, np.uint8).tobytes()
    (tmp_path / "a.txt").write_bytes(content)
    held_out = max(1, round(length * (size or 0.05)))
    if held_out == length:
        with pytest.raises(PicoError, match="too small"):
            load(tmp_path / "a.txt", validation_size=size)
        return
    loaded = load(tmp_path / "a.txt", validation_size=size)
    assert split_up(loaded.train) == [content[:-held_out]]
    assert split_up(loaded.validation) == [content[-held_out:]]
    assert "one document" in loaded.note
    assert not loaded.train.bytes.flags.writeable
    assert not loaded.validation.bytes.flags.writeable
    # the tags at the cut were not written to the file
    (tmp_path / "b.txt").write_bytes(b"b")
    whole = load(tmp_path / "a.txt", validation_file=str(tmp_path / "b.txt"))
    assert split_up(whole.train) == [content]


def test_fingerprint_is_of_the_content(tmp_path):
    for name, text in [
        ("a", "a<|endoftext|>b"),
        ("b", "a<|endoftext|>b"),
        ("c", "a<|endoftext|>c"),
    ]:
        (tmp_path / f"{name}.txt").write_text(text)
    a, b, c = (load(tmp_path / f"{name}.txt") for name in "abc")
    assert a.train.fingerprint == b.train.fingerprint
    assert a.validation.fingerprint == b.validation.fingerprint
    assert a.validation.fingerprint != c.validation.fingerprint
    assert a.train.fingerprint != a.validation.fingerprint


# The hub ------------------------------------------------------------------------------------------


LOAD_DATASET = datasets.load_dataset


class Hub:
    """Plays the hub: a local folder for each revision, and whether the network is there."""

    def __init__(self, monkeypatch, revisions):
        self.revisions, self.online, self.asked = revisions, True, []
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", self.info)
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def info(self, name, revision=None, timeout=None):
        if not self.online:
            raise ConnectionError("no route\nto host")
        return SimpleNamespace(sha=[*self.revisions][-1] if revision is None else revision)

    def load(self, name, config, *, revision, streaming, cache_dir):
        if not self.online:
            raise ConnectionError("no route\nto host")
        self.asked.append((name, config, revision))
        return LOAD_DATASET(str(self.revisions[revision]), streaming=True, cache_dir=cache_dir)


def test_hub_dataset(folder, monkeypatch):
    hub = Hub(monkeypatch, {"0123abc": folder})
    loaded = load("owner/name:config")
    assert split_up(loaded.train) == documents("train", 0, 1, 2, 3)
    assert split_up(loaded.validation) == documents("validation", 0, 1, 2, 3)
    assert hub.asked == [("owner/name", "config", "0123abc")]
    assert loaded.spec == DataSpec("owner/name:config", revision="0123abc")
    assert "not used: test.jsonl (split test)" in loaded.note
    load("owner/name:config")
    assert len(hub.asked) == 1  # the revision is known


def test_hub_dataset_of_txt_and_csv(tmp_path, monkeypatch):
    """The builders of `datasets` would make a document of each line, and drop the text NA."""
    for kind, text, expected in [
        ("txt", "one\ntwo\n<|endoftext|>\nthree\n", [b"one\ntwo", b"three"]),
        ("csv", "text,n\nNA,1\n007,2\n", [b"NA", b"007"]),
    ]:
        place = tmp_path / kind
        place.mkdir()
        (place / f"train.{kind}").write_text(text)
        more = "<|endoftext|>4" if kind == "txt" else "8,9\n"
        (place / f"valid.{kind}").write_text(text + more)
        Hub(monkeypatch, {"0123abc": place})
        loaded = load(f"owner/{kind}")
        assert split_up(loaded.train) == expected
        assert len(split_up(loaded.validation)) == 3
        assert f"from valid.{kind}" in loaded.note


def test_hub_data_whose_files_are_unknown(tmp_path, monkeypatch):
    """Rows are taken from `datasets`, unless its text builder would make them of lines."""
    monkeypatch.setattr(hub, "_paths", lambda rows: [])
    for kind, error in (("jsonl", None), ("txt", "cannot find the .txt files of owner/txt")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"a.{kind}").write_bytes(contents(kind, ["a", "b"]))
        Hub(monkeypatch, {"0123abc": tmp_path / kind})
        if error is None:
            assert all_documents(load(f"owner/{kind}")) == [b"a", b"b"]
        else:
            with pytest.raises(PicoError, match=error):
                load(f"owner/{kind}")


def test_hub_files_are_split_on_the_marker(monkeypatch):
    files = {
        "datasets/owner/name@0123abc/deep/a.txt": b"one\ntwo\n<|endoftext|>\nthree\n",
        "datasets/owner/name@0123abc/b.txt.gz": gzip.compress(b"held out"),
    }

    class FileSystem:
        def open(self, path, mode):
            assert mode == "rb"
            return io.BytesIO(files[path])

        def size(self, path):
            return len(files[path])

    info = SimpleNamespace(sha="0123abc")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
    loaded = load("owner/name", train_file="deep/a.txt", validation_file="b.txt.gz")
    assert split_up(loaded.train) == [b"one\ntwo", b"three"]
    assert split_up(loaded.validation) == [b"held out"]
    files["datasets/owner/name@0123abc/a.pdf"] = b""
    with pytest.raises(PicoError, match=r"cannot tell what a\.pdf is by its name"):
        load("owner/name", train_file="a.pdf")
    with pytest.raises(PicoError, match=r"cannot open 'owner/name/gone\.txt' on the"):
        load("owner/name", train_file="gone.txt")


def test_hub_without_network(folder, tmp_path, monkeypatch):
    """A run's revision is read from the cache although the hub has moved on, or is not there."""
    moved = tmp_path / "moved"
    moved.mkdir()
    write_jsonl(moved / "train.jsonl", as_rows(["moved 0", "moved 1"]))
    hub = Hub(monkeypatch, {"old": folder})
    first = load("owner/name")
    hub.online = False
    again = load("owner/name")
    assert again.train.fingerprint == first.train.fingerprint
    assert again.spec == first.spec == DataSpec("owner/name", revision="old")
    assert "no answer from the hub: no route to host" in again.note
    assert "revision old is in the cache" in again.note
    resumed = load_data(first.spec, progress=False)
    assert (resumed.note, resumed.spec) == (first.note, first.spec)
    assert has_validation(DataSpec("owner/name"))
    with pytest.raises(PicoError, match="'owner/name' at revision new on the Hugging Face hub"):
        load("owner/name", revision="new")
    with pytest.raises(PicoError, match=r"'owner/other' .*\(no route to host\).*python-docs"):
        load("owner/other")

    (tmp_path / "mine.txt").write_text("mine")
    mixed = load("owner/name", validation_file=tmp_path / "mine.txt")
    assert (split_up(mixed.validation), mixed.spec.revision) == ([b"mine"], "old")

    hub.online, hub.revisions = True, {"old": folder, "new": moved}
    assert all_documents(load("owner/name")) == [b"moved 0", b"moved 1"]
    assert load_data(first.spec, progress=False).train.fingerprint == first.train.fingerprint
    hub.online = False
    assert load("owner/name").spec.revision == "new"
    assert load_data(first.spec, progress=False).train.fingerprint == first.train.fingerprint


def test_hub_out_of_reach(monkeypatch, cache):
    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(PicoError, match=r"'owner/name' .*\(no route to host\).*python-docs"):
        load("owner/name")
    assert not cache.exists()


# Errors -------------------------------------------------------------------------------------------


def check_error(cache, match, dataset, **options):
    """One line, and nothing is left behind."""
    with pytest.raises(PicoError, match=match) as caught:
        load(dataset, **options)
    assert "\n" not in str(caught.value)
    assert not cache.exists() or list(cache.iterdir()) == []


def test_missing_things(tmp_path, cache, folder):
    check_error(cache, "no file or folder .*gone.txt", tmp_path / "gone.txt")
    check_error(cache, "no file or folder ./gone", "./gone")
    check_error(cache, "no file or folder gone.parquet", "gone.parquet")
    check_error(cache, "no file 'gone.jsonl'", folder, train_file="gone.jsonl")
    check_error(cache, "no file 'gone.jsonl'", "python-docs", validation_file="gone.jsonl")
    splits = "there is: train, validation, test"
    check_error(cache, f"no split 'gone'; {splits}", folder, train_split="gone")
    check_error(cache, f"no split 'gone'; {splits}", folder, validation_split="gone")
    check_error(cache, "no split 'gone'; there is: train", "python-docs", train_split="gone")
    check_error(cache, "no column 'gone'; .* id, text", folder, column_name="gone")
    check_error(cache, "must hold text or bytes, but holds int", folder, column_name="id")
    path = write_jsonl(tmp_path / "a.jsonl", [{"story": "a", "n": 1}])
    check_error(cache, "neither a column 'text' nor 'bytes'; .* story, n", path)


def test_unreadable_files(tmp_path, cache):
    for name, content, match in [
        ("bad.jsonl", b'{"text": "a"}\n{"text": oops\n', "cannot read .*bad.jsonl: JSON parse"),
        ("bad.json", b"[1, 2", "cannot read .*bad.json"),
        (
            "utf8.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}\n',
            "utf8.jsonl: JSON parse .* line 2: .*",
        ),
        ("list.jsonl", b'{"text": "a"}\n\n["b"]\n', "JSON parse error in line 3: it is no object"),
        ("mixed.jsonl", b'{"text": "a"}\n{"text": 4}\n', "must hold text or bytes, but holds int"),
        ("half.jsonl", b'{"text": "\\ud83d"}\n', "cannot read .*half.jsonl: .*surrogates"),
        ("bad.parquet", b"PAR1 nonsense", "cannot read .*bad.parquet: Parquet magic"),
        ("bad.csv", b"text\n\xff\xfe\n", "cannot read .*bad.csv"),
        ("bad.pdf", b"%PDF", "the formats are .txt, .jsonl"),
        ("empty.txt", b"", "empty.txt holds no text"),
        ("markers.txt", b"\n<|endoftext|>\n", "markers.txt holds no text"),
        ("empty.jsonl", b"", "empty.jsonl holds no text"),
        ("blank.jsonl", b'{"text": ""}\n', "blank.jsonl holds no text"),
    ]:
        (tmp_path / name).write_bytes(content)
        check_error(cache, match, tmp_path / name)
    (tmp_path / "nothing").mkdir()
    check_error(cache, "holds no files", tmp_path / "nothing")


def test_parquet_without_the_column(tmp_path, cache):
    path = write_parquet(tmp_path / "a.parquet", [{"story": "a", "n": 1, "text": [{"b": "c"}]}])
    check_error(cache, "holds list; the columns are story, n, text", path)
    check_error(cache, "no column 'gone'; the columns are story, n, text", path, column_name="gone")
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(len(content) // 3) + content[4 + len(content) // 3 :])
    check_error(cache, "cannot read .*a.parquet: ", path, column_name="story")


def test_error_late_in_a_file(tmp_path, cache):
    rows = [{"text": "x" * 1000}] * 12_000  # more than `datasets` reads at once
    path = write_jsonl(tmp_path / "late.jsonl", rows)
    with path.open("a") as file:
        file.write('{"text": oops\n')
    check_error(cache, "cannot read .*late.jsonl: JSON parse", path)


def test_file_without_permission(tmp_path, cache, monkeypatch):
    (tmp_path / "a.txt").write_text("a")

    def refuse(*_):  # the tests may run as root, whom nothing is refused
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources, "open", refuse, raising=False)
    check_error(cache, "cannot read .*a.txt: Permission denied", tmp_path / "a.txt")


@pytest.mark.parametrize("size", [0, -1, 1.0, 0.0, -0.5, 1.5, True, float("nan"), "0.1"])
def test_bad_validation_size(size):
    with pytest.raises(PicoError, match="validation_size must be"):
        DataSpec(validation_size=size)


def test_impossible_options(tmp_path):
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "two.txt").write_text("one<|endoftext|>two")
    with pytest.raises(PicoError, match="must be a fraction"):
        load(tmp_path / "one.txt", validation_size=1)
    with pytest.raises(PicoError, match=r"\(2\) leaves nothing to train on: .* 2 documents"):
        load(tmp_path / "two.txt", validation_size=2)
    with pytest.raises(PicoError, match="not both"):
        DataSpec(validation_file="a", validation_split="b")
    with pytest.raises(PicoError, match="no name"):
        DataSpec("")
    with pytest.raises(PicoError, match="train_file is empty; leave it out"):
        DataSpec(train_file="")


def test_paths_as_objects(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    spec = DataSpec(tmp_path / "a.txt", validation_file=tmp_path / "b.txt")
    assert spec.dataset == str(tmp_path / "a.txt")
    assert (
        json.loads(json.dumps(dataclasses.asdict(spec)))["validation_file"] == spec.validation_file
    )
    for wrong in (b"a.txt", 4, None, ["a.txt"]):
        with pytest.raises(PicoError, match="dataset must be a str or a path, not"):
            DataSpec(wrong)
    with pytest.raises(PicoError, match="column_name must be a str or a path, not 4"):
        DataSpec(column_name=4)


def test_absolute(clone, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "python-docs").mkdir()
    monkeypatch.chdir(tmp_path)
    for dataset, absolute in {
        "a.txt": tmp_path / "a.txt",
        "./clone": clone,
        "clone:en": f"{clone}:en",
        "python-docs": "python-docs",
        "owner/name:config": "owner/name:config",
    }.items():
        assert DataSpec(dataset).absolute() == DataSpec(absolute)
    assert DataSpec("clone", revision="main").absolute().dataset == "clone"


def test_without_a_home(tmp_path, cache, monkeypatch):
    check_error(cache, "there is no file or folder ~nosuchuser/x", "~nosuchuser/x")
    (tmp_path / "a.txt").write_text("a<|endoftext|>b")
    check_error(
        cache, "no file '~nosuchuser/x'", tmp_path / "a.txt", validation_file="~nosuchuser/x"
    )
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # neither HOME nor an entry
    monkeypatch.setenv("PICO_CACHE", "~/cache")
    with pytest.raises(PicoError, match="no home folder for PICO_CACHE=~/cache; write the path"):
        load(tmp_path / "a.txt")
    monkeypatch.delenv("PICO_CACHE")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert all_documents(load(tmp_path / "a.txt")) == [b"a", b"b"]
    assert (tmp_path / f"pico_tg-{os.getuid()}").is_dir()


def test_local_data_need_no_cache_of_datasets(tmp_path, folder):
    """HF_HOME may be unwritable: the process that reads local data never imports `datasets`."""
    (tmp_path / "c.csv").write_text("text\na\nb\n")
    script = (
        "import sys; from pico_tg.data import *\n"
        "for name in sys.argv[1:]: load_data(DataSpec(name))\n"
        "assert 'datasets' not in sys.modules"
    )
    arguments = [folder, tmp_path / "c.csv", "python-docs"]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)


def test_fingerprints_do_not_change_between_versions(tmp_path):
    """Runs of earlier versions resume."""
    folder = tmp_path / "books"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.txt").write_text("a\n")
    (folder / "b-1.txt").write_text("\nb1\n<|endoftext|>b2")
    (folder / "deeper" / "c.txt").write_text("c")
    rows = tmp_path / "rows"
    rows.mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation"):
        write_jsonl(rows / f"{name}.jsonl", as_rows([f"{name} {i}" for i in range(5)] + [""]))
    found = [load(path) for path in (folder, folder / "b-1.txt", rows, rows / "validation.jsonl")]
    assert [data.train.fingerprint[:8] for data in found] == [
        "c6824a99",
        "8ed50c5a",
        "43e9a017",
        "e08a4387",
    ]
    assert [data.validation.fingerprint[:8] for data in found] == [
        "a2509c3e",
        "26da6665",
        "e888b17c",
        "7b068508",
    ]


# The cache ----------------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch):
    """The labels of the caches that were built."""
    labels = []
    write = data_cache._write

    def counting(source, *rest):
        labels.append(source.label)
        write(source, *rest)

    monkeypatch.setattr(data_cache, "_write", counting)
    return labels


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(f"document {i}" for i in range(1000)))
    return path


def test_cache_is_reused_until_the_file_changes(text, built):
    first = load(text)
    again = load(text)
    assert len(built) == 1
    assert again.train.fingerprint == first.train.fingerprint
    assert load(text, validation_size=10).validation.documents == 10
    assert len(built) == 1  # holding out is a view, so its size does not matter
    text.write_text(text.read_text().replace("7", "8"))  # as long as before
    os.utime(text, ns=(0, 0))
    assert b"7" not in load(text).train.bytes.tobytes()
    assert len(built) == 2


@pytest.mark.parametrize("name", ["bytes", "offsets", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed", "longer"])
def test_damaged_cache_is_rebuilt(text, cache, built, name, damage):
    expected = all_documents(load(text))
    (folder,) = cache.iterdir()
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage != "removed":
        changed = {"truncated": content[:-8], "emptied": b"", "longer": content + b"8 bytes."}
        (folder / name).write_bytes(changed[damage])
    assert all_documents(load(text)) == expected
    assert len(built) == 2
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_full_disk(text, cache):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        check_error(cache, f"cannot write the cache in {cache}: .*set PICO_CACHE", text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load(text).train.documents


def test_cache_in_an_impossible_place(text, tmp_path, monkeypatch):
    monkeypatch.setenv("PICO_CACHE", str(text))
    with pytest.raises(
        PicoError, match=r"cannot write the cache in .*: (File exists|Not a directory)"
    ):
        load(text)


def start_builder(text):
    return subprocess.Popen(
        [sys.executable, SCRIPTS / "slow_builder.py", text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_builders_at_once(text, cache, built):
    first = start_builder(text)
    assert first.stdout.readline() == "building\n"
    second = start_builder(text)
    # what the second one writes on stderr is unbuffered, so this returns as soon as it waits
    assert "waiting for another process" in second.stderr.readline()
    fingerprint = first.communicate("\n", timeout=600)[0].strip()
    assert first.returncode == 0
    # the second one has nothing left to build: it prints no "building" and asks for no line
    assert second.communicate(timeout=600)[0].strip() == fingerprint
    assert second.returncode == 0
    assert load(text).train.fingerprint == fingerprint
    assert built == []
    assert len(list(cache.iterdir())) == 1


def test_builders_without_locks(text, cache, monkeypatch):
    """Where there are no locks, the one who comes second takes what is there."""

    def refuse(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(data_cache.FileLock, "acquire", refuse)
    write = data_cache._write
    winner = []

    def beaten(source, *rest):
        write(source, *rest)
        if not winner:
            winner.append(None)
            winner[0] = load(text)  # another one starts later and is done sooner

    monkeypatch.setattr(data_cache, "_write", beaten)
    loaded = load(text)
    assert len(list(cache.iterdir())) == 1
    assert loaded.train.fingerprint == winner[0].train.fingerprint
    assert all_documents(loaded) == all_documents(winner[0])


def test_killed_builder(text, cache, tmp_path):
    builder = start_builder(text)
    assert builder.stdout.readline() == "building\n"
    builder.kill()
    builder.communicate()
    assert len(list(cache.glob("*.tmp"))) == 1
    other = tmp_path / "other.txt"
    other.write_text("a<|endoftext|>b")
    load(other)  # whoever builds next cleans up, whatever it builds
    assert len(list(cache.iterdir())) == 1
    assert len(all_documents(load(text))) == 1000
    assert len(list(cache.iterdir())) == 2


def test_live_builder_is_left_alone(text, cache, tmp_path):
    builder = start_builder(text)
    assert builder.stdout.readline() == "building\n"
    other = tmp_path / "other.txt"
    other.write_text("a<|endoftext|>b")
    load(other)
    assert len(list(cache.glob("*.tmp"))) == 1
    builder.communicate("\n", timeout=600)
    assert builder.returncode == 0
    assert len(list(cache.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl_long", "parquet"])
def test_memory_does_not_grow_with_the_data(kind, tmp_path):
    """A text of 150 MB takes a fraction of that; of Parquet, in a single row group."""
    block = np.random.default_rng(0).integers(97, 123, 5 << 20, np.uint8).tobytes().decode()
    path = tmp_path / f"a.{kind.removesuffix('_long')}"
    size = len(block) if kind == "jsonl_long" else 5000
    texts = [block[at : at + size] for at in range(0, len(block), size)]
    if kind == "parquet":
        schema = pyarrow.schema([("text", pyarrow.string())])
        table = pyarrow.table({"text": texts}, schema)
        plain = {"compression": "none", "use_dictionary": False}
        whole = pyarrow.concat_tables([table] * 30)
        pyarrow.parquet.write_table(whole, path, row_group_size=len(whole), **plain)
    else:
        rows = texts if kind == "txt" else [json.dumps({"text": text}) + "\n" for text in texts]
        with path.open("w") as file:
            for _ in range(30):
                file.writelines(rows)
    output = subprocess.check_output([sys.executable, SCRIPTS / "peak_memory.py", path], text=True)
    total, grown = map(float, output.split())
    assert total > 140
    assert grown < 100


# wrapper_mask -------------------------------------------------------------------------------------


def test_wrapper_mask(tmp_path):
    texts = ["a", "no <pico:seq> tag </pico:seq>", "bcd", "x" * 50, "held out"]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    corpus = load(tmp_path / "a.txt", validation_size=1).train
    expected = []
    for text in texts[:-1]:
        expected += [True] * len(SEQ_START) + [False] * len(text) + [True] * len(SEQ_END)
    total = len(expected)
    assert corpus.wrapper_mask(0, total).dtype == bool
    for start in range(total + 1):
        for stop in range(start, total + 1, 7):
            assert corpus.wrapper_mask(start, stop).tolist() == expected[start:stop]
    for start, stop in [(-1, 3), (5, 4), (0, total + 1)]:
        with pytest.raises(IndexError):
            corpus.wrapper_mask(start, stop)


# Windows ------------------------------------------------------------------------------------------


def test_windows_align_inputs_and_targets():
    content = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    windows = Windows(corpus_of(content.tobytes()), 16, 3, batch_size=4, seed=0)
    assert len(windows) == (1000 - 3) // 16
    # the batches of an epoch hold each window once; find each by where its content stands
    rows = np.concatenate([windows.batch(step) for step in range(len(windows) // 4 + 1)])
    places = [content.tobytes().find(row.tobytes()) for row in rows]
    assert rows.shape[1] == 16 + 3
    assert set(places) == {16 * i for i in range(len(windows))}


@pytest.mark.parametrize(("total", "count"), [(19, 1), (34, 1), (35, 2), (50, 2), (51, 3)])
def test_only_the_incomplete_window_is_left_out(total, count):
    assert len(Windows(corpus_of(bytes(total)), 16, 3, batch_size=1, seed=0)) == count


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 23])
def test_each_window_once_an_epoch(batch_size):
    corpus = corpus_of(bytes(range(10)) * 1 + b"!")  # ten windows of one byte, told by that byte
    windows = Windows(corpus, 1, 1, batch_size, seed=5)
    assert len(windows) == 10
    batches = [windows.batch(step) for step in range(100)]
    assert all(batch.shape == (batch_size, 2) and batch.dtype == np.uint8 for batch in batches)
    shown = np.concatenate(batches)[:, 0]
    epochs = [shown[i : i + 10].tolist() for i in range(0, len(shown) - 9, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > len(epochs) * 0.9
    for position in range(50):  # also from where no batch of this size begins
        rows = windows.batch_at(position)[:, 0]
        assert rows.tolist() == shown[position : position + batch_size].tolist()


def test_batch_is_a_pure_function_of_seed_and_step():
    corpus = corpus_of(np.random.default_rng(0).integers(0, 256, 2000, np.uint8).tobytes())
    forwards = Windows(corpus, 16, 8, 8, seed=1)
    expected = [forwards.batch(step) for step in range(60)]
    backwards = Windows(corpus, 16, 8, 8, seed=1)
    for step in reversed(range(60)):
        batch = backwards.batch(step)
        assert np.array_equal(batch, expected[step])
        batch[:] = 0  # a batch is the caller's own
    assert np.array_equal(backwards.batch(3), expected[3])
    other = Windows(corpus, 16, 8, 8, seed=2)
    assert not np.array_equal(other.batch(0), expected[0])


def test_order_does_not_change_between_versions():
    """A resumed run must see the data in the order it began with."""
    windows = Windows(corpus_of(bytes(range(256))), 4, 8, 16, seed=42)
    digest = hashlib.sha256(b"".join(windows.batch(step).tobytes() for step in range(9)))
    assert digest.hexdigest()[:16] == "052cafb90ac06e05"


def test_order_is_a_permutation_in_half_the_memory():
    for count in (1, 2, 255, 70_000):
        windows = Windows(corpus_of(bytes(count + 1)), 1, 1, 1, seed=7)
        for epoch in (0, 1):
            order = windows._order(epoch)
            assert order.dtype == np.uint32
            expected = np.random.default_rng((7, epoch)).permutation(count)
            assert np.array_equal(order, expected)


def test_windows_errors():
    with pytest.raises(PicoError, match=r"18 bytes, .* 16 \+ 3 bytes; a context_len of at most 15"):
        Windows(corpus_of(bytes(18)), 16, 3, 1, 0)
    Windows(corpus_of(bytes(18)), 15, 3, 1, 0)
    with pytest.raises(PicoError, match="use more data"):
        Windows(corpus_of(bytes(3)), 16, 3, 1, 0)
    with pytest.raises(PicoError, match="taken for a mistake"):
        Windows(corpus_of(bytes(100)), 16, 3, 1 << 27, 0)


def test_progress_is_on_stderr_and_only_if_wanted(text, capfd):
    load(text)
    assert capfd.readouterr() == ("", "")
    text.write_text(Path(text).read_text() + ".")
    load_data(DataSpec(str(text)), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "caching" in err


def test_python_docs_have_no_columns():
    with pytest.raises(PicoError, match="python-docs has no column 'foo'"):
        load_data(DataSpec("python-docs", column_name="foo"))
