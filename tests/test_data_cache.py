"""data/cache.py: the cache under attack, by users, disks and other processes."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import all_documents, check_error, load

from pico_tg.data import SEQ_END, SEQ_START, DataSpec, load_data
from pico_tg.data import cache as data_cache
from pico_tg.files import PicoError

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture
def built(monkeypatch):
    """The labels of the caches that were built."""
    labels = []
    write = data_cache._write

    def counting(source, *rest):
        labels.append(source.label)
        write(source, *rest)

    monkeypatch.setattr(data_cache, "_write", counting)
    return labels


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(f"document {i}" for i in range(1000)))
    return path


def test_cache_is_reused_until_the_file_changes(text, built):
    first = load(text)
    again = load(text)
    assert len(built) == 1
    assert again.train.fingerprint == first.train.fingerprint
    assert load(text, validation_size=10).validation.documents == 10
    assert len(built) == 1  # holding out is a view, so its size does not matter
    text.write_text(text.read_text().replace("7", "8"))  # as long as before
    os.utime(text, ns=(0, 0))
    assert b"7" not in load(text).train.bytes.tobytes()
    assert len(built) == 2


@pytest.mark.parametrize("name", ["bytes", "offsets", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed", "longer"])
def test_damaged_cache_is_rebuilt(text, cache, built, name, damage):
    expected = all_documents(load(text))
    (folder,) = cache.iterdir()
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage != "removed":
        changed = {"truncated": content[:-8], "emptied": b"", "longer": content + b"8 bytes."}
        (folder / name).write_bytes(changed[damage])
    assert all_documents(load(text)) == expected
    assert len(built) == 2
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_full_disk(text, cache):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        check_error(cache, f"cannot write the cache in {cache}: .*set PICO_CACHE", text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load(text).train.documents


def test_cache_in_an_impossible_place(text, tmp_path, monkeypatch):
    monkeypatch.setenv("PICO_CACHE", str(text))
    with pytest.raises(
        PicoError, match=r"cannot write the cache in .*: (File exists|Not a directory)"
    ):
        load(text)


def start_builder(text):
    return subprocess.Popen(
        [sys.executable, SCRIPTS / "slow_builder.py", text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_builders_at_once(text, cache, built):
    first = start_builder(text)
    assert first.stdout.readline() == "building\n"
    second = start_builder(text)
    # what the second one writes on stderr is unbuffered, so this returns as soon as it waits
    assert "waiting for another process" in second.stderr.readline()
    fingerprint = first.communicate("\n", timeout=600)[0].strip()
    assert first.returncode == 0
    # the second one has nothing left to build: it prints no "building" and asks for no line
    assert second.communicate(timeout=600)[0].strip() == fingerprint
    assert second.returncode == 0
    assert load(text).train.fingerprint == fingerprint
    assert built == []
    assert len(list(cache.iterdir())) == 1


def test_builders_without_locks(text, cache, monkeypatch):
    """Where there are no locks, the one who comes second takes what is there."""

    def refuse(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(data_cache.FileLock, "acquire", refuse)
    write = data_cache._write
    winner = []

    def beaten(source, *rest):
        write(source, *rest)
        if not winner:
            winner.append(None)
            winner[0] = load(text)  # another one starts later and is done sooner

    monkeypatch.setattr(data_cache, "_write", beaten)
    loaded = load(text)
    assert len(list(cache.iterdir())) == 1
    assert loaded.train.fingerprint == winner[0].train.fingerprint
    assert all_documents(loaded) == all_documents(winner[0])


def test_killed_builder(text, cache, tmp_path):
    builder = start_builder(text)
    assert builder.stdout.readline() == "building\n"
    builder.kill()
    builder.communicate()
    assert len(list(cache.glob("*.tmp"))) == 1
    other = tmp_path / "other.txt"
    other.write_text("a<|endoftext|>b")
    load(other)  # whoever builds next cleans up, whatever it builds
    assert len(list(cache.iterdir())) == 1
    assert len(all_documents(load(text))) == 1000
    assert len(list(cache.iterdir())) == 2


def test_live_builder_is_left_alone(text, cache, tmp_path):
    builder = start_builder(text)
    assert builder.stdout.readline() == "building\n"
    other = tmp_path / "other.txt"
    other.write_text("a<|endoftext|>b")
    load(other)
    assert len(list(cache.glob("*.tmp"))) == 1
    builder.communicate("\n", timeout=600)
    assert builder.returncode == 0
    assert len(list(cache.iterdir())) == 2


def test_wrapper_mask(tmp_path):
    texts = ["a", "no <pico:seq> tag </pico:seq>", "bcd", "x" * 50, "held out"]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    corpus = load(tmp_path / "a.txt", validation_size=1).train
    expected = []
    for text in texts[:-1]:
        expected += [True] * len(SEQ_START) + [False] * len(text) + [True] * len(SEQ_END)
    total = len(expected)
    assert corpus.wrapper_mask(0, total).dtype == bool
    for start in range(total + 1):
        for stop in range(start, total + 1, 7):
            assert corpus.wrapper_mask(start, stop).tolist() == expected[start:stop]
    for start, stop in [(-1, 3), (5, 4), (0, total + 1)]:
        with pytest.raises(IndexError):
            corpus.wrapper_mask(start, stop)


def test_progress_is_on_stderr_and_only_if_wanted(text, capfd):
    load(text)
    assert capfd.readouterr() == ("", "")
    text.write_text(Path(text).read_text() + ".")
    load_data(DataSpec(str(text)), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "caching" in err
