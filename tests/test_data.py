"""data/: python-docs, holding out, fingerprints, options."""

import gzip
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import all_documents, as_rows, load, split_up, three_splits, write_jsonl

from pico_tg.data import DataSpec, describe_data, load_whole, open_data, trained_on
from pico_tg.data.overlap import PIECE, shared
from pico_tg.files import PicoError


def test_python_docs():
    from pydoc_data.topics import topics

    loaded = load("python-docs")
    assert all_documents(loaded) == [topics[name].encode() for name in sorted(topics)]
    assert "from python-docs; validating on the end of python-docs" in loaded.note
    # Python's topics repeat whole sections: "while" is also a part of "compound"
    assert re.search(
        r"\nwarning: about \d+% of the text to validate on is also trained on$", loaded.note
    )
    share = len(loaded.validation.bytes) / (len(loaded.train.bytes) + len(loaded.validation.bytes))
    assert 0.02 < share < 0.1


@pytest.mark.parametrize(
    ("size", "held_out"), [(None, 1), (1, 1), (7, 7), (19, 19), (0.5, 10), (0.001, 1), (0.999, 19)]
)
def test_hold_out_documents(tmp_path, size, held_out):
    texts = [f"document {i:02}" for i in range(20)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    loaded = load(tmp_path / "a.txt", validation_size=size)
    assert loaded.train.documents == 20 - held_out
    assert all_documents(loaded) == [text.encode() for text in texts]
    assert f"{held_out} document" in loaded.note


@pytest.mark.parametrize("size", [None, 0.2, 0.6])
@pytest.mark.parametrize(
    "lengths", [(200, 20_000), (20_000, 200), (9000, 9000), (7000, 7000, 7000), (1, 5000, 1)]
)
def test_uneven_documents(lengths, size, tmp_path):
    """About as much is held out as is asked for, within a document where its start is far away."""
    random, folder = np.random.default_rng(0), tmp_path / "texts"
    folder.mkdir()
    texts = [bytes(random.integers(97, 123, length, np.uint8)) for length in lengths]
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_bytes(text)
    loaded = load(folder, validation_size=size)
    total, wanted = len(loaded.train.bytes) + len(loaded.validation.bytes), size or 0.05
    assert wanted / 2 <= len(loaded.validation.bytes) / total <= wanted * 1.5
    assert b"".join(all_documents(loaded)) == b"".join(texts)
    for corpus in (loaded.train, loaded.validation):
        assert sum(count for _, count in corpus.files) == corpus.documents
        assert not corpus.bytes.flags.writeable
    documents = loaded.train.documents + loaded.validation.documents
    assert ("cut within a document" in loaded.note) == (documents > len(lengths))
    assert all_documents(load(folder, validation_size=1)) == texts  # nothing was written


def test_the_files_on_both_sides_of_a_cut_are_named(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("a", "b"):
        (tmp_path / "texts" / f"{name}.txt").write_text(name * 5000)
    note = load(tmp_path / "texts").note
    assert " from 2 files (a.txt, b.txt); validating on the end of " in note
    assert ", cut within a document: 512 bytes in 1 document from b.txt" in note


def test_text_on_both_sides_is_said(tmp_path):
    """A copy of what is trained on is the validation split, or is held out."""
    random = np.random.default_rng(0)
    one, two, other = (bytes(random.integers(97, 123, 3000, np.uint8)) for _ in range(3))
    said = "warning: about 100% of the text to validate on is also trained on"
    for split, texts in {"train": [one, two], "valid": [two]}.items():
        (tmp_path / "splits" / split).mkdir(parents=True)
        for number, text in enumerate(texts):
            (tmp_path / "splits" / split / f"{number}.txt").write_bytes(text)
    (tmp_path / "held").mkdir()
    for name, text in {"1": one + two, "2": other, "3": two}.items():
        (tmp_path / "held" / f"{name}.txt").write_bytes(text)
    assert load(tmp_path / "splits").note.endswith(said)
    assert load(tmp_path / "held", validation_size=1).note.endswith(said)
    (tmp_path / "held" / "1.txt").write_bytes(one)
    assert "\n" not in load(tmp_path / "held", validation_size=1).note


def test_shared():
    random = np.random.default_rng(0)
    text = random.integers(0, 256, 400_000, np.uint8)
    assert shared(text, text) == 1
    assert shared(text[123_456:], text[:-7]) > 0.99  # neither begins nor ends where the other does
    assert shared(text[100_001:200_000], np.concatenate([text[:1], text[150_000:]])) == (
        pytest.approx(0.5, abs=0.03)
    )
    assert shared(text, random.integers(0, 256, 400_000, np.uint8)) == 0
    assert shared(text[: PIECE - 1], text) == 0
    assert shared(text, text[:0]) == 0
    short = [*map(bytes, text[:40_000].reshape(-1, 40) % 26 + 97)]  # no piece within a line
    lf, crlf = (np.frombuffer(end.join(short), np.uint8) for end in (b"\n", b"\r\n"))
    assert shared(lf, crlf) == shared(crlf, lf) == 1
    for length in range(1, 30):  # a sentence that is repeated has this many pieces
        assert shared(np.tile(text[:length], 60), np.tile(text[:length], 70)) == 1
    period = np.tile(text[:1000], 50)  # few pieces, many times
    assert shared(np.append(period, text[1000:2000]), period) > 0.95


@pytest.mark.parametrize("size", [None, 0.5, 0.999, 1e-9])
@pytest.mark.parametrize("length", [2, 3, 1000, 50_000])
def test_hold_out_of_one_document(tmp_path, size, length):
    content = np.random.default_rng(0).integers(0, 256, length, np.uint8).tobytes()
    (tmp_path / "a.txt").write_bytes(content)
    held_out = max(1, round(length * (size or 0.05)))
    if held_out == length:
        with pytest.raises(PicoError, match="too small"):
            load(tmp_path / "a.txt", validation_size=size)
        return
    loaded = load(tmp_path / "a.txt", validation_size=size)
    assert split_up(loaded.train) == [content[:-held_out]]
    assert split_up(loaded.validation) == [content[-held_out:]]
    assert "one document" in loaded.note
    assert not loaded.train.bytes.flags.writeable
    assert not loaded.validation.bytes.flags.writeable
    # the tags at the cut were not written to the file
    (tmp_path / "b.txt").write_bytes(b"b")
    whole = load(tmp_path / "a.txt", validation_file=str(tmp_path / "b.txt"))
    assert split_up(whole.train) == [content]


def test_fingerprint_is_of_the_content(tmp_path):
    for name, text in [
        ("a", "a<|endoftext|>b"),
        ("b", "a<|endoftext|>b"),
        ("c", "a<|endoftext|>c"),
    ]:
        (tmp_path / f"{name}.txt").write_text(text)
    a, b, c = (load(tmp_path / f"{name}.txt") for name in "abc")
    assert a.train.fingerprint == b.train.fingerprint
    assert a.validation.fingerprint == b.validation.fingerprint
    assert a.validation.fingerprint != c.validation.fingerprint
    assert a.train.fingerprint != a.validation.fingerprint


@pytest.mark.parametrize("size", [0, -1, 1.0, 0.0, -0.5, 1.5, True, float("nan"), "0.1"])
def test_bad_validation_size(size):
    with pytest.raises(PicoError, match="validation_size must be"):
        DataSpec(validation_size=size)


def test_impossible_options(tmp_path):
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "two.txt").write_text("one<|endoftext|>two")
    with pytest.raises(PicoError, match="must be a fraction"):
        load(tmp_path / "one.txt", validation_size=1)
    with pytest.raises(PicoError, match=r"\(2\) leaves nothing to train on: .* 2 documents"):
        load(tmp_path / "two.txt", validation_size=2)
    with pytest.raises(PicoError, match="not both"):
        DataSpec(validation_file="a", validation_split="b")
    with pytest.raises(PicoError, match="no name"):
        DataSpec("")
    with pytest.raises(PicoError, match="train_file is empty; leave it out"):
        DataSpec(train_file="")


def test_local_data_need_no_cache_of_datasets(tmp_path):
    """HF_HOME may be unwritable: the process that reads local data never imports `datasets`."""
    (tmp_path / "c.csv").write_text("text\na\nb\n")
    script = (
        "import sys; from pico_tg.data import *\n"
        "for name in sys.argv[1:]: load_data(DataSpec(name))\n"
        "assert 'datasets' not in sys.modules"
    )
    arguments = [three_splits(tmp_path / "folder"), tmp_path / "c.csv", "python-docs"]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)


