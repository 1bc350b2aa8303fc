"""Makes tinygrad's cache file usable from every thread, and its errors warnings.

tinygrad 0.13 caches compiled kernels in one SQLite file, CACHEDB, through one connection per
process, which only the thread that opened it may use. Every error of that connection ends the
program: a read-only home, a full disk, a damaged file, a second thread. `share_cache_file` replaces
tinygrad's connection by an object without these defects. Tests: test_cache_file.py.
"""

import contextlib
import os
import pickle
import sqlite3
import sys
import threading

from tinygrad import helpers
from tinygrad.helpers import CACHELEVEL


def share_cache_file() -> None:
    """Give every thread its own connection, and turn the first failure into a warning."""
    if not isinstance(helpers._db_connection, _CacheFile):
        helpers._db_connection = _CacheFile()


def contains(table: str, key: str) -> bool:
    """Whether `table` has a value for `key`. All three functions need `share_cache_file` first."""
    return _select("1", table, key) is not None


def read(table: str, key: str) -> bytes | None:
    """The value of `key`; None if there is none."""
    row = _select("val", table, key)
    return row[0] if row else None


def write(table: str, key: str, value: bytes) -> None:
    """Store `value` for `key`."""
    if CACHELEVEL >= 1:
        cursor = helpers.db_connection().cursor()
        cursor.execute(f"CREATE TABLE IF NOT EXISTS {table} (key text PRIMARY KEY, val blob)")
        cursor.execute(f"REPLACE INTO {table} VALUES (?, ?)", (key, value))


def _select(column: str, table: str, key: str) -> tuple | None:
    if CACHELEVEL < 1:
        return None
    cursor = helpers.db_connection().cursor()
    try:
        cursor.execute(f"SELECT {column} FROM {table} WHERE key = ?", (key,))
    except sqlite3.OperationalError:  # no such table
        return None
    return cursor.fetchrow()


class _CacheFile:
    """The part of a SQLite connection that tinygrad uses: `cursor()` and `commit()`."""

    def __init__(self) -> None:
        self._local = threading.local()

    def cursor(self) -> "_Cursor":
        if not hasattr(self._local, "connection"):
            self._local.connection = _connect()
        return self._local.connection.cursor(_Cursor)

    def commit(self) -> None:
        """Do nothing: each statement is its own transaction (isolation_level=None)."""


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

    def fetchrow(self) -> tuple | None:
        try:
            return super().fetchone()
        except sqlite3.Error as error:
            _switch_off(error)
            return None

    def fetchone(self) -> tuple | None:
        """For tinygrad, which cannot handle damaged values: return None for a damaged value."""
        row = self.fetchrow()
        try:
            return row and (pickle.loads(row[0]), row)[1]
        except Exception:  # unpickling a damaged value may raise any exception
            return None


def _path() -> str:
    return os.path.abspath(helpers.CACHEDB)


def _connect() -> sqlite3.Connection:
    try:
        if os.path.expanduser("~") == "~" and f"{os.sep}~{os.sep}" in _path():
            raise OSError("this user has no home folder")  # instead of making a folder named ~
        os.makedirs(os.path.dirname(_path()), exist_ok=True)
        connection = sqlite3.connect(_path(), timeout=60, isolation_level=None)
        # readers then do not wait for a writer; fails while another connection sets WAL, too
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode=WAL").fetchone()
        return connection
    except (sqlite3.Error, OSError) as error:
        _switch_off(error)
        return sqlite3.connect(":memory:", isolation_level=None)


def _switch_off(error: Exception) -> None:
    """Switch the cache off, with a warning."""
    if CACHELEVEL >= 1:
        CACHELEVEL.value = 0
        reason = getattr(error, "strerror", None) or error
        if sys.stderr:
            print(
                f"pico_tg: warning: going on without a kernel cache: {_path()}: {reason}; "
                "set CACHEDB to a file that can be written (delete a damaged one), or CACHELEVEL=0",
                file=sys.stderr,
                flush=True,
            )
