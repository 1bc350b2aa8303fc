"""data/hub.py: revisions, files of our own reading, and work without network."""

import gzip
import io
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from helpers import all_documents, as_rows, contents, load, split_up, three_splits, write_jsonl

from pico_tg.data import DataSpec, has_validation, hub, load_data
from pico_tg.files import PicoError


@pytest.fixture
def folder(tmp_path):
    return three_splits(tmp_path / "folder")


def documents(split, *numbers):
    return [f"{split} {i}".encode() for i in numbers]


LOAD_DATASET = datasets.load_dataset


class Hub:
    """Plays the hub: a local folder for each revision, and whether the network is there."""

    def __init__(self, monkeypatch, revisions):
        self.revisions, self.online, self.asked = revisions, True, []
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", self.info)
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def info(self, name, revision=None, timeout=None):
        if not self.online:
            raise ConnectionError("no route\nto host")
        return SimpleNamespace(sha=[*self.revisions][-1] if revision is None else revision)

    def load(self, name, config, *, revision, streaming, cache_dir):
        if not self.online:
            raise ConnectionError("no route\nto host")
        self.asked.append((name, config, revision))
        return LOAD_DATASET(str(self.revisions[revision]), streaming=True, cache_dir=cache_dir)


def test_hub_dataset(folder, monkeypatch):
    hub = Hub(monkeypatch, {"0123abc": folder})
    loaded = load("owner/name:config")
    assert split_up(loaded.train) == documents("train", 0, 1, 2, 3)
    assert split_up(loaded.validation) == documents("validation", 0, 1, 2, 3)
    assert hub.asked == [("owner/name", "config", "0123abc")]
    assert loaded.spec == DataSpec("owner/name:config", revision="0123abc")
    assert "not used: test.jsonl (split test)" in loaded.note
    load("owner/name:config")
    assert len(hub.asked) == 1  # the revision is known


def test_hub_dataset_of_txt_and_csv(tmp_path, monkeypatch):
    """The builders of `datasets` would make a document of each line, and drop the text NA."""
    for kind, text, expected in [
        ("txt", "one\ntwo\n<|endoftext|>\nthree\n", [b"one\ntwo", b"three"]),
        ("csv", "text,n\nNA,1\n007,2\n", [b"NA", b"007"]),
    ]:
        place = tmp_path / kind
        place.mkdir()
        (place / f"train.{kind}").write_text(text)
        more = "<|endoftext|>4" if kind == "txt" else "8,9\n"
        (place / f"valid.{kind}").write_text(text + more)
        Hub(monkeypatch, {"0123abc": place})
        loaded = load(f"owner/{kind}")
        assert split_up(loaded.train) == expected
        assert len(split_up(loaded.validation)) == 3
        assert f"from valid.{kind}" in loaded.note


def test_hub_data_whose_files_are_unknown(tmp_path, monkeypatch):
    """Rows are taken from `datasets`, unless its text builder would make them of lines."""
    monkeypatch.setattr(hub, "_paths", lambda rows: [])
    for kind, error in (("jsonl", None), ("txt", "cannot find the .txt files of owner/txt")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"a.{kind}").write_bytes(contents(kind, ["a", "b"]))
        Hub(monkeypatch, {"0123abc": tmp_path / kind})
        if error is None:
            assert all_documents(load(f"owner/{kind}")) == [b"a", b"b"]
        else:
            with pytest.raises(PicoError, match=error):
                load(f"owner/{kind}")


def test_hub_files_are_split_on_the_marker(monkeypatch):
    files = {
        "datasets/owner/name@0123abc/deep/a.txt": b"one\ntwo\n<|endoftext|>\nthree\n",
        "datasets/owner/name@0123abc/b.txt.gz": gzip.compress(b"held out"),
    }

    class FileSystem:
        def open(self, path, mode):
            assert mode == "rb"
            return io.BytesIO(files[path])

        def size(self, path):
            return len(files[path])

    info = SimpleNamespace(sha="0123abc")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
    loaded = load("owner/name", train_file="deep/a.txt", validation_file="b.txt.gz")
    assert split_up(loaded.train) == [b"one\ntwo", b"three"]
    assert split_up(loaded.validation) == [b"held out"]
    files["datasets/owner/name@0123abc/a.pdf"] = b""
    with pytest.raises(PicoError, match=r"cannot tell what a\.pdf is by its name"):
        load("owner/name", train_file="a.pdf")
    with pytest.raises(PicoError, match=r"cannot open 'owner/name/gone\.txt' on the"):
        load("owner/name", train_file="gone.txt")


def test_hub_without_network(folder, tmp_path, monkeypatch):
    """A run's revision is read from the cache although the hub has moved on, or is not there."""
    moved = tmp_path / "moved"
    moved.mkdir()
    write_jsonl(moved / "train.jsonl", as_rows(["moved 0", "moved 1"]))
    hub = Hub(monkeypatch, {"old": folder})
    first = load("owner/name")
    hub.online = False
    again = load("owner/name")
    assert again.train.fingerprint == first.train.fingerprint
    assert again.spec == first.spec == DataSpec("owner/name", revision="old")
    assert "no answer from the hub: no route to host" in again.note
    assert "revision old is in the cache" in again.note
    resumed = load_data(first.spec, progress=False)
    assert (resumed.note, resumed.spec) == (first.note, first.spec)
    assert has_validation(DataSpec("owner/name"))
    with pytest.raises(PicoError, match="'owner/name' at revision new on the Hugging Face hub"):
        load("owner/name", revision="new")
    with pytest.raises(PicoError, match=r"'owner/other' .*\(no route to host\).*python-docs"):
        load("owner/other")

    (tmp_path / "mine.txt").write_text("mine")
    mixed = load("owner/name", validation_file=tmp_path / "mine.txt")
    assert (split_up(mixed.validation), mixed.spec.revision) == ([b"mine"], "old")

    hub.online, hub.revisions = True, {"old": folder, "new": moved}
    assert all_documents(load("owner/name")) == [b"moved 0", b"moved 1"]
    assert load_data(first.spec, progress=False).train.fingerprint == first.train.fingerprint
    (folder / "train.jsonl").unlink()  # what an old revision held is in the cache only
    hub.online = False
    assert load("owner/name").spec.revision == "new"
    assert load_data(first.spec, progress=False).train.fingerprint == first.train.fingerprint


def test_hub_out_of_reach(monkeypatch, cache):
    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(PicoError, match=r"'owner/name' .*\(no route to host\).*python-docs"):
        load("owner/name")
    assert not cache.exists()
