"""tinygrad's cache file: every thread may use it, and a failure of it is one warning."""

import os
import resource
import sqlite3
import threading
from pathlib import Path

import pytest
from helpers import run_script
from tinygrad import helpers
from tinygrad.helpers import CACHELEVEL

from pico_tg.backend import cache_file


@pytest.fixture
def use(monkeypatch):
    """A function that makes a path the cache file of this process."""

    def use(path) -> None:
        monkeypatch.setattr(helpers, "CACHEDB", str(path))
        monkeypatch.setattr(helpers, "_db_connection", None)
        monkeypatch.setattr(helpers, "_db_tables", set())
        monkeypatch.setattr(CACHELEVEL, "value", 2)
        cache_file.share_cache_file()

    return use


def put_and_get(key: str = "a", value: object = b"binary") -> object:
    """As tinygrad does for a kernel: what it gets back."""
    helpers.diskcache_put("compiled", key, value)
    return helpers.diskcache_get("compiled", key)


def test_threads_share_the_file(use, tmp_path):
    use(tmp_path / "new" / "cache.db")
    assert helpers.diskcache_get("compiled", "a") is None  # no such table
    assert put_and_get() == b"binary"
    found = []

    def work(name: str) -> None:
        for i in range(20):
            found.append((helpers.diskcache_get("compiled", "a"), put_and_get(f"{name}{i}")))

    threads = [threading.Thread(target=work, args=(name,)) for name in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(b"binary", b"binary")] * 60
    assert helpers.diskcache_get("compiled", "z19") == b"binary"


def test_a_file_name_without_a_folder(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use("cache.db")
    assert put_and_get() == b"binary"
    assert (tmp_path / "cache.db").is_file()


def test_a_damaged_value_is_missing(use, tmp_path, capsys):
    use(tmp_path / "cache.db")
    put_and_get()
    with sqlite3.connect(tmp_path / "cache.db") as file:
        file.execute(f"UPDATE compiled_{helpers.VERSION} SET val = 'x'")
    assert helpers.diskcache_get("compiled", "a") is None
    assert put_and_get() == b"binary"
    assert capsys.readouterr().err == ""


def test_a_file_above_the_limit_is_emptied(use, tmp_path, capsys, monkeypatch):
    """When it is opened; another process that holds it open goes on with it."""
    monkeypatch.setattr(cache_file, "LIMIT", 200_000)
    path = tmp_path / "cache.db"
    use(path)
    put_and_get(value=os.urandom(150_000))
    use(path)
    assert helpers.diskcache_get("compiled", "a") is not None  # below the limit
    put_and_get("b", os.urandom(150_000))
    other = helpers._db_connection
    use(path)
    assert "emptied the kernel cache" in capsys.readouterr().err
    assert helpers.diskcache_get("compiled", "a") is None
    helpers._db_connection = other
    assert put_and_get("c") == b"binary"
    use(path)
    assert helpers.diskcache_get("compiled", "c") == b"binary"
    assert path.stat().st_size < 50_000
    assert capsys.readouterr().err == ""


def prepare(kind: str, path: Path) -> Path:
    """The path of a cache file that cannot be used."""
    if kind == "no folder":
        path.write_text("a file")
        return path / "cache.db"
    if kind == "no home":
        return path.parent / "~" / "cache.db"
    if kind == "read-only":  # SQLite's own way, which also refuses root
        with sqlite3.connect(path) as file:
            file.execute("CREATE TABLE x (y)")
        return path
    if kind == "damaged":
        path.write_bytes(os.urandom(5000))
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["no folder", "no home", "read-only", "damaged", "a folder"])
def test_an_unusable_file_is_one_warning(kind, use, tmp_path, capsys, monkeypatch):
    path = prepare(kind, tmp_path / "cache.db")
    if kind == "read-only":
        connect = sqlite3.connect
        monkeypatch.setattr(
            sqlite3,
            "connect",
            lambda path, **options: connect(f"file:{path}?mode=ro", uri=True, **options),
        )
    if kind == "no home":
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    use(path)
    for key in "ab":
        assert put_and_get(key) is None
        assert helpers.diskcache_put("compiled", key, 3) == 3
    assert_one_warning(capsys.readouterr().err, path)
    assert not (tmp_path / "~").exists()


@pytest.mark.skipif(os.name != "posix", reason="sets a limit on the size of files")
def test_a_disk_that_fills_is_one_warning(use, tmp_path, capsys):
    use(tmp_path / "cache.db")
    assert put_and_get() == b"binary"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for key in "bc":
            assert put_and_get(key, b"x" * 1_000_000) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_warning(capsys.readouterr().err, tmp_path / "cache.db")


def assert_one_warning(err: str, path: Path) -> None:
    assert len(err.splitlines()) == 1, err
    assert err.startswith("pico_tg: warning:")
    for word in (str(path), "CACHEDB", "CACHELEVEL=0"):
        assert word in err


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "enabled"])
def test_a_model_serves_from_another_thread(mode, tmp_path):
    """Loaded in the main thread; with a cold cache, a warm one, and one that cannot be used."""

    def serve(path: Path) -> tuple[str, str]:
        done = run_script("serve.py", mode, CACHEDB=str(path))
        return done.stdout, done.stderr

    cold = serve(tmp_path / "cache.db")
    assert cold[1] == ""
    assert serve(tmp_path / "cache.db") == cold
    out, err = serve(prepare("damaged", tmp_path / "damaged.db"))
    assert out == cold[0]
    assert_one_warning(err, tmp_path / "damaged.db")
