"""data/folder.py: what is read and what is not; validation data are never trained on."""

import dataclasses
import gzip
import json
import os
import re
import shutil
import sys
import zipfile

import datasets
import pytest
from helpers import (
    all_documents,
    as_rows,
    check_error,
    contents,
    load,
    split_up,
    three_splits,
    write_jsonl,
    write_parquet,
)

from pico_tg.data import DataSpec, formats, has_validation, load_data, load_whole
from pico_tg.data.folder import split_of
from pico_tg.files import PicoError


def test_folder_of_txt(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    (folder / "b.txt").write_text("b1<|endoftext|>b2")
    (folder / "a.txt").write_text("a\n")
    (folder / "deeper" / "c.txt").write_text("c")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "metadata.json").write_text("{}")
    assert all_documents(load(folder)) == [b"a\n", b"b1", b"b2", b"c"]
    loaded = load(folder, train_file="b.txt", validation_file="deeper/c.txt")
    assert split_up(loaded.train) == [b"b1", b"b2"]
    assert split_up(loaded.validation) == [b"c"]


@pytest.fixture
def folder(tmp_path):
    return three_splits(tmp_path / "folder")


def documents(split, *numbers):
    return [f"{split} {i}".encode() for i in numbers]


def test_folder_with_splits(folder):
    loaded = load(folder)
    assert has_validation(loaded.spec)
    assert split_up(loaded.train) == documents("train", 0, 1, 2, 3)
    assert split_up(loaded.validation) == documents("validation", 0, 1, 2, 3)
    assert "from train.jsonl; validating on" in loaded.note
    assert f"split validation: {len(loaded.validation.bytes):,} bytes" in loaded.note

    loaded = load(folder, train_split="test", validation_split="train", validation_size=0.5)
    assert split_up(loaded.train) == documents("test", 0, 1, 2, 3)
    assert split_up(loaded.validation) == documents("train", 0, 1, 2, 3)
    assert "validation_size is not used" in loaded.note

    (folder / "deep" / "valid").mkdir(parents=True)  # the word may be a folder's
    write_jsonl(folder / "deep" / "valid" / "a.jsonl", as_rows(["more"]))
    assert split_up(load(folder).validation) == [b"more", *documents("validation", 0, 1, 2, 3)]
    shutil.rmtree(folder / "deep")

    # the only split named validation is the one to train on, so a part of it is held out
    loaded = load(folder, train_split="validation", validation_size=1)
    assert split_up(loaded.train) == documents("validation", 0, 1, 2)
    assert split_up(loaded.validation) == documents("validation", 3)


def test_folder_with_files(folder):
    loaded = load(folder, train_file="train.jsonl", validation_file="test.jsonl")
    assert split_up(loaded.train) == documents("train", 0, 1, 2, 3)
    assert split_up(loaded.validation) == documents("test", 0, 1, 2, 3)

    loaded = load(folder, train_file="train.jsonl", validation_split="test")
    assert split_up(loaded.validation) == documents("test", 0, 1, 2, 3)

    loaded = load(folder, train_file="train.jsonl", validation_size=2)
    assert split_up(loaded.train) == documents("train", 0, 1)
    assert split_up(loaded.validation) == documents("train", 2, 3)
    unused = "not used: validation.jsonl (split validation); test.jsonl (split test)"
    assert unused in loaded.note


def test_validation_split_beside_a_train_file(folder):
    loaded = load(folder, train_file="train.jsonl")
    assert split_up(loaded.train) == documents("train", 0, 1, 2, 3)
    assert split_up(loaded.validation) == documents("validation", 0, 1, 2, 3)
    assert "not used: test.jsonl (split test)" in loaded.note
    # without the train file, nothing is left of the validation split
    loaded = load(folder, train_file="validation.jsonl")
    assert all_documents(loaded) == documents("validation", 0, 1, 2, 3)
    assert "not used: train.jsonl (split train); test.jsonl (split test)" in loaded.note
    write_jsonl(folder / "valid.jsonl", as_rows(["more"]))
    loaded = load(folder, train_file="validation.jsonl")
    assert split_up(loaded.train) == documents("validation", 0, 1, 2, 3)
    assert split_up(loaded.validation) == [b"more"]


