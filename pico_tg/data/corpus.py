"""A corpus: the documents of a source as one memory-mapped array of bytes, cached on disk.

A source is read once, into PICO_CACHE/<key>/{bytes, offsets, meta.json}. The files are written in a
temporary folder that is then renamed, so a cache is complete or absent. Two processes may build the
same cache at once; the first to rename its folder wins.
"""

import contextlib
import hashlib
import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..files import PicoError, fsync_folder
from ..progress import Bar
from .formats import MissingColumn, Pieces, Remark, read_file, reason

SEQ_START: bytes = b"<pico:seq>"
SEQ_END: bytes = b"</pico:seq>"

CACHE_FORMAT = 4  # part of every cache's key: to be increased when the files or readers change
ROOM = "make room there or set PICO_CACHE to another folder"
BUILD_SECONDS = 24 * 3600  # a temporary folder that is not written for so long is left over


@dataclass(frozen=True)
class File:
    """One file of a data set.

    - name: its path within the data set, which determines the split
    - path: where it is
    - key: equal for two names of the same file, links included
    """

    name: str
    path: Path
    key: object


@dataclass(frozen=True)
class Source:
    """Files whose documents make a corpus, in this order.

    - label: for messages
    - column: the column of text; None for `text` or `bytes`
    """

    label: str
    files: tuple[File, ...]
    column: str | None

    def without(self, files: Iterable[File]) -> "Source":
        """This source without `files`."""
        keys = {file.key for file in files}
        return replace(self, files=tuple(file for file in self.files if file.key not in keys))

    def identity(self) -> list:
        """JSON that changes whenever the text may have: the key of the cache.

        The time of change and the inode tell a file that replaced another one of the same size and
        time; the inode also where both files were made within one tick of the clock.
        """
        stats = [(os.path.abspath(file.path), os.stat(file.path)) for file in self.files]
        stamps = [[path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for path, s in stats]
        return [self.column, stamps]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents, each wrapped in `<pico:seq>` and `</pico:seq>`, back to back.

    - bytes: uint8 [total], read-only, a view of a memory-mapped file
    - offsets: int64 [documents + 1], where each document starts in `bytes`, and the total
    - fingerprint: a hash of the content; the same text has the same one on any machine
    - remarks: what the user should know about the files that were read
    - files: the name of each file that holds documents, and how many
    """

    bytes: np.ndarray
    offsets: np.ndarray
    fingerprint: str
    remarks: tuple[str, ...] = ()
    files: tuple[tuple[str, int], ...] = ()

    @property
    def documents(self) -> int:
        """The number of documents."""
        return len(self.offsets) - 1

    def wrapper_mask(self, count: int) -> np.ndarray:
        """Which of the first `count` bytes are part of a wrapper tag: bool [count].

        Text that merely looks like a tag is not one.
        """
        last = np.searchsorted(self.offsets, count, "left")  # the first document not read
        begins = self.offsets[:last, None] + np.arange(len(SEQ_START))
        ends = self.offsets[1 : last + 1, None] - 1 - np.arange(len(SEQ_END))
        tags = np.concatenate([begins.ravel(), ends.ravel()])
        mask = np.zeros(count, dtype=bool)
        mask[tags[tags < count]] = True
        return mask


def digest(text: str) -> str:
    """A short hash, for names of files and for fingerprints."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def cache_root() -> Path:
    """PICO_CACHE, or ~/.cache/pico_tg; a user without a home gets one in the temporary folder."""
    root = os.path.expanduser(os.environ.get("PICO_CACHE") or "~/.cache/pico_tg")
    if not root.startswith("~"):
        return Path(root)
    if os.environ.get("PICO_CACHE"):
        raise PicoError(f"there is no home folder for PICO_CACHE={root}; write the path out")
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"pico_tg-{user}"


@contextlib.contextmanager
def writing_cache() -> Iterator[None]:
    """Raise an OSError as a PicoError that names the cache and the way out."""
    try:
        yield
    except OSError as error:
        raise PicoError(
            f"cannot write the cache in {cache_root()}: {reason(error)}; {ROOM}"
        ) from error


def cached(source: Source, progress: bool) -> tuple[Path, Corpus]:
    """The folder of `source` in the cache and its corpus; builds the cache if it is missing.

    progress: show a bar on stderr. Raises PicoError on what cannot be read or written.
    """
    folder = cache_root() / digest(json.dumps([CACHE_FORMAT, *source.identity()]))
    corpus = _open(folder, source)
    if corpus is None:
        with writing_cache():
            folder.parent.mkdir(parents=True, exist_ok=True)
            _build(source, folder, progress)
        corpus = _open(folder, source)
    if corpus is None:
        raise PicoError(f"the cache {folder} was removed while it was opened; run it again")
    return folder, corpus


def _open(folder: Path, source: Source) -> Corpus | None:
    """The corpus in `folder`; None if there is no corpus or if its sizes are inconsistent."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        data = np.memmap(folder / "bytes", np.uint8, "r")
        offsets = np.memmap(folder / "offsets", "<i8", "r")
        sizes = (len(data), len(offsets) - 1, int(offsets[0]), int(offsets[-1]))
        if sizes != (meta["bytes"], meta["documents"], 0, len(data)):
            return None
        counts = zip(source.files, meta["documents_of_files"], strict=True)
        files = tuple((file.name, count) for file, count in counts if count)
        remarks, fingerprint = tuple(meta["remarks"]), meta["fingerprint"]
        return Corpus(np.asarray(data), np.asarray(offsets), fingerprint, remarks, files)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _build(source: Source, folder: Path, progress: bool) -> None:
    for old in folder.parent.glob("*.tmp"):  # of killed processes
        with contextlib.suppress(OSError):
            if (old / "bytes").stat().st_mtime < time.time() - BUILD_SECONDS:
                shutil.rmtree(old)
    temporary = Path(tempfile.mkdtemp(".tmp", f"{folder.name}.", folder.parent))
    try:
        _write(source, temporary, progress)
        if _open(folder, source) is None:
            shutil.rmtree(folder, ignore_errors=True)  # a damaged cache, if any
            try:
                os.rename(temporary, folder)
            except OSError:
                if _open(folder, source) is None:  # else another process was first
                    raise
            fsync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(source: Source, folder: Path, progress: bool) -> None:
    """Stream `source` into the files of a cache and fsync them."""
    total, counts = 0, []
    remarks, missing = [], []
    tagged = 0  # documents whose text holds a tag
    blank = True
    content = hashlib.blake2b(digest_size=16)
    small = sum(os.stat(file.path).st_size for file in source.files) < 10_000  # read at once
    shown = {"unit": "B", "unit_scale": True, "disable": not progress or small}
    with (
        Bar(desc=f"caching {source.label}", **shown) as bar,
        open(folder / "bytes", "wb") as data,
        open(folder / "offsets", "wb") as offsets,
    ):
        offsets.write(struct.pack("<q", 0))
        for file in source.files:
            in_document, count, text, has_tag = False, 0, b"", False
            try:
                for piece, ends in _read(source, file, remarks.append):
                    block = (b"" if in_document else SEQ_START) + piece + (SEQ_END if ends else b"")
                    data.write(block)
                    content.update(block)
                    total += len(block)
                    blank = blank and not piece.strip()
                    text = text[-len(SEQ_END) :] + piece  # a tag may lie in two pieces
                    has_tag = has_tag or SEQ_START in text or SEQ_END in text
                    if ends:
                        offsets.write(struct.pack("<q", total))
                        count += 1
                        tagged += has_tag
                        text, has_tag = b"", False
                    in_document = not ends
                    bar.update(len(piece))
            except MissingColumn as error:
                missing.append(error)
                remarks.append(f"left out: {error}")
            counts.append(count)
        if len(missing) == len(source.files):
            raise PicoError(f"{missing[0]}; name one by column_name")
        if blank:
            raise PicoError(f"{source.label} holds no text")
        if tagged:
            remarks.append(
                f"documents of {source.label} that hold {SEQ_START.decode()} or "
                f"{SEQ_END.decode()} as text: {tagged:,}; for the model these are the tags that "
                "begin and end a document"
            )
        for file in (data, offsets):
            file.flush()
            os.fsync(file.fileno())
    meta = {
        "bytes": total,
        "documents": sum(counts),
        "documents_of_files": counts,
        "fingerprint": content.hexdigest(),
        "remarks": remarks,
    }
    with open(folder / "meta.json", "w") as file:
        file.write(json.dumps(meta, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(folder)


def _read(source: Source, file: File, remark: Remark) -> Pieces:
    name = source.label if len(source.files) == 1 else f"{file.name} in {source.label}"
    try:
        yield from read_file(file.path, name, source.column, remark)
    except PicoError:
        raise
    except Exception as error:  # also the types of pyarrow and zlib
        raise PicoError(f"cannot read {name}: {reason(error)}") from error
