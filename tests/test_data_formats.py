"""data/formats.py: every format against the plain bytes, broken files, memory."""

import gzip
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import all_documents, as_rows, check_error, load, split_up, write_jsonl, write_parquet
from hypothesis import given
from hypothesis import strategies as st

from pico_tg.data import SEQ_END, SEQ_START, DataSpec, formats, load_whole

SCRIPTS = Path(__file__).parent / "scripts"


TEXTS = ["first\n", "zweites: äöü 🙂", "NA", "4", 'last, "quoted"\nand long ' + "x" * 300]


def wrapped(texts):
    texts = [text.encode() if isinstance(text, str) else text for text in texts]
    return b"".join(SEQ_START + text + SEQ_END for text in texts)


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


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_readers_equal_those_of_datasets(kind, tmp_path):
    texts = [None, "", "ä\n", "x" * 100_000, *map(str, range(100)), "last"]
    rows = [{"n": n, "text": text} for n, text in enumerate(texts)]
    path = tmp_path / f"a.{kind}"
    (write_jsonl if kind == "jsonl" else write_parquet)(path, rows)
    builder = "json" if kind == "jsonl" else kind
    expected = datasets.load_dataset(builder, data_files=str(path), cache_dir=tmp_path / "datasets")
    expected = [row["text"].encode() for row in expected["train"] if row["text"]]
    assert all_documents(load(path, validation_size=1)) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[{"text": "a"}, {"text": "b"}]', [b"a", b"b"]),
        (b'\n{\n"text": "a\\nb"\n}\n', [b"a\nb"]),
        (b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n', [b"a", b"b"]),
        (b'{"n": 1}\r\n\r\n{"text": "a"}\r\n{"more": 2, "text": "b"}', [b"a", b"b"]),
        (b'{"text": "2020-01-01"}\n{"text": "\\ud83d\\ude42"}\n', [b"2020-01-01", "🙂".encode()]),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_forms_of_json(content, expected, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    assert split_up(load_whole(DataSpec(path))) == expected


def test_column_of_each_json_row(tmp_path):
    rows = [{"bytes": "only"}, {"text": "second", "bytes": "q"}, {"text": "third"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    loaded = load(path)
    assert all_documents(loaded) == [b"only", b"second", b"third"]
    assert "left out" not in loaded.note
    write_jsonl(path, [{"n": 1}, *rows, {"text": None}, {"n": 2}])
    loaded = load(path)
    assert all_documents(loaded) == [b"only", b"second", b"third"]
    remark = "a.jsonl: 2 of 6, with neither a column 'text' nor 'bytes'"
    assert loaded.note.count("rows left out of ") == loaded.note.count(remark) == 1
    loaded = load(path, column_name="bytes")
    assert all_documents(loaded) == [b"only", b"q"]
    assert "a.jsonl: 4 of 6, with no column 'bytes'" in loaded.note


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


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('[{"text": "a"}', "JSON parse error: Expecting ',' delimiter: line 1 column 15"),
        ('[{"text": "a"} {"text": "b"}]', "JSON parse error: Expecting ',' delimiter"),
        ('[{"text": "a"}, 4]', "JSON parse error in record 2: it is no object"),
        ('[{"text": "a"}] x', "several values that are not one a line; write each object on a"),
        ('{"text": "a"}\n{"text":\n"b"}\n', "in line 2: Expecting value.*; write each object on"),
        ('{"text":\n"a"}\n{"text":\n"b"}\n', "several values that are not one a line; write"),
        ('[{"text": "' + "a" * 100, "more than 100 bytes; write each object on a line of its own"),
    ],
)
def test_json_that_is_not_read(content, match, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(formats, "MAX_JSON_VALUE", 100)
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(content)
        check_error(cache, f"cannot read .*{name}: .*{match}", tmp_path / name)


def test_deeply_nested_json(tmp_path, cache):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    check_error(cache, "deep.jsonl: JSON parse error: a row is nested too deeply", path)


@pytest.mark.parametrize(
    ("content", "odd"),
    [
        ("für".encode() * 1000, None),
        ("für".encode("latin-1"), "byte 0xfc is not valid UTF-8; convert the file to UTF-8"),
        ("One.".encode("utf-16-le"), "holds NUL, as UTF-16 does; convert the file to UTF-8"),
        (
            gzip.compress(b"One.", mtime=0),
            "byte 0x8b is not valid UTF-8; convert the file to UTF-8",
        ),
        (b"." * 1000 + b"\xfc", "byte 0xfc is not valid UTF-8; convert the file to UTF-8"),
        (b"." * 1000 + b"\0.", "holds NUL, as UTF-16 does; convert the file to UTF-8"),
        (b"." * 1000 + "ü".encode()[:1], "byte 0xc3 is not valid UTF-8; convert the file to UTF-8"),
    ],
)
def test_text_that_is_none_is_said(content, odd, tmp_path):
    """It is read to the byte all the same."""
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with mock.patch.object(formats, "CHUNK", 100):  # which ends within a character
        loaded = load(path)
    assert b"".join(all_documents(loaded)) == content
    said = [line for line in loaded.note.split("\n")[1:] if "validate on" not in line]
    assert said == ([f"{path} is read byte by byte: {odd}"] if odd else [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<|startoftext|>a story<|endoftext|>" * 20, "<|startoftext|>"),
        ("<s>a story</s>" * 20, "<s>"),
        ("\ufeffa story " * 20, "a byte order mark (U+FEFF)"),
        ("a story, 1 < 2 || x<|y<|endoftext|>" * 20, ""),
    ],
)
def test_marks_of_other_programs_are_said(text, said, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(text)
    found = [line for line in load(path).note.split("\n")[1:] if "validate on" not in line]
    assert [line.partition(" holds ")[2].partition(",")[0] for line in found] == [said] * bool(said)


def test_unreadable_files(tmp_path, cache):
    for name, content, match in [
        ("bad.jsonl", b'{"text": "a"}\n{"text": oops\n', "cannot read .*bad.jsonl: JSON parse"),
        ("bad.json", b"[1, 2]", "bad.json holds int in place of rows"),
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
        ("little.txt", "\ufeffOne.".encode("utf-16-le"), "little.txt is UTF-16; convert it, as"),
        ("big.txt", "\ufeffOne.".encode("utf-16-be"), "big.txt is UTF-16; convert it, as iconv"),
        ("a.txt.gz", gzip.compress("One.".encode("utf-16")), "a.txt.gz is UTF-16; convert it"),
        ("utf16.jsonl", '{"text": "a"}'.encode("utf-16"), "utf16.jsonl is UTF-16; convert it"),
        ("bad.pdf", b"%PDF", "the formats are .txt, .jsonl"),
        ("empty.txt", b"", "empty.txt holds no text"),
        ("spaces.txt", b"  \n\t\n", "spaces.txt holds no text"),
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