def test_only_split(folder):
    (folder / "train.jsonl").unlink()
    (folder / "validation.jsonl").unlink()
    assert all_documents(load(folder)) == documents("test", 0, 1, 2, 3)
    with pytest.raises(PicoError, match="no split 'train'; there is: test"):
        load(folder, train_split="train")


STORY = "One.\n\n  Two;\n\tthree.\n"


def write_story(place):
    """A .txt at `place`, which may be compressed."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.suffix in (".gz", ".bz2", ".xz"):
        with formats.COMPRESSIONS[place.suffix](place, "wb") as file:
            file.write(STORY.encode())
    else:
        place.write_text(STORY)
    return place


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("a.txt", "README.md"),
        ("A.TXT", "LICENSE"),
        ("a.txt.gz", "picture.png"),
        ("a.txt.bz2", None),
        ("a.txt.xz", "b.py"),
        ("deep/er/a.txt", "x/README.md"),
    ],
)
def test_txt_is_one_document_wherever_it_lies(name, beside, tmp_path):
    place = write_story(tmp_path / "data" / name)
    assert split_up(load_whole(DataSpec(place), progress=False)) == [STORY.encode()]
    if beside:
        (tmp_path / "data" / beside).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / beside).write_text("---\nno data\n---\n")
    loaded = load(tmp_path / "data", validation_size=0.5)
    assert split_up(load_whole(loaded.spec, progress=False)) == [STORY.encode()]
    assert ("not used" in loaded.note) == bool(beside)
    assert beside is None or f"{beside} (no format that is read)" in loaded.note


def test_everything_is_read_or_named(tmp_path):
    """Whatever the mixture: each name is in the note, and each document read or named."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("from a.txt")
    write_jsonl(folder / "b.jsonl", as_rows(["from b.jsonl"]))
    write_parquet(folder / "c.parquet", as_rows(["from c.parquet"]))
    write_story(folder / "d.txt.xz")
    (folder / "e.csv.gz").write_bytes(gzip.compress(b"text\nfrom e.csv.gz\n"))
    (folder / "empty.txt").touch()
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "vocabulary.json").write_text('["a"]')
    (folder / "x.tar").touch()
    (folder / "link").symlink_to(tmp_path)
    found = load(folder, validation_size=1)
    assert all_documents(found) == [
        b"from a.txt",
        b"from b.jsonl",
        b"from c.parquet",
        STORY.encode(),
        b"from e.csv.gz",
    ]
    assert " from 4 files (a.txt, b.jsonl, c.parquet, d.txt.xz); validating on " in found.note
    assert "1 document from e.csv.gz\n" in found.note
    for words in (
        "empty.txt (empty)",
        "x.tar (no format that is read)",
        "link (a link",
        "left out:",
    ):
        assert words in found.note
    assert found.note == load(folder, validation_size=1).note  # from the cache, too


def test_nothing_to_read(tmp_path, cache):
    folder = tmp_path / "folder"
    folder.mkdir()
    check_error(cache, "folder holds no files; the formats are", folder)
    (folder / "README.md").write_text("# no data")
    (folder / "a.txt").touch()
    check_error(cache, r"no data that can be read: README.md \(no format .*a.txt \(empty\)", folder)
    (folder / "a.json").write_text("{}")
    check_error(cache, "neither a column 'text'", folder)


