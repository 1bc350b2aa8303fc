"""Makes tinygrad's cache file usable from every thread, and turns its errors into warnings.

tinygrad 0.13 caches compiled kernels in one SQLite file, CACHEDB, through one connection that only
the thread that opened it may use. Every error of that connection ends the program: a read-only
home, a full disk, a damaged file, a second thread. `share_cache_file` opens the connection in place
of tinygrad, without these defects. Tests: test_cache_file.py.
"""

import contextlib
import os
import pickle
import sqlite3

from tinygrad import helpers
from tinygrad.helpers import CACHELEVEL

from ..progress import say

LIMIT = 1 << 30  # bytes of entries; a file that holds more is emptied when it is opened


def share_cache_file() -> None:
    """Open the cache file, once, and turn its first failure into a warning."""
    if not isinstance(helpers._db_connection, _Connection):
        helpers._db_connection = _open()


def cache_file() -> dict[str, str | int]:
    """Path of the cache file and its size in bytes; 0 if there is none yet."""
    path = os.path.abspath(helpers.CACHEDB)
    return {"file": path, "bytes": os.path.getsize(path) if os.path.exists(path) else 0}


class _Connection(sqlite3.Connection):
    def cursor(self) -> "_Cursor":
        return super().cursor(_Cursor)


class _Cursor(sqlite3.Cursor):
    def execute(self, sql: str, parameters: tuple = ()) -> "_Cursor":
        try:
            super().execute(sql, parameters)
        except sqlite3.Error as error:
            # tinygrad treats this error of a SELECT as "not in the cache"
            if sql.startswith("SELECT") and "no such table" in str(error):
                raise
            _switch_off(error)
        return self

    def fetchone(self) -> tuple | None:
        """A row; None if its value is damaged, which tinygrad could not handle."""
        try:
            row = super().fetchone()
            if row is not None:
                pickle.loads(row[0])
            return row
        except sqlite3.Error as error:
            _switch_off(error)
        except Exception:  # unpickling a damaged value may raise any exception
            pass
        return None


def _open() -> _Connection:
    path = os.path.abspath(helpers.CACHEDB)
    # each statement is its own transaction, so that no thread commits another's
    options = {"isolation_level": None, "check_same_thread": False, "factory": _Connection}
    try:
        if os.path.expanduser("~") == "~" and f"{os.sep}~{os.sep}" in path:
            raise OSError("this user has no home folder")  # instead of making a folder named ~
        os.makedirs(os.path.dirname(path), exist_ok=True)
        connection = sqlite3.connect(path, timeout=60, **options)
        # readers then do not wait for a writer; fails while another connection sets WAL, too
        with contextlib.suppress(sqlite3.OperationalError):
            if connection.execute("PRAGMA journal_mode=WAL").fetchall() == [("wal",)]:
                # no fsync for each entry: with WAL a crash of the system loses only the last ones
                connection.execute("PRAGMA synchronous=NORMAL")
        _limit_size(connection)
        return connection
    except (sqlite3.Error, OSError) as error:
        _switch_off(error)
        return sqlite3.connect(":memory:", **options)


def _limit_size(connection: _Connection) -> None:
    """Delete all entries of a file that holds more than LIMIT bytes.

    Nothing says which entries are old. Other processes may use the file meanwhile: to them the
    entries are missing, and if they delay VACUUM, the free space is reused instead.
    """
    pages, free, size = (
        connection.execute(f"PRAGMA {name}").fetchall()[0][0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    if (pages - free) * size <= LIMIT:
        return
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    for (name,) in tables:
        connection.execute(f"DELETE FROM '{name}'")
    with contextlib.suppress(sqlite3.OperationalError):
        connection.execute("VACUUM")
    say(f"pico_tg: emptied the kernel cache, which held more than {LIMIT / 1e9:.1f} GB")


def _switch_off(error: Exception) -> None:
    """Switch the cache off, with a warning."""
    if CACHELEVEL >= 1:
        CACHELEVEL.value = 0
        path, reason = os.path.abspath(helpers.CACHEDB), getattr(error, "strerror", None) or error
        say(
            f"pico_tg: warning: going on without a kernel cache: {path}: {reason}; set CACHEDB to "
            "a file that can be written (delete a damaged one), or CACHELEVEL=0"
        )
