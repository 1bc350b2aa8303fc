"""A DATASET string becomes two flat byte corpora, train and validation, read by memory map.

Every document is wrapped in `<pico:seq>` and `</pico:seq>`, and the wrapped documents lie back to
back. They are streamed once into a cache (`PICO_CACHE`, or ~/.cache/pico_tg); from then on a corpus
is a view of that file, and training and validation are two views when one is held out of the other.
"""

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import logging
import os
import secrets
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .files import PicoError, fsync_folder
from .progress import Progress

try:
    import fcntl
except ImportError:  # Windows: without locks two builders race, and the rename settles it
    fcntl = None

SEQ_START: bytes = b"<pico:seq>"
SEQ_END: bytes = b"</pico:seq>"

_MARKER = b"<|endoftext|>"  # between the documents of a .txt
_NEWLINES = b"\r\n"
_CHUNK = 1 << 20  # bytes read at a time
_ROWS = 4  # of a Parquet file, decoded at a time: few, since they may be long
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_HELD_OUT = 0.05  # of the bytes, where nobody says otherwise
MOST_BYTES = 1 << 30  # of one step
_CACHE_FORMAT = 1  # part of every cache's key: raise it when the files below change


@dataclass(frozen=True)
class DataSpec:
    """What to train and validate on. Raises PicoError on options that cannot be.

    - dataset: `python-docs` (in Python itself); a .txt, .jsonl, .json, .parquet or .csv file; a
      folder of such files or of a saved Hugging Face dataset; or a name on the Hugging Face hub,
      `owner/name` or `owner/name:config`. A .txt is one document, or several with <|endoftext|>
      between them
    - column_name: the column of str or bytes; None takes `text`, else `bytes`
    - train_file, validation_file: one file, in the dataset's folder or anywhere, or in the hub's
      dataset
    - train_split: None is `train` if there is one, otherwise the only split
    - validation_split: None is `validation` if there is one, otherwise a part is held out
    - validation_size: how much to hold out, of the end: a fraction of the bytes, or a whole number
      of documents; None is 5 % of the bytes, and at least a document
    """

    dataset: str = "python-docs"
    column_name: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    train_split: str | None = None
    validation_split: str | None = None
    validation_size: float | int | None = None

    def __post_init__(self) -> None:
        if not self.dataset:
            raise PicoError("the dataset has no name; python-docs needs no download")
        if self.validation_file is not None and self.validation_split is not None:
            raise PicoError("give a validation_file or a validation_split, not both")
        size = self.validation_size
        if size is None:
            return
        whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
        if not whole and not (isinstance(size, float) and 0 < size < 1):
            raise PicoError(
                "validation_size must be a fraction between 0 and 1, or a whole number of "
                f"documents, not {size!r}"
            )


@dataclass(frozen=True, eq=False)
class Corpus:
    """Wrapped documents, back to back.

    - bytes: uint8 [total], read-only, a view of a memory-mapped file
    - offsets: int64 [documents + 1], where each document starts in `bytes`, and the total
    - fingerprint: a hash of the content; the same text has the same one on any machine
    """

    bytes: np.ndarray
    offsets: np.ndarray
    fingerprint: str

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1

    def wrapper_mask(self, start: int, stop: int) -> np.ndarray:
        """Which bytes in [start, stop) are part of a wrapper tag: bool [stop - start].

        Text that merely looks like a tag is not one. Raises IndexError outside of the corpus.
        """
        if not 0 <= start <= stop <= len(self.bytes):
            raise IndexError(f"[{start}, {stop}) is not within the {len(self.bytes)} bytes")
        first = np.searchsorted(self.offsets, start, "right") - 1
        last = np.searchsorted(self.offsets, stop, "left")
        begins = self.offsets[first:last, None] + np.arange(len(SEQ_START))
        ends = self.offsets[first + 1 : last + 1, None] - 1 - np.arange(len(SEQ_END))
        tags = np.concatenate([begins.ravel(), ends.ravel()])
        mask = np.zeros(stop - start, dtype=bool)
        mask[tags[(tags >= start) & (tags < stop)] - start] = True
        return mask


