"""data/corpus.py: the cache under attack, by users, disks and other processes."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import all_documents, check_error, load

from pico_tg.data import SEQ_END, SEQ_START, DataSpec, formats, load_data
from pico_tg.files import PicoError

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(f"document {i}" for i in range(1000)))
    return path


def builds(path, capfd, **options):
    """Whether loading `path` reads the file, which a bar shows."""
    load_data(DataSpec(path, **options), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    return "caching" in err


def test_cache_is_reused_until_the_file_changes(text, tmp_path, capfd):
    assert builds(text, capfd)
    assert not builds(text, capfd)
    assert not builds(text, capfd, validation_size=10)  # holding out is a view of any size
    (tmp_path / "small.txt").write_text("It is read before a bar could move.")
    assert not builds(tmp_path / "small.txt", capfd)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("7", "8"))  # as long as before
    for path in (text, other):
        os.utime(path, ns=(10**18, 10**18))
    assert builds(text, capfd)
    shutil.copy2(other, text)  # of the same size and time
    assert b"7" not in load(text).train.bytes.tobytes()
    load(text)
    assert capfd.readouterr() == ("", "")  # no bar unless one is asked for


def test_a_link_to_another_file_of_the_same_tick(tmp_path):
    """Both files have the same size and times where the clock of the file system is coarse."""
    paths = [tmp_path / f"{letter}.txt" for letter in "ab"]
    for path in paths:
        path.write_text(path.stem * 100)
        os.utime(path, (10**9, 10**9))
    link = tmp_path / "link.txt"
    for path in paths:
        link.unlink(missing_ok=True)
        link.symlink_to(path)
        assert b"".join(all_documents(load(link))) == path.read_bytes()


def test_documents_that_hold_a_tag_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "CHUNK", 16)  # so that tags lie in two pieces
    rows = ["a </pico:seq>", "b" * 99 + "<pico:seq>", "<pico:seq><pico:seq>", "/pico:seq> pico:seq"]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(rows))
    assert (
        "as text: 3; for the model these are the tags that begin and end a document"
        in load(tmp_path / "a.txt").note
    )
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(rows[-1:] * 4))
    assert "tags" not in load(tmp_path / "a.txt").note


@pytest.mark.parametrize("name", ["bytes", "offsets", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "removed", "longer"])
def test_damaged_cache_is_rebuilt(text, cache, capfd, name, damage):
    expected = all_documents(load(text))
    (folder,) = cache.iterdir()
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage != "removed":
        changed = {"truncated": content[:-8], "emptied": b"", "longer": content + b"8 bytes."}
        (folder / name).write_bytes(changed[damage])
    assert builds(text, capfd)
    assert all_documents(load(text)) == expected
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_full_disk(text, cache):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        check_error(cache, f"cannot write the cache in {cache}: .*set PICO_CACHE", text)
        check_error(cache, f"cannot write {cache}/python-docs.*set PICO_CACHE", "python-docs")
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
        text=True,
    )


def test_two_builders_at_once(text, cache):
    """The first to be done wins; the other one takes what is there."""
    builders = [start_builder(text), start_builder(text)]
    assert [builder.stdout.readline() for builder in builders] == ["building\n"] * 2
    assert len(list(cache.glob("*.tmp"))) == 2
    fingerprint = load(text).train.fingerprint  # a third one starts last and is done first
    (folder,) = (path for path in cache.iterdir() if path.suffix != ".tmp")
    times = (folder / "bytes").stat()
    for builder in builders:
        assert builder.communicate("\n", timeout=600)[0].strip() == fingerprint
        assert builder.returncode == 0
    assert list(cache.iterdir()) == [folder]
    assert (folder / "bytes").stat() == times


def test_killed_builder(text, cache, tmp_path):
    """Whoever builds next removes what was left a day ago, whatever it builds, and nothing else."""
    builders = [start_builder(text), start_builder(text)]
    for builder in builders:
        assert builder.stdout.readline() == "building\n"
        builder.kill()
        builder.communicate()
    old, recent = cache.glob("*.tmp")
    os.utime(old / "bytes", (0, 0))
    other = tmp_path / "other.txt"
    other.write_text("a<|endoftext|>b")
    load(other)
    assert not old.exists()
    assert recent.exists()
    assert len(all_documents(load(text))) == 1000


def test_wrapper_mask(tmp_path):
    texts = ["a", "no <pico:seq> tag </pico:seq>", "bcd", "x" * 50, "held out"]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    corpus = load(tmp_path / "a.txt", validation_size=1).train
    expected = []
    for text in texts[:-1]:
        expected += [True] * len(SEQ_START) + [False] * len(text) + [True] * len(SEQ_END)
    total = len(expected)
    assert corpus.wrapper_mask(total).dtype == bool
    for count in range(total + 1):
        assert corpus.wrapper_mask(count).tolist() == expected[:count]
