"""Readers of data files: each yields the documents of an open file, with few in memory at a time.

`READERS` maps a suffix to a reader. A reader takes (file, label, column, remark): `label` names the
file in messages, and `remark` is called with each sentence that the user should read.
"""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..files import PicoError

# (piece of a document, whether the document ends with that piece): documents may exceed memory
Pieces = Iterator[tuple[bytes, bool]]
Remark = Callable[[str], None]

COMPRESSIONS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
CHUNK = 1 << 20  # bytes read at a time
MARKER = b"<|endoftext|>"  # between the documents of a .txt
# what other programs put into text: a byte order mark, and their marks between documents
FOREIGN = re.compile(rb"\xef\xbb\xbf|<\|(?!endoftext\|>)\w+\|>|</?s>")
NEWLINES = b"\r\n"
PARQUET_ROWS = 4  # rows decoded at a time: few, since rows may be long
MAX_CSV_FIELD = 1 << 26  # characters; Python's csv module needs 4 bytes for each
MAX_JSON_VALUE = 1 << 30  # bytes of a list of objects, which is read whole
JSON_LINES = "write each object on a line of its own, as jq -c does"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
COLUMN_WITHIN = 1000  # number of first rows of JSON, one of which must have the column


class MissingColumn(PicoError):
    """A file has no column of the wanted name, so it holds no text."""


def format_of(name: str) -> str | None:
    """The key in READERS for a file of this name, compressed or not; None if no reader fits."""
    stem, suffix = os.path.splitext(name.lower())
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
    return suffix if suffix in READERS else None