@dataclass(frozen=True, eq=False)
class Data:
    """What `load_data` found for `spec`; `note` says in one line where validation comes from."""

    train: Corpus
    validation: Corpus
    note: str
    spec: DataSpec


def load_data(spec: DataSpec, progress: bool = True) -> Data:
    """Open the data of `spec`, streaming it into the cache first if this is the first time.

    progress: show a bar on stderr while building the cache. Raises PicoError, and leaves nothing
    behind, on data that is not there, cannot be read or is empty, on a column or split that does
    not exist, and on a full disk.
    """
    source, held_out = _sources(spec)
    folder, train = _cached(source, progress)
    if held_out is None:
        train, validation, origin = _hold_out(source.label, folder, train, spec.validation_size)
    else:
        _, validation = _cached(held_out, progress)
        origin = held_out.label
        if spec.validation_size is not None:
            origin += " (so validation_size is not used)"
    if train.fingerprint == validation.fingerprint:
        raise PicoError(
            f"{source.label} is to be both the training and the validation data; leave the "
            "validation file or split out, and the end of the data is held out"
        )
    note = f"training on {_sizes(train)}; validating on {origin}: {_sizes(validation)}"
    return Data(train, validation, note, spec)


def load_whole(spec: DataSpec, progress: bool = True) -> Corpus:
    """What `load_data` would train on, together with what it would hold out of that.

    So one document of one byte will do. Raises PicoError as `load_data` does.
    """
    return _cached(_sources(spec)[0], progress)[1]


def has_validation(spec: DataSpec) -> bool:
    """Whether validation data are named or a split of their own; else some are held out."""
    return spec.validation_size is not None or _sources(spec)[1] is not None


def _sizes(corpus: Corpus) -> str:
    documents = "1 document" if corpus.documents == 1 else f"{corpus.documents:,} documents"
    return f"{len(corpus.bytes):,} bytes in {documents}"


# Sources: what a DATASET string stands for -------------------------------------------------------

# A document may be larger than memory, so it comes in pieces, each with: does a document end here?
_Pieces = Iterator[tuple[bytes, bool]]


@dataclass(frozen=True)
class _Source:
    """One split, not yet read."""

    label: str  # for messages
    identity: list  # JSON; changes whenever the text might, so that a cache is found by it
    read: Callable[[], _Pieces]  # raises PicoError and nothing else
    size: int | None = None  # bytes, if known beforehand, for the progress bar


def _sources(spec: DataSpec) -> tuple["_Source", "_Source | None"]:
    """What to train on and, where there is such a thing, what to validate on."""
    splits = _splits(spec, spec.train_file)
    source = _pick(splits, spec.train_split, spec.train_file or spec.dataset)
    if spec.validation_file is not None:
        held_out = _pick(_splits(spec, spec.validation_file), None, spec.validation_file)
    elif spec.validation_split is not None:
        splits = splits if spec.train_file is None else _splits(spec, None)
        held_out = _pick(splits, spec.validation_split, spec.dataset)
    else:
        held_out = splits.get("validation")
        if held_out is source:
            held_out = None
    return source, held_out


def _splits(spec: DataSpec, file: str | None) -> dict[str, _Source]:
    """The splits of the dataset, or of one file that belongs to it, by name."""
    path = Path(spec.dataset).expanduser()
    embedded = spec.dataset == "python-docs"
    if embedded and spec.column_name is not None and file is None:
        raise PicoError(f"python-docs has no column {spec.column_name!r}, nor any; leave it out")
    try:
        if file is not None:
            for candidate in (path / file, Path(file).expanduser()):
                if candidate.is_file():
                    return {"train": _local_file(candidate, spec.column_name)}
            if embedded or path.exists():
                raise PicoError(f"there is no file {file!r}, neither in {spec.dataset} nor here")
        elif embedded:
            return {"train": _python_docs()}
        elif path.is_dir():
            return _local_folder(path, spec.column_name)
        elif path.exists():
            return {"train": _local_file(path, spec.column_name)}
    except OSError as error:
        raise PicoError(f"cannot read {error.filename or path}: {_reason(error)}") from error

    looks_local = spec.dataset.startswith((".", "/", "~")) or spec.dataset.count("/") > 1
    if looks_local or path.suffix.lower() in (".txt", *_BUILDERS):
        raise PicoError(f"there is no file or folder {spec.dataset}")
    return _hub(spec.dataset, file, spec.column_name)