def test_fingerprints_do_not_change_between_versions(tmp_path):
    """Runs of earlier versions resume."""
    folder = tmp_path / "books"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.txt").write_text("a\n")
    (folder / "b-1.txt").write_text("\nb1\n<|endoftext|>b2")
    (folder / "deeper" / "c.txt").write_text("c")
    rows = tmp_path / "rows"
    rows.mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation"):
        write_jsonl(rows / f"{name}.jsonl", as_rows([f"{name} {i}" for i in range(5)] + [""]))
    found = [load(path) for path in (folder, folder / "b-1.txt", rows, rows / "validation.jsonl")]
    assert [data.train.fingerprint[:8] for data in found] == [
        "c6824a99",
        "8ed50c5a",
        "43e9a017",
        "e08a4387",
    ]
    assert [data.validation.fingerprint[:8] for data in found] == [
        "a2509c3e",
        "26da6665",
        "e888b17c",
        "7b068508",
    ]


def test_data_of_a_run(tmp_path):
    """The same text under another path is the run's; other text is not, with the reason."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("one<|endoftext|>two")
    stored = describe_data(load(tmp_path / "a.txt"))
    moved = open_data(tmp_path / "b.txt", stored, tmp_path, False)
    assert moved.spec.dataset == str(tmp_path / "b.txt")
    (tmp_path / "b.txt").write_text("one<|endoftext|>three")
    with pytest.raises(PicoError, match=r"dataset was .*a.txt, now .*b.txt; leave DATASET and"):
        open_data(tmp_path / "b.txt", stored, tmp_path, False)
    (tmp_path / "a.txt").rename(tmp_path / "moved")
    with pytest.raises(PicoError, match=r"no file .*a.txt.*; if it was moved, give DATASET \(and"):
        open_data(None, stored, tmp_path, False)
    with pytest.raises(PicoError, match=r"no file or folder .*a.txt[^;]*$"):
        open_data(tmp_path / "a.txt", stored, tmp_path, False)
    (tmp_path / "a.txt").write_text("one<|endoftext|>three")
    with pytest.raises(PicoError, match="have changed since; train a new RUN on them"):
        open_data(None, stored, tmp_path, False)
    stored = describe_data(load("python-docs")) | {"fingerprints": ["of", "another"]}
    with pytest.raises(PicoError, match=r"\(python-docs are those of the Python that runs, now 3"):
        open_data(None, stored, tmp_path, False)
    with pytest.raises(PicoError, match="dataset must be a str or a path"):
        open_data(["a.txt", "b.txt"], {}, None, False)


def test_what_a_run_was_trained_on(tmp_path):
    """However the text that is measured is named, cut or stored."""
    text = np.random.default_rng(0).bytes(20_000)
    (tmp_path / "t.txt").write_bytes(text)
    data = load(tmp_path / "t.txt")
    stored = describe_data(data)

    whole = load_whole(data.spec)

    def said(array, source=whole):
        return trained_on(array, source, stored, tmp_path)

    assert said(data.validation.bytes) == ""
    assert said(data.train.bytes) == f"{tmp_path} was trained on about 100% of this text"
    (tmp_path / "part.txt.gz").write_bytes(gzip.compress(text[:15_000]))
    assert "about 100% of this text" in said(load_whole(DataSpec(tmp_path / "part.txt.gz")).bytes)
    more = load(tmp_path / "t.txt", validation_size=0.5)
    assert re.search(r"about (89|9[01])% of this text", said(more.validation.bytes))
    assert said(np.frombuffer(np.random.default_rng(1).bytes(20_000), np.uint8)) == ""
    (tmp_path / "t.txt").write_bytes(text[:10_000])
    assert "not known whether" in said(data.validation.bytes)
    assert "have changed since" in said(data.validation.bytes)
    assert said(data.validation.bytes, data) == ""  # as under another path
    (tmp_path / "t.txt").unlink()
    assert "there is no file or folder" in said(data.validation.bytes)


def test_options_without_effect_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    for dataset in ("python-docs", tmp_path, tmp_path / "a.txt"):
        with pytest.raises(PicoError, match="is plain text, which has no column 'foo'"):
            load(dataset, column_name="foo")
    with pytest.raises(PicoError, match=r"a\.txt is a local path, not on the hub"):
        load(tmp_path / "a.txt", revision="main")
    (tmp_path / "b.jsonl").write_text('{"foo": "three"}\n')
    assert all_documents(load(tmp_path, column_name="foo")) == [b"one", b"two", b"three"]
