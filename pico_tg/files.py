"""Atomic and durable writes, and PicoError, the exception for errors that a user can fix."""

import contextlib
import difflib
import errno
import os
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


class PicoError(Exception):
    """An error that the user can fix: one line that names the cause and a remedy.

    The command line prints it on stderr and exits with status 2; a script may catch it.
    """


def command(*words: object) -> str:
    """A pico_tg command for a message, quoted for the shell."""
    return f"python -m pico_tg {shlex.join(map(str, words))}"


def did_you_mean(name: str, known: Iterable[str], folder: Path | None = None) -> str:
    """The text " (did you mean X?)", X the most similar known name; "" if none is similar.

    folder: precedes X if the names are those of files in it
    """
    near = difflib.get_close_matches(name, list(known), 1, cutoff=0.65)
    return f" (did you mean {folder / near[0] if folder else near[0]}?)" if near else ""


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The changed values of keys that both have, in words: "dim was 24, now 48, router was …"."""
    both = [(name, before[name], now[name]) for name in now if name in before]
    return ", ".join(f"{name} was {old}, now {new}" for name, old, new in both if old != new)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing bytes; on a clean exit it becomes `path`.

    The data is on disk (fsync) before the rename, and the rename before the return, so a crash at
    any moment leaves the old file or the new one. On an exception the temporary file is removed and
    `path` is untouched. If `path` is a link, the target of the link is written. Raises PicoError
    for an OSError (disk full, read-only folder) and if `path` exists and is not a regular file.
    """
    path = _target(path)
    temporary = None
    try:
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a model is meant to be shared like any other file
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
        temporary = None
        fsync_folder(path.parent)
    except OSError as error:
        raise PicoError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _target(path: str | os.PathLike) -> Path:
    """`path` with links resolved. Raises PicoError if it has no folder, or is no regular file."""
    path = Path(os.path.realpath(path))
    # these functions do not raise; lexists is also true for a cycle of links
    if os.path.lexists(path) and not os.path.isfile(path):
        raise PicoError(f"cannot write {path}: it exists and is not a file")
    if not os.path.isdir(path.parent):
        raise PicoError(f"cannot write {path}: there is no folder {path.parent}")
    return path


def fsync_folder(folder: str | os.PathLike) -> None:
    """Make the names in `folder` durable: before, a rename may be in memory only.

    File systems that cannot fsync a folder (CIFS, VirtualBox, some FUSE) return EINVAL or ENOTSUP,
    which is ignored. Raises OSError for anything else.
    """
    if os.name != "posix":  # Windows cannot open a folder
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(fd)