def _pick(splits: dict[str, _Source], name: str | None, dataset: str) -> _Source:
    if name is None:
        name = "train" if "train" in splits or len(splits) != 1 else next(iter(splits))
    if name not in splits:
        raise PicoError(f"{dataset} has no split {name!r}; there is: {', '.join(splits)}")
    return splits[name]


def _python_docs() -> _Source:
    from pydoc_data.topics import topics

    documents = [topics[name].encode() for name in sorted(topics)]
    return _Source(
        "python-docs",
        ["python-docs", _digest("\0".join(topics[name] for name in sorted(topics)))],
        lambda: ((document, True) for document in documents if document),
        sum(map(len, documents)),
    )


def _local_file(path: Path, column: str | None) -> _Source:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return _txt_files(str(path), [path])
    if suffix not in _BUILDERS:
        known = ", ".join([".txt", *_BUILDERS])
        raise PicoError(f"cannot tell what {path} is by its name; the formats are {known}")
    if path.stat().st_size == 0:
        raise PicoError(f"{path} is empty")

    identity = ["rows", column, _stamps([path])]
    if read := _reader(path):
        return _Source(str(path), identity, partial(_read_files, [path], [read], column))

    def load():
        # escaped, since `datasets` takes a file's name for a pattern
        files = glob.escape(os.path.abspath(path))
        options = _reader_options({suffix}, column)
        loaded = _datasets().load_dataset(
            _BUILDERS[suffix], data_files=files, streaming=True, **options
        )
        return loaded["train"]

    return _Source(str(path), identity, partial(_read_rows, str(path), load, column))


def _local_folder(path: Path, column: str | None) -> dict[str, _Source]:
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(path).parts)
    )
    if not files:
        raise PicoError(f"the folder {path} holds no files")
    names = {file.name for file in files if file.parent == path}
    saved = "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= names
    # The most common kind of file counts, which is also how `datasets` decides. Its own reader of
    # .txt would make each line a document.
    kinds = Counter(file.suffix.lower() for file in files)
    texts = kinds.pop(".txt", 0)
    if not saved and texts > max(kinds.values(), default=0):
        texts = [file for file in files if file.suffix.lower() == ".txt"]
        return {"train": _txt_files(str(path), texts)}

    identity = ["folder", column, _stamps(files)]
    options = _reader_options(_BUILDERS.keys() & kinds.keys(), column)
    try:
        if saved:
            loaded = _datasets().load_from_disk(str(path))
            return _dataset_splits(str(path), identity, loaded, column)
        # `datasets` tells which file belongs to which split
        builder = _datasets().load_dataset_builder(os.path.abspath(path), **options)
        loaded = builder.as_streaming_dataset()
    except Exception as error:  # pyarrow, pandas, fsspec and datasets each raise their own
        raise PicoError(f"cannot read the dataset in {path}: {_reason(error)}") from error
    splits = _dataset_splits(str(path), identity, loaded, column)
    for name, source in splits.items():
        paths = [Path(file) for file in builder.config.data_files[name]]
        readers = [_reader(file) for file in paths]
        if all(readers):
            read = partial(_read_files, paths, readers, column)
            splits[name] = dataclasses.replace(source, read=read)
    return splits


