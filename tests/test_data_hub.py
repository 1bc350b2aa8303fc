"""data/hub.py with the real huggingface_hub: a server in the hub's place, and caches without one.

huggingface_hub reads the environment when it is imported, so data are loaded in processes.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import contents

LOAD = Path(__file__).parent / "scripts" / "load_data.py"
OLD, NEW = "a" * 40, "b" * 40
SPLITS = ("train", "validation", "test")
FILES = {f"{split}.jsonl": contents("jsonl", [f"{split} 0", f"{split} 1"]) for split in SPLITS}
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: %s
  - split: val
    path: [valid*, dev.*]
---
"""


class Hub(ThreadingHTTPServer):
    """Answers as the hub does for owner/name: `revisions` holds {name: bytes} of each commit.

    The last commit is main. `downloads` lists the names of the files that were sent.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.revisions, self.downloads = {OLD: dict(FILES)}, []

    def answer(self, path, head):
        """(status, body, headers) for the path of a request."""
        if "/owner/name" not in path:
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        commit = next((c for c in self.revisions if c in path), [*self.revisions][-1])
        files = self.revisions[commit]
        if "/resolve/" in path:
            content = files[path.split(f"{commit}/")[1]]
            self.downloads += [] if head else [path.split(f"{commit}/")[1]]
            tag = hashlib.sha1(content).hexdigest()
            return 200, content, {"X-Repo-Commit": commit, "ETag": f'"{tag}"'}
        found = {"id": "owner/name", "sha": commit}
        if "/tree/" in path:
            # a file may be of a size alone
            sizes = {n: f if isinstance(f, int) else len(f) for n, f in files.items()}
            found = [{"type": "file", "path": n, "size": sizes[n], "oid": n} for n in files]
        return 200, json.dumps(found).encode(), {}


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        head = self.command == "HEAD"
        status, body, headers = self.server.answer(self.path.split("?")[0], head)
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if head else body)

    do_HEAD = do_GET

    def log_message(self, *_):
        """No line for each request."""


@pytest.fixture
def hub():
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def load_all(home, hub, *specs):
    """What load_data makes of each of `specs`; without a hub, offline."""
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    if hub is not None:
        at = f"http://127.0.0.1:{hub.server_port}"
        environment |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": at, "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, LOAD]
    pipes = {"input": json.dumps(specs), "capture_output": True, "text": True}
    done = subprocess.run(command, env=environment, check=True, **pipes)
    assert done.stderr == ""  # no bars, no warnings
    return json.loads(done.stdout)


def spec(dataset="owner/name", **options):
    return {"dataset": dataset, **options}


def test_revision_is_recorded_and_read_without_network(hub, home):
    hub.revisions[OLD] |= {"picture.png": b"png", ".hidden/x.txt": b"hidden", "empty.txt": b""}
    (first,) = load_all(home, hub, spec())
    assert first["train"] == ["train 0", "train 1"]
    assert first["validation"] == ["validation 0", "validation 1"]
    assert first["spec"]["revision"] == OLD
    unused = "empty.txt (empty); picture.png (no format that is read); test.jsonl (split test)"
    assert first["note"].endswith(f"\nnot used: {unused}")
    assert sorted(hub.downloads) == ["train.jsonl", "validation.jsonl"]

    hub.revisions[NEW] = {"train.jsonl": contents("jsonl", ["moved 0", "moved 1"])}
    again, newest, branch = load_all(home, hub, first["spec"], spec(), spec(revision="main"))
    assert again == first
    assert (newest["train"], newest["validation"]) == (["moved 0"], ["moved 1"])
    assert newest["spec"]["revision"] == branch["spec"]["revision"] == NEW

    again, cached, gone, split, other = load_all(
        home, None,
        first["spec"], spec(), spec(revision="c" * 40), first["spec"] | {"train_split": "test"},
        spec("owner/other"),
    )  # fmt: skip
    assert again == first
    assert (cached["train"], cached["spec"]["revision"]) == (["moved 0"], NEW)
    assert (
        f"any newer revision of owner/name than {NEW} (no answer from the hub: " in cached["note"]
    )
    assert f"cannot open 'owner/name' on the Hugging Face hub at {'c' * 40} (" in gone["error"]
    assert "cannot download owner/name from the hub: " in split["error"]
    assert "'owner/other' on the Hugging Face hub, and it is no local file" in other["error"]
    assert other["error"].endswith("check the name and the network, or use python-docs")


def test_files_and_folders(hub, home, tmp_path):
    """Text is read to the byte, as from local files, and only what is named is downloaded."""
    hub.revisions[OLD] = {
        "en/train.txt": b"one\ntwo\n<|endoftext|>\nthree\n",
        "en/valid.csv": b"text,n\nNA,1\n007,2\n",
        "de/train.txt": b"eins<|endoftext|>zwei",
        "a.pdf": b"%PDF",
    }
    (tmp_path / "mine.txt").write_text("mine")
    mine = str(tmp_path / "mine.txt")
    folder, files, local, lone, pdf, gone, part = load_all(
        home, hub,
        spec("owner/name:en"),
        spec(train_file="de/train.txt", validation_file="en/valid.csv"),
        spec(train_file="en/train.txt", validation_file=mine),
        spec(train_file="de/train.txt"),  # no other file is looked for, as always on the hub
        spec(train_file="a.pdf"),
        spec(train_file="gone.txt"),
        spec("owner/name:fr"),
    )  # fmt: skip
    assert folder["train"] == ["one\ntwo", "three"]
    assert folder["validation"] == files["validation"] == ["NA", "007"]
    assert files["train"] == ["eins", "zwei"]
    assert (local["validation"], local["spec"]["train_file"]) == (["mine"], "en/train.txt")
    assert (lone["train"], lone["validation"]) == (["eins"], ["zwei"])
    assert "owner/name/a.pdf cannot be read: no format that is read" in pdf["error"]
    assert "there is no file 'gone.txt', neither in owner/name nor here" in gone["error"]
    assert part["error"] == "owner/name has no folder 'fr'; its folders: de, en"
    assert sorted(hub.downloads) == ["de/train.txt", "en/train.txt", "en/valid.csv"]


def test_card_must_agree_with_the_names(hub, home):
    rows = contents("jsonl", ["a", "b"])
    hub.revisions[OLD] = {"data/train-0.jsonl": rows, "valid.jsonl": FILES["train.jsonl"]}
    hub.revisions[OLD]["README.md"] = (CARD % "data/train-*").encode()
    (agreeing,) = load_all(home, hub, spec())
    assert agreeing["train"] == ["a", "b"]
    hub.revisions[NEW] = hub.revisions[OLD] | {"more.jsonl": rows}
    refused, folder = load_all(home, hub, spec(), spec("owner/name:data"))
    assert "the README.md of owner/name declares configurations or splits" in refused["error"]
    assert "(more.jsonl); name a folder of it, as in owner/name:data, or" in refused["error"]
    assert folder["train"] == ["a"]


def test_large_data_are_refused_unless_a_file_is_named(hub, home):
    hub.revisions[OLD] = FILES | {"train-1.jsonl": 12 * 10**9}
    refused, named = load_all(home, hub, spec(), spec(train_file="train.jsonl"))
    assert "owner/name is a download of 12 GB; name a file of it by train_file" in refused["error"]
    assert hub.downloads == ["train.jsonl"]
    assert named["train"] == ["train 0"]


def test_cache_of_another_program(home):
    """blobs, snapshots and refs alone: it may lack files, which is said."""
    place = home / "hub" / "datasets--owner--name"
    snapshot = place / "snapshots" / OLD
    for folder in (snapshot, place / "blobs", place / "refs"):
        folder.mkdir(parents=True)
    (place / "refs" / "main").write_text(OLD)
    for name, content in FILES.items():
        (place / "blobs" / name[:3]).write_bytes(content)
        (snapshot / name).symlink_to(place / "blobs" / name[:3])
    loaded, pinned = load_all(home, None, spec(), spec(revision=OLD))
    assert loaded["train"] == pinned["train"] == ["train 0", "train 1"]
    assert loaded["spec"]["revision"] == OLD
    assert "files of owner/name that are not in the cache (" in pinned["note"]
    assert "any newer revision of owner/name" in loaded["note"]
