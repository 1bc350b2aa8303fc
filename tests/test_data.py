"""data/: every format against the plain bytes, splits, the hub, the cache under attack, windows."""

import hashlib
import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pico_tg.data import (
    SEQ_END,
    SEQ_START,
    Corpus,
    DataSpec,
    Windows,
    formats,
    load_data,
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


def test_txt_does_not_import_datasets(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("a<|endoftext|>b")
    script = (
        "import sys; from pico_tg.data import *\n"
        "for name in sys.argv[1:]: load_data(DataSpec(name))\n"
        "assert 'datasets' not in sys.modules"
    )
    arguments = ["python-docs", str(folder / "a.txt"), str(folder)]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, timeout=600)


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


def test_hub_dataset(folder, monkeypatch):
    asked = {}
    load_dataset = datasets.load_dataset

    def from_hub(name, config, **options):
        asked.update(options, name=name, config=config)
        return load_dataset(str(folder), streaming=True)

    info = SimpleNamespace(sha="0123abc")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    loaded = load("owner/name:config")
    assert split_up(loaded.train) == documents("train", 0, 1, 2, 3)
    assert split_up(loaded.validation) == documents("validation", 0, 1, 2, 3)
    assert (asked["name"], asked["config"], asked["revision"]) == (
        "owner/name",
        "config",
        "0123abc",
    )
    assert asked["streaming"]


def test_hub_txt_is_split_on_the_marker(monkeypatch):
    files = {"datasets/owner/name@0123abc/deep/a.txt": b"one\ntwo\n<|endoftext|>\nthree\n"}

    class FileSystem:
        def open(self, path, mode):
            assert mode == "rb"
            return io.BytesIO(files[path])

        def size(self, path):
            return len(files[path])

    info = SimpleNamespace(sha="0123abc")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
    assert all_documents(load("owner/name", train_file="deep/a.txt")) == [b"one\ntwo", b"three"]


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
