"""The cache: a source is streamed once into PICO_CACHE/<key>/{bytes, offsets, meta.json}.

A corpus is a view of the memory-mapped cache. A cache is built in a temporary folder that is then
renamed, so a cache is complete or absent; temporary folders of killed processes are removed.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from ..files import PicoError, fsync_folder
from ..progress import Bar, say
from .formats import reason
from .sources import Source

SEQ_START: bytes = b"<pico:seq>"
SEQ_END: bytes = b"</pico:seq>"

CACHE_FORMAT = 2  # part of every cache's key: to be increased when the files or readers change


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents, each wrapped in `<pico:seq>` and `</pico:seq>`, back to back.

    - bytes: uint8 [total], read-only, a view of a memory-mapped file
    - offsets: int64 [documents + 1], where each document starts in `bytes`, and the total
    - fingerprint: a hash of the content; the same text has the same one on any machine
    - remarks: what the user should know about the files that were read
    """

    bytes: np.ndarray
    offsets: np.ndarray
    fingerprint: str
    remarks: tuple[str, ...] = ()

    @property
    def documents(self) -> int:
        """The number of documents."""
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


def cache_folder(source: Source) -> Path:
    """Where the corpus of `source` is cached, or would be."""
    return cache_root() / digest(json.dumps([CACHE_FORMAT, *source.identity]))


def cached(source: Source, progress: bool) -> tuple[Path, Corpus]:
    """The folder of `source` in the cache and its corpus; builds the cache if it is missing."""
    folder = cache_folder(source)
    corpus = open_cache(folder)
    if corpus is not None:
        return folder, corpus
    with writing_cache():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead_builds(folder.parent)
        with _lock(folder.with_suffix(".lock"), progress):
            if open_cache(folder) is None:  # not built while this process waited
                _build(source, folder, progress)
    corpus = open_cache(folder)
    if corpus is None:
        raise PicoError(f"the cache {folder} was removed while it was opened; run it again")
    return folder, corpus


@contextlib.contextmanager
def writing_cache() -> Iterator[None]:
    """Raise an OSError as a PicoError that names the cache and the way out."""
    try:
        yield
    except OSError as error:
        raise PicoError(
            f"cannot write the cache in {cache_root()}: {reason(error)}; "
            "make room there or set PICO_CACHE to another folder"
        ) from error


def open_cache(folder: Path) -> Corpus | None:
    """The corpus in `folder`; None if there is no corpus or if its sizes are inconsistent."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        data = np.memmap(folder / "bytes", np.uint8, "r")
        offsets = np.memmap(folder / "offsets", "<i8", "r")
        sizes = (len(data), len(offsets) - 1, int(offsets[0]), int(offsets[-1]))
        if sizes != (meta["bytes"], meta["documents"], 0, len(data)):
            return None
        return Corpus(
            np.asarray(data), np.asarray(offsets), meta["fingerprint"], tuple(meta["remarks"])
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _build(source: Source, folder: Path, progress: bool) -> None:
    temporary = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        _write(source, temporary, progress)
        if open_cache(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)  # a damaged cache, if any
            try:
                os.rename(temporary, folder)
            except OSError:
                if open_cache(folder) is None:  # else another process built the same cache first
                    raise
            fsync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(source: Source, folder: Path, progress: bool) -> None:
    """Stream `source` into the files of a cache and fsync them."""
    total = documents = 0
    in_document = False
    remarks: list[str] = []
    content = hashlib.blake2b(digest_size=16)
    with (
        open(folder / "bytes", "wb") as data,
        open(folder / "offsets", "wb") as offsets,
        Bar(
            total=source.size,
            desc=f"caching {source.label}",
            unit="B",
            unit_scale=True,
            disable=not progress,
        ) as bar,
    ):
        offsets.write(struct.pack("<q", 0))
        for piece, ends in source.read(remarks.append):
            block = (b"" if in_document else SEQ_START) + piece + (SEQ_END if ends else b"")
            data.write(block)
            content.update(block)
            total += len(block)
            if ends:
                offsets.write(struct.pack("<q", total))
                documents += 1
            in_document = not ends
            bar.update(len(piece))
        if documents == 0:
            raise PicoError(f"{source.label} holds no text")
        bar.update(max(0, (source.size or 0) - bar.n))  # the pieces do not include the markers
        for file in (data, offsets):
            file.flush()
            os.fsync(file.fileno())
    meta = {
        "source": source.label,
        "bytes": total,
        "documents": documents,
        "fingerprint": content.hexdigest(),
        "remarks": remarks,
    }
    with open(folder / "meta.json", "w") as file:
        file.write(json.dumps(meta, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(folder)


@contextlib.contextmanager
def _lock(path: Path, progress: bool) -> Iterator[None]:
    """Hold the lock of one cache, so that one process builds it and the others wait.

    The system frees the lock of a process that dies. On a file system without locks, two processes
    may build the same cache, and the first to rename its folder wins.
    """
    lock = FileLock(path)
    with contextlib.suppress(OSError, NotImplementedError):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if progress:
                say("waiting for another process that builds this cache")
            lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def _remove_dead_builds(root: Path) -> None:
    """Remove the temporary folders whose lock is free: their builders were killed."""
    for path in root.glob("*.lock"):
        lock = FileLock(path)
        with contextlib.suppress(OSError, NotImplementedError, Timeout):
            lock.acquire(timeout=0)
            for folder in root.glob(f"{path.stem}.*.tmp"):
                shutil.rmtree(folder, ignore_errors=True)
            path.unlink()
            lock.release()