def test_formats_that_are_not_read(tmp_path, cache):
    """Each has one line with the way out, alone, within a folder, and in a folder of it."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "a<|endoftext|>b")
    unpack = r"\.zip is not read: unpack it into a folder"
    check_error(cache, unpack, tmp_path / "a.zip")
    mixed = tmp_path / "mixed"
    (mixed / "deep").mkdir(parents=True)
    (mixed / "b.txt").write_text("b<|endoftext|>c")
    check_error(cache, unpack, mixed, validation_file="../a.zip")
    (tmp_path / "a.zip").rename(mixed / "deep" / "A.ZIP")
    check_error(cache, f"mixed holds deep/A.ZIP; {unpack}, or move it elsewhere", mixed)
    check_error(cache, "there is no file or folder gone.zip", "gone.zip")

    one = datasets.Dataset.from_list(as_rows(["a", "b"]))
    one.save_to_disk(tmp_path / "saved" / "one")
    datasets.DatasetDict(train=one).save_to_disk(tmp_path / "several")
    for folder in ("saved", "saved/one", "several", "several/train"):
        check_error(cache, r"save_to_disk of `datasets`.*to_parquet\(", tmp_path / folder)
    one.to_parquet(tmp_path / "train.parquet")  # the way out
    assert all_documents(load(tmp_path / "train.parquet")) == [b"a", b"b"]


def test_pointer_of_git_lfs_is_no_text(tmp_path, cache):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "train.txt").write_text(pointer)
    check_error(
        cache, "train.txt is a pointer of Git LFS; run: git lfs pull", tmp_path / "train.txt"
    )


@pytest.mark.parametrize("name", ["st*r", "[data] v1", "a::b", "what?", "ümlaut ordner", "{a,b}"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_paths_are_no_patterns(name, kind, tmp_path):
    for place, text in ((name, "mine"), ("starr", "no"), ("d v1", "no"), ("what1", "no")):
        (tmp_path / place).mkdir()
        content = {"txt": text, "csv": f"text\n{text}\n", "jsonl": json.dumps({"text": text})}
        (tmp_path / place / f"a [b]*.{kind}").write_text(content[kind])
    assert split_up(load_whole(DataSpec(tmp_path / name), progress=False)) == [b"mine"]
    file = tmp_path / name / f"a [b]*.{kind}"
    assert split_up(load_whole(DataSpec(file), progress=False)) == [b"mine"]


def test_words_of_splits():
    for name, split in {
        "books.txt": "train",
        "train-00000-of-00002.parquet": "train",
        "validation-00000-of-00001.parquet": "validation",
        "TinyStoriesV2-GPT4-valid.txt": "validation",
        "data/wiki.valid.raw.txt": "validation",
        "DEV.csv": "validation",
        "dev-blog.jsonl": "validation",
        "training/part 1.txt": "train",
        "train-travel.jsonl": "train",
        "latest.txt": "train",
        "validity/devices.txt": "train",
        "test/train.txt": "train",
        "train/test.txt": "test",
        "train_dev.txt": "validation",
        "Val2/x.txt": "validation",
        "evaluation.01.csv": "test",
        "my testing set.txt": "test",
    }.items():
        assert split_of(name) == split, name


@pytest.fixture
def named(tmp_path):
    """A folder without splits, of three .txt and three .jsonl."""
    folder = tmp_path / "named"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_bytes(contents("txt", [f"{name} {i}" for i in range(3)]))
        rows = contents("jsonl", [f"{name} rows {i}" for i in range(3)])
        (folder / f"{name}.jsonl").write_bytes(rows)
    return folder


def assert_disjoint(loaded, validation, count=15):
    train = split_up(loaded.train)
    assert split_up(loaded.validation) == validation
    assert not set(train) & set(validation)
    assert len(train) == count


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_validation_file_within_the_folder_is_not_trained_on(kind, named, tmp_path, monkeypatch):
    expected = [f"c {'' if kind == 'txt' else 'rows '}{i}".encode() for i in range(3)]
    inside = named / f"c.{kind}"
    (tmp_path / "link").symlink_to(named)
    (tmp_path / f"copy.{kind}").hardlink_to(inside)
    monkeypatch.chdir(tmp_path)
    for file in (
        inside.name,  # in the data set's folder
        inside,
        f"named/../named/c.{kind}",
        f"link/c.{kind}",
        f"copy.{kind}",
    ):
        for dataset in (named, "link", "./named/"):
            loaded = load(dataset, validation_file=file)
            assert_disjoint(loaded, expected)
            assert "not used" not in loaded.note


def test_files_and_splits_named_at_once(named):
    (named / "valid.txt").write_text("v 0<|endoftext|>v 1")
    held_out = [b"v 0", b"v 1"]
    assert_disjoint(load(named), held_out, 18)
    assert_disjoint(load(named, validation_split="validation"), held_out, 18)
    assert_disjoint(load(named, validation_split="dev"), held_out, 18)
    assert_disjoint(load(named, validation_file="valid.txt"), held_out, 18)
    assert_disjoint(load(named, train_file="a.txt", validation_file="valid.txt"), held_out, 3)
    assert_disjoint(load(named, train_file="a.txt", validation_split="validation"), held_out, 3)
    loaded = load(named, validation_file="c.txt")
    assert_disjoint(loaded, [b"c 0", b"c 1", b"c 2"], 15)
    assert "not used: valid.txt (split validation)" in loaded.note


def test_same_data_for_both(named, cache):
    for options in (
        {"train_file": "a.txt", "validation_file": "a.txt"},
        {"train_file": "a.txt", "validation_split": "train"},
        {"validation_split": "train"},
    ):
        check_error(cache, "is to be both the training and the validation data", named, **options)
    check_error(cache, "is to be both", named / "a.txt", validation_file=named / "a.txt")


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: [data/train*, "*.txt"]
  - split: dev
    path: data/*valid*
---
# Data
"""