def read_file(path: Path, label: str, column: str | None, remark: Remark) -> Pieces:
    """The documents of a file, which may be compressed, by the reader of its name."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise PicoError(f"{path} is a pointer of Git LFS; run: git lfs pull")
    with COMPRESSIONS.get(path.suffix.lower(), open)(path, "rb") as file:
        start = file.read(4)
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            name = "UTF-32" if start == codecs.BOM_UTF32_LE else "UTF-16"
            raise PicoError(f"{label} is {name}; convert it, as iconv -f {name} -t UTF-8 does")
        file.seek(0)
        yield from READERS[format_of(path.name)](file, label, column, remark)


def reason(error: Exception) -> str:
    """The error in one line, with the file name of an OSError."""
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"byte {byte:#04x} is not valid UTF-8; convert the file to UTF-8"
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(text.split()) or type(error).__name__


# Plain text ---------------------------------------------------------------------------------------


def read_text(file: BinaryIO, label: str, column: str | None, remark: Remark) -> Pieces:
    """The documents of a .txt file: the whole file, or the texts between markers.

    In a file with markers, newlines around a document are removed, and a document of newlines only
    is skipped. A file without a marker is one document, byte for byte. To bound memory, a run of
    more than CHUNK newlines counts as text.
    """
    # Remove the first document's leading newlines only if a marker follows, at any distance.
    split = file.read(1) in (b"\r", b"\n") and _has_marker(file)
    file.seek(0)
    started = False  # has a piece of the current document been yielded?
    rest, strange, foreign = b"", "", None
    decoder = codecs.getincrementaldecoder("utf-8")()
    while block := file.read(CHUNK):
        strange = strange or odd(decoder, block)
        foreign = foreign or FOREIGN.search(block)
        *ended, rest = (rest + block).split(MARKER)
        for text in ended:
            text = text.rstrip(NEWLINES) if started else text.strip(NEWLINES)
            if started or text:
                yield text, True
            started = False
            split = True
        if split and not started:
            rest = rest.lstrip(NEWLINES)
        # Hold back bytes that may begin a marker, and newlines that may precede a marker.
        safe = max(0, len(rest) - len(MARKER) + 1)
        safe = len(rest[:safe].rstrip(NEWLINES)) or (safe if safe > CHUNK else 0)
        if safe:
            yield rest[:safe], False
            rest = rest[safe:]
            started = True
    if split:
        rest = rest.rstrip(NEWLINES) if started else rest.strip(NEWLINES)
    if started or rest:
        yield rest, True
    if strange := strange or odd(decoder, b""):
        remark(f"{label} is read byte by byte: {strange}")
    if foreign:
        mark = foreign[0].decode().replace("\ufeff", "a byte order mark (U+FEFF)")
        remark(
            f"{label} holds {mark}, which is learned as text; only {MARKER.decode()} separates "
            "documents"
        )


def odd(decoder: codecs.IncrementalDecoder, block: bytes) -> str:
    """Why a block is no UTF-8 text, or ""; the empty block is the end of the file."""
    try:
        text = decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        return reason(error)
    return "holds NUL, as UTF-16 does; convert the file to UTF-8" if "\0" in text else ""


def _has_marker(file: BinaryIO) -> bool:
    tail = b""
    while block := file.read(CHUNK):
        tail += block
        if MARKER in tail:
            return True
        tail = tail[1 - len(MARKER) :]
    return False


# Rows: JSON, CSV, Parquet -------------------------------------------------------------------------


def wanted_columns(column: str | None) -> list[str]:
    """The possible names of the column of text, the preferred one first."""
    return ["text", "bytes"] if column is None else [column]


def find_column(label: str, columns: list[str], column: str | None) -> str:
    """The column of text. Raises MissingColumn, and PicoError if two columns have its name."""
    for name in wanted_columns(column):
        if columns.count(name) > 1:
            raise PicoError(f"{label} has {columns.count(name)} columns named {name!r}; rename one")
        if name in columns:
            return name
    raise MissingColumn(f"{label} has {_lacking(column)}; the columns are {_listed(columns)}")


def _lacking(column: str | None) -> str:
    return "neither a column 'text' nor 'bytes'" if column is None else f"no column {column!r}"


def _listed(columns: list[str]) -> str:
    """The column names in one line, shortened: a file without a header has texts as names."""
    short = [name if len(name) <= 40 else name[:40] + "…" for name in columns[:20]]
    text = " ".join(", ".join(short).split()) or "none"
    return text + (", …" if len(columns) > 20 else "")


def document(label: str, name: str, value: object, columns: list[str]) -> bytes | None:
    """The text of a row; None or b"" if it is empty."""
    if isinstance(value, str):
        return value.encode()
    if value is None or isinstance(value, bytes):
        return value
    raise PicoError(
        f"{label}: column {name!r} must hold text or bytes, but holds {type(value).__name__}; "
        f"the columns are {_listed(columns)}"
    )


def read_json(file: BinaryIO, label: str, column: str | None, remark: Remark) -> Pieces:
    """The rows of JSON Lines, or of a JSON list of objects, which is read whole.

    Each row has its own columns, so the column of text is chosen for each row.
    """
    columns, lacking, number = {}, 0, 0
    for number, row in enumerate(_json_rows(file, label), 1):
        name = next((name for name in wanted_columns(column) if name in row), None)
        if name is not None:
            if text := document(label, name, row[name], list(row)):
                yield text, True
            continue
        lacking += 1
        if lacking == number:  # no row so far has the column
            columns |= dict.fromkeys(row)
            if number == COLUMN_WITHIN:
                break
    if number and lacking == number:
        find_column(label, list(columns), column)
    if lacking:
        remark(f"rows left out of {label}: {lacking:,} of {number:,}, with {_lacking(column)}")


def _json_rows(file: BinaryIO, label: str) -> Iterator[dict]:
    start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0  # a byte order mark
    file.seek(start)
    try:
        lines = _is_json_lines(file)
        file.seek(start)
        yield from _json_lines(file) if lines else _json_value(file, label)
    except RecursionError:
        raise ValueError("JSON parse error: a row is nested too deeply") from None


def _is_json_lines(file: BinaryIO) -> bool:
    """Whether the first line is a complete object, not the beginning of a longer one."""
    while (head := file.read(1)).isspace():
        pass
    if head != b"{":  # a list may be a single line of any length
        return False
    try:
        return isinstance(json.loads(head + file.readline()), dict)
    except ValueError:
        return False


def _json_lines(file: BinaryIO) -> Iterator[dict]:
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        try:
            row = json.loads(line.decode())
        except ValueError as error:
            hint = f"; {JSON_LINES}" if isinstance(error, json.JSONDecodeError) else ""
            raise ValueError(f"JSON parse error in line {number}: {reason(error)}{hint}") from error
        if not isinstance(row, dict):
            raise ValueError(f"JSON parse error in line {number}: it is no object")
        yield row


def _json_value(file: BinaryIO, label: str) -> list[dict]:
    """The members of the list that the file is, or the only object, on any number of lines."""
    content = file.read(MAX_JSON_VALUE + 1)
    if len(content) > MAX_JSON_VALUE:
        raise ValueError(f"a value of more than {MAX_JSON_VALUE:,} bytes; {JSON_LINES}")
    try:
        rows = json.loads(content.decode()) if content.strip() else []
    except json.JSONDecodeError as error:
        several = error.msg == "Extra data"
        why = f"several values that are not one a line; {JSON_LINES}" if several else error
        raise ValueError(f"JSON parse error: {why}") from error
    rows = rows if isinstance(rows, list) else [rows]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) and number == 1:
            raise MissingColumn(f"{label} holds {type(row).__name__} in place of rows")
        if not isinstance(row, dict):
            raise ValueError(f"JSON parse error in record {number}: it is no object")
    return rows


def read_csv(file: BinaryIO, label: str, column: str | None, remark: Remark) -> Pieces:
    """The rows of a CSV file with a header. Every value is text: 007, NA and null too.

    The separator is comma, semicolon or tab, whichever is most frequent in the header. Nonempty
    fields beyond those of the header are an error: an unquoted comma would truncate the text.
    """
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    first = next((line for line in text if line.strip()), "")
    separator = max(",", ";", "\t", key=first.count)  # the comma for a single column
    rows = csv.reader(itertools.chain([first], text), delimiter=separator, strict=True)
    limit = csv.field_size_limit(MAX_CSV_FIELD)  # global to the process, so restored below
    try:
        header = [name.strip() for name in next(rows, [])]
        index = header.index(find_column(label, header, column))
        for row in rows:
            if any(row[len(header) :]):
                raise ValueError(
                    f"line {rows.line_num} has {len(row)} fields, but the header has "
                    f"{len(header)}; a text with {separator!r} in it must be quoted"
                )
            if len(row) > index and row[index]:
                yield row[index].encode(), True
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num}: {error}; is a quote not closed?") from error
    finally:
        csv.field_size_limit(limit)


def read_parquet(file: BinaryIO, label: str, column: str | None, remark: Remark) -> Pieces:
    """The rows of a Parquet file.

    The unit of reading is the page, whatever the size of the row group. A page has to fit into
    memory twice: as stored in the file, and decompressed. Writers make pages of about 1 MB, but
    some check the size only once in 1024 rows: 40 rows of 5 MB in one page took 650 MB.
    """
    import pyarrow.parquet

    # without buffer_size, pyarrow would read the whole column of a row group
    options = {"pre_buffer": False, "buffer_size": CHUNK}
    source = file.name if isinstance(file, io.BufferedReader) else file  # a path is read faster
    with pyarrow.parquet.ParquetFile(source, **options) as parquet:
        columns = parquet.schema_arrow.names
        name = find_column(label, columns, column)
        for batch in parquet.iter_batches(PARQUET_ROWS, columns=[name], use_threads=False):
            for scalar in batch.column(name):
                if text := document(label, name, scalar.as_py(), columns):
                    yield text, True


READERS: dict[str, Callable[[BinaryIO, str, str | None, Remark], Pieces]] = {
    ".txt": read_text,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