def _hub(dataset: str, file: str | None, column: str | None) -> dict[str, _Source]:
    name, _, config = dataset.partition(":")
    try:
        datasets = _datasets()
        from huggingface_hub import HfApi, HfFileSystem

        # asked first: `load_dataset` retries for half a minute before it gives up
        revision = HfApi().dataset_info(name, timeout=10).sha
        identity = ["hub", name, config, revision, file, column]
        if file is not None and file.lower().endswith(".txt"):
            path = f"datasets/{name}@{revision}/{file}"
            system = HfFileSystem()
            read = partial(_read_txt, [path], system.open)
            return {"train": _Source(f"{dataset}/{file}", identity, read, system.size(path))}
        files = None if file is None else {"train": file}
        loaded = datasets.load_dataset(
            name, config or None, data_files=files, revision=revision, streaming=True
        )
    except Exception as error:  # httpx, huggingface_hub, fsspec and datasets each raise their own
        raise PicoError(
            f"cannot open {dataset!r} on the Hugging Face hub ({_reason(error)}), and it is no "
            "local file or folder; check the name and the network, or use python-docs"
        ) from error
    return _dataset_splits(
        dataset if file is None else f"{dataset}/{file}", identity, loaded, column
    )


def _datasets():
    """The `datasets` module, quiet. Its import takes seconds, so it waits until it is needed."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is raised as well
    return datasets


def _dataset_splits(label: str, identity: list, loaded, column: str | None) -> dict[str, _Source]:
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return {
        str(name): _Source(
            f"{label}, split {name}",
            [*identity, str(name)],
            partial(_read_rows, f"{label}, split {name}", partial(splits.get, name), column),
        )
        for name in splits
    }


def _reader_options(kinds: set[str], column: str | None) -> dict:
    """Options of `load_dataset` for files whose suffixes are `kinds`."""
    if kinds == {".csv"}:
        # pandas would make a text of digits a number and drop the text "NA"
        names = ["text", "bytes"] if column is None else [column]
        return {"na_filter": False, "converters": dict.fromkeys(names, str)}
    return {}


def _read_rows(label: str, load: Callable, column: str | None) -> _Pieces:
    """One document a row, of the `datasets` dataset that `load` opens. Empty rows are left out."""
    try:
        # Arrow batches are far faster than rows, and each text is copied only when its turn comes;
        # few rows a batch, since `datasets` collects them in memory, and they may be long
        for batch in load().with_format("arrow").iter(batch_size=16):
            name = _column(label, batch.column_names, column)
            for scalar in batch.column(name):
                if document := _document(label, name, scalar.as_py(), batch.column_names):
                    yield document, True
    except PicoError:
        raise
    except Exception as error:  # pyarrow, pandas, fsspec and datasets each raise their own
        raise PicoError(f"cannot read {label}: {_reason(error)}") from error


# Takes a file and the wanted column; yields documents, holding a few of them at a time.
_Reader = Callable[[Path, str | None], Iterator[bytes]]


def _reader(path: Path) -> _Reader | None:
    """How to read a local file in little memory; None where only `datasets` can read it.

    `datasets` holds several row groups of a Parquet file at once, and 10 MB of JSON in many forms.
    """
    suffix = path.suffix.lower()
    if not path.is_file():  # a URL, or a member of an archive
        return None
    if suffix == ".parquet":
        return _parquet_documents
    return _json_documents if suffix in (".jsonl", ".json") and _is_json_lines(path) else None


def _read_files(paths: list[Path], readers: list[_Reader], column: str | None) -> _Pieces:
    for path, read in zip(paths, readers, strict=True):
        try:
            for document in read(path, column):
                yield document, True
        except PicoError:
            raise
        except Exception as error:  # OSError, ValueError, and pyarrow's own
            raise PicoError(f"cannot read {path}: {_reason(error)}") from error


def _parquet_documents(path: Path, column: str | None) -> Iterator[bytes]:
    """The rows of a Parquet file that are not empty.

    The unit of reading is the page, whatever the size of the row group, and a page has to fit into
    memory twice: at worst as it is in the file, and decompressed. Writers make pages of about 1 MB,
    but some look at the size only once in 1024 rows: 40 rows of 5 MB in one page took 650 MB.
    """
    import pyarrow.parquet

    # a buffer: without one, pyarrow would read a row group's column whole
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_CHUNK) as file:
        columns = file.schema_arrow.names
        name = _column(str(path), columns, column)
        for batch in file.iter_batches(_ROWS, columns=[name], use_threads=False):
            for scalar in batch.column(name):
                if document := _document(str(path), name, scalar.as_py(), columns):
                    yield document


def _json_documents(path: Path, column: str | None) -> Iterator[bytes]:
    """The rows of a file of JSON Lines that are not empty. A row has to fit into memory.

    As in `datasets`, the columns are those of the rows at the start, and null where a row has none.
    """
    with open(path, "rb") as file:
        head = file.readlines(_CHUNK)
        columns = list(dict.fromkeys(key for row in _json_rows(head) for key in row))
        name = _column(str(path), columns, column)
        for row in _json_rows(itertools.chain(head, file)):
            if document := _document(str(path), name, row.get(name), columns):
                yield document


def _json_rows(lines: Iterable[bytes]) -> Iterator[dict]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            row = json.loads(line.decode())
        except ValueError as error:
            raise ValueError(f"JSON parse error in line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"JSON parse error in line {number}: it is no object")
        yield row


def _is_json_lines(path: Path) -> bool:
    """Whether the first line is an object of its own, and not the head of a longer one."""
    with open(path, "rb") as file:
        if file.read(1) != b"{":  # a list has one line too, perhaps, and a long one
            return False
        file.seek(0)
        try:
            return isinstance(json.loads(file.readline()), dict)
        except ValueError:
            return False


def _document(label: str, name: str, value: object, columns: list[str]) -> bytes | None:
    """The text of a row; None or nothing if it is empty."""
    if isinstance(value, str):
        return value.encode()
    if value is None or isinstance(value, bytes):
        return value
    raise PicoError(
        f"{label}: column {name!r} must hold text or bytes, but holds {type(value).__name__}; "
        f"the columns are {', '.join(columns)}"
    )


def _column(label: str, columns: list[str], wanted: str | None) -> str:
    for name in ["text", "bytes"] if wanted is None else [wanted]:
        if name in columns:
            return name
    missing = "neither a column 'text' nor 'bytes'" if wanted is None else f"no column {wanted!r}"
    raise PicoError(f"{label} has {missing}; the columns are {', '.join(columns)}")


def _txt_files(label: str, paths: list[Path]) -> _Source:
    stamps = _stamps(paths)
    read = partial(_read_txt, [str(path) for path in paths])
    return _Source(label, ["txt", stamps], read, sum(size for _, size, _ in stamps))


def _read_txt(paths: list[str], opener: Callable = open) -> _Pieces:
    for path in paths:
        try:
            with opener(path, "rb") as file:
                yield from _split_text(file)
        except Exception as error:  # OSError, and what a remote file system raises
            raise PicoError(f"cannot read {path}: {_reason(error)}") from error


def _split_text(file) -> _Pieces:
    """The documents of a .txt file: all of it, or what stands between markers.

    Between markers, surrounding newlines are no part of the document, and a document of nothing
    else is left out. A file without a marker is taken as it is, to the byte. Memory stays bounded
    whatever the bytes are: newlines beyond a chunk of nothing but newlines count as text.
    """
    # The first document's leading newlines go only if a marker follows, perhaps gigabytes later.
    split = file.read(1) in (b"\r", b"\n") and _has_marker(file)
    file.seek(0)
    started = False  # is a part of the present document out already?
    rest = b""
    while block := file.read(_CHUNK):
        *ended, rest = (rest + block).split(_MARKER)
        for text in ended:
            text = text.rstrip(_NEWLINES) if started else text.strip(_NEWLINES)
            if started or text:
                yield text, True
            started = False
            split = True
        if split and not started:
            rest = rest.lstrip(_NEWLINES)
        # Hold back what may be the head of a marker, and the newlines that may precede one.
        safe = max(0, len(rest) - len(_MARKER) + 1)
        safe = len(rest[:safe].rstrip(_NEWLINES)) or (safe if safe > _CHUNK else 0)
        if safe:
            yield rest[:safe], False
            rest = rest[safe:]
            started = True
    if split:
        rest = rest.rstrip(_NEWLINES) if started else rest.strip(_NEWLINES)
    if started or rest:
        yield rest, True


def _has_marker(file) -> bool:
    tail = b""
    while block := file.read(_CHUNK):
        tail += block
        if _MARKER in tail:
            return True
        tail = tail[1 - len(_MARKER) :]
    return False


def _stamps(files: list[Path]) -> list[tuple[str, int, int]]:
    """(absolute path, size, time of the last change in ns) of each file."""
    stats = [(file, file.stat()) for file in files]
    return [(os.path.abspath(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]


def _reason(error: Exception) -> str:
    """The error in one line."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