def test_card_must_agree_with_the_names(tmp_path):
    """A README.md of the hub is refused where its splits are others than those of the names."""
    folder = tmp_path / "clone"
    (folder / "data").mkdir(parents=True)
    for name in ("data/train-0.txt", "data/valid-0.txt", "more.txt"):
        (folder / name).write_text(name)
    card = folder / "README.md"
    for text in (CARD, "# no configurations", "---\nlicense: mit\n---\nconfigs:\n"):
        card.write_text(text)
        loaded = load(folder)
        assert split_up(loaded.train) == [b"data/train-0.txt", b"more.txt"]
        assert split_up(loaded.validation) == [b"data/valid-0.txt"]
    for text, wrong in {
        CARD.replace("dev", "test"): "data/valid-0.txt",
        CARD.replace(', "*.txt"', ""): "more.txt",
        CARD.replace("data/*valid*", "data/*"): "data/train-0.txt",
        CARD.replace("---\n#", "- config_name: de\n---\n#"): "data/train-0.txt, more.txt, data/v",
        CARD.replace("configs:", "configs: :"): "data/train-0.txt, more.txt, data/v",
    }.items():
        card.write_text(text)
        way_out = f"name a folder of it, as in {folder}/data, or files by train_file"
        with pytest.raises(PicoError, match=rf"or splits .* \({wrong}.*\); {way_out}") as caught:
            load(folder)
        assert "\n" not in str(caught.value)
        assert split_up(load(folder / "data").train) == [b"data/train-0.txt"]
        loaded = load(folder, train_file="more.txt", validation_file="data/train-0.txt")
        assert all_documents(loaded) == [b"more.txt", b"data/train-0.txt"]
    there = "there is no .*clone:data; a folder of .*clone is written .*clone/data"
    with pytest.raises(PicoError, match=there):
        load(f"{folder}:data")


