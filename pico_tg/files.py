"""Files that are complete or not there, and the one error that a user is meant to read."""

import contextlib
import errno
import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


class PicoError(Exception):
    """Something the user can mend: one line that names the thing and the way out.

    The command line prints it on stderr and exits with status 2; a script may catch it.
    """


def command(*words: object) -> str:
    """A pico_tg command for a message, quoted so that a shell takes it as it is."""
    return f"python -m pico_tg {shlex.join(map(str, words))}"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing bytes; on a clean exit it becomes `path`.

    The data is on disk (fsync) before the rename, and the rename before the return, so a crash at
    any moment leaves the old file or the new one. On an exception the temporary file is removed and
    `path` is untouched. A link stays one: what it points to is written. An OSError (disk full,
    read-only folder) is raised as PicoError, and so is a `path` that is there and no file.
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
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        fsync_folder(path.parent)
    except OSError as error:
        raise PicoError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def check_writable(path: str | os.PathLike) -> None:
    """Raise PicoError unless `atomic_write` could write `path` now: before work that it is to keep.

    What exists under that name must be a file, which would be replaced.
    """
    path = _target(path)
    if not path.parent.is_dir():
        raise PicoError(f"cannot write {path}: there is no folder {path.parent}")
    try:
        tempfile.TemporaryFile(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent).close()
    except OSError as error:
        raise PicoError(f"cannot write {path}: {error.strerror or error}") from error


def _target(path: str | os.PathLike) -> Path:
    """Where links lead; whatever is there must be a file: a device or a pipe is not replaced."""
    path = Path(os.path.realpath(path))
    # these two do not raise: a name that cannot be looked up fails where it is written
    if os.path.lexists(path) and not os.path.isfile(path):  # a loop of links is a link still
        raise PicoError(f"cannot write {path}: there is something else of that name, not a file")
    return path


def fsync_folder(folder: str | os.PathLike) -> None:
    """Make the names in `folder` durable: until then, a rename may be in memory only.

    File systems that cannot do that for folders (CIFS, VirtualBox, some FUSE) answer EINVAL or
    ENOTSUP; the file is then as durable as they make it. Raises OSError for anything else.
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