# The cache: PICO_CACHE/<key>/{bytes, offsets, meta.json} ------------------------------------------


def _cached(source: _Source, progress: bool) -> tuple[Path, Corpus]:
    """The corpus of `source` and its folder in the cache, which is built if it is not there."""
    root = Path(os.environ.get("PICO_CACHE") or "~/.cache/pico_tg").expanduser()
    folder = root / _digest(json.dumps([_CACHE_FORMAT, *source.identity]))
    corpus = _open_cache(folder)
    if corpus is not None:
        return folder, corpus
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_dead_builds(root)
        with _lock(root / f"{folder.name}.lock", progress=progress):
            if _open_cache(folder) is None:  # nobody built it while this process waited
                _build(source, folder, progress)
    except OSError as error:
        raise PicoError(
            f"cannot write the cache in {root}: {_reason(error)}; "
            "make room there or set PICO_CACHE to another folder"
        ) from error
    corpus = _open_cache(folder)
    if corpus is None:
        raise PicoError(f"the cache {folder} was taken away while it was opened; run it again")
    return folder, corpus


def _open_cache(folder: Path) -> Corpus | None:
    """The corpus in `folder`; None if there is none, or if its sizes say that it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        data = np.memmap(folder / "bytes", np.uint8, "r")
        offsets = np.memmap(folder / "offsets", "<i8", "r")
        sizes = (len(data), len(offsets) - 1, int(offsets[0]), int(offsets[-1]))
        if sizes != (meta["bytes"], meta["documents"], 0, len(data)):
            return None
        return Corpus(np.asarray(data), np.asarray(offsets), meta["fingerprint"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _build(source: _Source, folder: Path, progress: bool) -> None:
    """Write the cache beside its place and rename it there, so that it is whole or not there."""
    temporary = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        _write(source, temporary, progress)
        if _open_cache(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)  # damaged, if there is one
            try:
                os.rename(temporary, folder)
            except OSError:
                if _open_cache(folder) is None:  # else another process won, with the same bytes
                    raise
            fsync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(source: _Source, folder: Path, progress: bool) -> None:
    """Stream `source` into the files of a cache, all of them on disk at the return."""
    total = documents = 0
    inside = False  # a document
    content = hashlib.blake2b(digest_size=16)
    with (
        open(folder / "bytes", "wb") as data,
        open(folder / "offsets", "wb") as offsets,
        Progress(
            total=source.size,
            desc=f"caching {source.label}",
            unit="B",
            unit_scale=True,
            disable=not progress,
        ) as bar,
    ):
        offsets.write(struct.pack("<q", 0))
        for piece, ends in source.read():
            block = (b"" if inside else SEQ_START) + piece + (SEQ_END if ends else b"")
            data.write(block)
            content.update(block)
            total += len(block)
            if ends:
                offsets.write(struct.pack("<q", total))
                documents += 1
            inside = not ends
            bar.update(len(piece))
        if documents == 0:
            raise PicoError(f"{source.label} holds no text")
        bar.update(max(0, (source.size or 0) - bar.n))  # markers were read as well
        for file in (data, offsets):
            file.flush()
            os.fsync(file.fileno())
    meta = {
        "source": source.label,
        "bytes": total,
        "documents": documents,
        "fingerprint": content.hexdigest(),
    }
    with open(folder / "meta.json", "w") as file:
        file.write(json.dumps(meta, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(folder)


@contextlib.contextmanager
def _lock(path: Path, wait: bool = True, progress: bool = False) -> Iterator[None]:
    """Hold the lock of one cache, so that one process builds it and the others wait for that.

    The system frees the lock of a process that dies. With `wait` False, raises OSError where the
    lock is not free. At the end the file is removed, so who gets the lock makes sure that it is
    still the lock of that name.
    """
    if fcntl is None:
        yield
        return
    while True:
        with open(path, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                if progress:
                    print("waiting for another process that builds this cache", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                if not wait:
                    raise
                # a file system without locks: as on Windows, the rename settles the race
            try:
                current = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except FileNotFoundError:
                current = False
            if current:
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):
                        os.unlink(path)
                return


def _remove_dead_builds(root: Path) -> None:
    """Remove the temporary folders whose lock is free: their builders were killed."""
    if fcntl is None:
        return
    for lock in root.glob("*.lock"):
        with contextlib.suppress(OSError), _lock(lock, wait=False):
            for folder in root.glob(f"{lock.stem}.*.tmp"):
                shutil.rmtree(folder, ignore_errors=True)


# Holding out validation data ----------------------------------------------------------------------


def _hold_out(
    label: str, folder: Path, corpus: Corpus, size: float | int | None
) -> tuple[Corpus, Corpus, str]:
    """Cut the end off `corpus`: (train, validation, where validation comes from)."""
    if corpus.documents == 1:
        if isinstance(size, int):
            raise PicoError(
                f"{label} is one document, so validation_size must be a fraction of it, not {size}"
            )
        train, validation = _cut_document(label, folder, corpus, size or _HELD_OUT)
        return train, validation, f"the end of {label}, which is one document"

    if isinstance(size, int):
        if size >= corpus.documents:
            raise PicoError(
                f"validation_size ({size}) leaves nothing to train on: {label} has "
                f"{corpus.documents} documents"
            )
        first = corpus.documents - size
    else:
        # the start of a document that comes nearest to the wanted cut
        wanted = len(corpus.bytes) * (1 - (size or _HELD_OUT))
        first = int(np.searchsorted(corpus.offsets, wanted))
        if wanted - corpus.offsets[first - 1] < corpus.offsets[first] - wanted:
            first -= 1
        first = min(max(first, 1), corpus.documents - 1)
    cut = int(corpus.offsets[first])
    train = Corpus(
        corpus.bytes[:cut],
        corpus.offsets[: first + 1],
        _digest(f"{corpus.fingerprint} to {cut}"),
    )
    validation = Corpus(
        corpus.bytes[cut:],
        corpus.offsets[first:] - cut,
        _digest(f"{corpus.fingerprint} from {cut}"),
    )
    return train, validation, f"the end of {label}"


def _cut_document(
    label: str, folder: Path, corpus: Corpus, fraction: float
) -> tuple[Corpus, Corpus]:
    """Cut a lone document in two that are both wrapped, without another copy on disk.

    The two are private maps of the cached file, in which the tag at the cut is written over the
    other part's text: that changes a page in memory, and never the file.
    """
    length = len(corpus.bytes) - len(SEQ_START) - len(SEQ_END)
    held_out = max(1, round(length * fraction))
    if held_out >= length:
        raise PicoError(f"{label} is too small to hold validation data out: {length} bytes")
    cut = len(SEQ_START) + length - held_out
    try:
        train = np.memmap(folder / "bytes", np.uint8, "c", shape=(cut + len(SEQ_END),))
        validation = np.memmap(folder / "bytes", np.uint8, "c", offset=cut - len(SEQ_START))
    except OSError as error:
        raise PicoError(f"cannot map {folder / 'bytes'}: {_reason(error)}") from error
    train[cut:] = np.frombuffer(SEQ_END, np.uint8)
    validation[: len(SEQ_START)] = np.frombuffer(SEQ_START, np.uint8)
    return (
        _lone_document(train, f"{corpus.fingerprint} to {cut}"),
        _lone_document(validation, f"{corpus.fingerprint} from {cut}"),
    )


def _lone_document(data: np.memmap, identity: str) -> Corpus:
    data.flags.writeable = False
    return Corpus(np.asarray(data), np.array([0, len(data)], np.int64), _digest(identity))


# Windows ------------------------------------------------------------------------------------------


class Windows:
    """Windows of a fixed size over a corpus, shuffled anew each epoch.

    With C = context_len, window i reads C + next_tokens bytes from byte i * C on: its inputs are
    the first C, and target k of position n is byte i * C + n + 1 + k. Only the incomplete window at
    the end is left out. The order is a pure function of (seed, step): nothing needs to be saved to
    resume.
    """

    def __init__(
        self, corpus: Corpus, context_len: int, next_tokens: int, batch_size: int, seed: int
    ) -> None:
        """Raises PicoError on data shorter than one window, or a size or seed out of range."""
        for name, value, least in (
            ("context_len", context_len, 1),
            ("next_tokens", next_tokens, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise PicoError(f"{name} must be at least {least}, not {value}")
        size = batch_size * (context_len + next_tokens)
        if size > MOST_BYTES:
            raise PicoError(
                f"a step of {batch_size} windows of context_len {context_len} is {size:,} bytes; "
                f"more than {MOST_BYTES:,} are taken for a mistake"
            )
        total = len(corpus.bytes)
        if total < context_len + next_tokens:
            fits = total - next_tokens
            way_out = f"a context_len of at most {fits} would fit" if fits > 0 else "use more data"
            raise PicoError(
                f"the data has {total} bytes, fewer than one window of context_len + next_tokens = "
                f"{context_len} + {next_tokens} bytes; {way_out}"
            )
        self.context_len = context_len
        self.next_tokens = next_tokens
        self.batch_size = batch_size
        self.seed = seed
        self._bytes = corpus.bytes
        self._count = (total - next_tokens) // context_len
        self._shuffled: tuple[int, np.ndarray] | None = None  # the latest epoch and its order

    def __len__(self) -> int:
        """How many windows there are."""
        return self._count

    def batch(self, step: int) -> np.ndarray:
        """The batch of a step, counted from 0: uint8 [batch_size, C + next_tokens], a new array."""
        return self.batch_at(step * self.batch_size)

    def batch_at(self, position: int) -> np.ndarray:
        """The batch after `position` windows; batches run across the ends of epochs."""
        batch = np.empty((self.batch_size, self.context_len + self.next_tokens), np.uint8)
        for row in range(self.batch_size):
            epoch, place = divmod(position + row, len(self))
            batch[row] = self._window(int(self._order(epoch)[place]))
        return batch

    def _window(self, i: int) -> np.ndarray:
        start = i * self.context_len
        return self._bytes[start : start + self.context_len + self.next_tokens]

    def _order(self, epoch: int) -> np.ndarray:
        """The windows of an epoch in the order of training: uint32, or int64, [windows]."""
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = None  # makes room for the next one
            # the order is that of `permutation(len(self))`, in half the memory
            order = np.arange(len(self), dtype=np.uint32 if len(self) <= 1 << 32 else np.int64)
            np.random.default_rng((self.seed, epoch)).shuffle(order)
            self._shuffled = (epoch, order)
        return self._shuffled[1]