def test_missing_things(tmp_path, cache, folder):
    check_error(cache, "no file or folder .*gone.txt", tmp_path / "gone.txt")
    check_error(cache, "no file or folder ./gone", "./gone")
    check_error(cache, "no file or folder gone.parquet", "gone.parquet")
    check_error(cache, "no file or folder a text.txt", "a text.txt")
    for text in ("The cat was happy.", "One line.\nAnd 1/2/3 more.txt", "word" * 2000):
        shown = repr(text[:60]) + "…" * (len(text) > 60)
        expected = f"^{re.escape(shown)} is no data set or file; `score` and eval --text measure"
        check_error(cache, expected, text)
    check_error(cache, "no file 'gone.jsonl'", folder, train_file="gone.jsonl")
    check_error(cache, "no file 'gone.jsonl'", "python-docs", validation_file="gone.jsonl")
    splits = "there is: train, validation, test"
    check_error(cache, f"no split 'gone'; {splits}", folder, train_split="gone")
    check_error(cache, f"no split 'gone'; {splits}", folder, validation_split="gone")
    check_error(cache, "no split 'gone'; there is: train", "python-docs", train_split="gone")
    check_error(cache, "no column 'gone'; .* id, text", folder, column_name="gone")
    check_error(cache, "must hold text or bytes, but holds int", folder, column_name="id")
    path = write_jsonl(tmp_path / "a.jsonl", [{"story": "a", "n": 1}])
    check_error(cache, "neither a column 'text' nor 'bytes'; .* story, n", path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_file_that_cannot_be_read(tmp_path, cache):
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")  # fails for root, too
    check_error(cache, "cannot read .*a.txt: Input/output error", tmp_path / "a.txt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_refused(tmp_path, cache):
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / "a.txt")
    check_error(cache, "a.txt is no regular file", tmp_path / "a.txt")


def test_folder_named_python_docs(tmp_path, monkeypatch):
    (tmp_path / "python-docs").mkdir()
    (tmp_path / "python-docs" / "a.txt").write_text("a<|endoftext|>b")
    monkeypatch.chdir(tmp_path)
    unused = "not used: ./python-docs (python-docs is built into Python; ./ names this folder)"
    assert unused in load("python-docs").note
    assert all_documents(load("./python-docs")) == [b"a", b"b"]


def test_paths_as_objects(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    spec = DataSpec(tmp_path / "a.txt", validation_file=tmp_path / "b.txt")
    assert spec.dataset == str(tmp_path / "a.txt")
    assert (
        json.loads(json.dumps(dataclasses.asdict(spec)))["validation_file"] == spec.validation_file
    )
    for wrong in (b"a.txt", 4, None, ["a.txt"]):
        with pytest.raises(PicoError, match="dataset must be a str or a path, not"):
            DataSpec(wrong)
    with pytest.raises(PicoError, match="column_name must be a str or a path, not 4"):
        DataSpec(column_name=4)


def test_absolute_files(folder, tmp_path, monkeypatch):
    """The files of a run are the same from any working directory."""
    (tmp_path / "held.txt").write_text("held")
    (tmp_path / "test.jsonl").write_text('{"text": "not beside the data set"}')
    monkeypatch.chdir(tmp_path)
    held = str(tmp_path / "held.txt")
    local = DataSpec("folder", train_file="test.jsonl", validation_file="held.txt")
    loaded = load_data(local, progress=False)
    assert split_up(loaded.train) == documents("test", 0, 1, 2, 3)
    absolute = loaded.spec
    assert absolute == DataSpec(folder, train_file="test.jsonl", validation_file=held)
    assert load("python-docs", train_file="held.txt", validation_size=0.5).spec.train_file == held
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "held.txt").write_text("another file")
    monkeypatch.chdir("elsewhere")
    again = load_data(absolute, progress=False)
    assert again.train.fingerprint == loaded.train.fingerprint
    assert again.validation.fingerprint == loaded.validation.fingerprint
    assert again.spec == absolute


def test_without_a_home(tmp_path, cache, monkeypatch):
    check_error(cache, "there is no file or folder ~nosuchuser/x", "~nosuchuser/x")
    (tmp_path / "a.txt").write_text("a<|endoftext|>b")
    check_error(
        cache, "no file '~nosuchuser/x'", tmp_path / "a.txt", validation_file="~nosuchuser/x"
    )
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # neither HOME nor an entry
    monkeypatch.setenv("PICO_CACHE", "~/cache")
    with pytest.raises(PicoError, match="no home folder for PICO_CACHE=~/cache; write the path"):
        load(tmp_path / "a.txt")
    monkeypatch.delenv("PICO_CACHE")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert all_documents(load(tmp_path / "a.txt")) == [b"a", b"b"]
    assert (tmp_path / f"pico_tg-{os.getuid()}").is_dir()
