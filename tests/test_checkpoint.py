"""Files: read what the safetensors package writes and the reverse; never trust a header."""

import contextlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from tinygrad import Tensor, nn

from pico_tg.checkpoint import (
    list_checkpoints,
    load_config,
    load_weights,
    save_weights,
)
from pico_tg.config import Config
from pico_tg.files import PicoError
from pico_tg.model import Pico
from pico_tg.runs import find_checkpoint, load
from pico_tg.safetensors import read_safetensors, write_safetensors

GOLDEN = Path(__file__).parent / "golden" / "small.safetensors"
CONFIG = Config.from_json(GOLDEN.with_suffix(".json"))


def example() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    kinds = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1"]
    tensors = {kind: (rng.normal(size=(3, 2)) * 9).astype(kind) for kind in kinds}
    return tensors | {"?": np.array([True, False, True]), "scalar": np.array(3, np.float32)}


@pytest.fixture(scope="module")
def model() -> Pico:
    return Pico(CONFIG)


def test_the_package_reads_ours(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", example(), {"step": "3"})
    found = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    for name, array in example().items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


def test_we_read_the_package_s(tmp_path):
    safetensors.numpy.save_file(example(), tmp_path / "a.safetensors", {"step": "3"})
    found, metadata = read_safetensors(tmp_path / "a.safetensors")
    assert metadata == {"step": "3"}
    assert found.keys() == example().keys()
    for name, array in example().items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


def by_hand(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(kind: str, shape: list, first: int, last: int) -> dict:
    return {"dtype": kind, "shape": shape, "data_offsets": [first, last]}


def test_bf16_is_read_exactly(tmp_path):
    values = np.array([1.5, -2.0, 3.140625], np.float32)
    halves = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    path = by_hand(tmp_path / "a", {"x": entry("BF16", [3], 0, 6)}, halves)
    assert np.array_equal(read_safetensors(path)[0]["x"], values)


BROKEN = {
    "empty file": (b"", b"", 0),
    "absurd header size": ({}, b"", 1 << 62),
    "header longer than the file": ({}, b"", 3),
    "no JSON": (b"{{{", b"", None),
    "no object": ([], b"", None),
    "no text": (b"\xff\xfe", b"", None),
    "deep": (b"[" * 100_000, b"", None),
    "duplicate": (b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":{}}', b"", None),
    "unknown type": ({"x": entry("F9", [1], 0, 1)}, b"1", None),
    "type no text": ({"x": entry(["U8"], [1], 0, 1)}, b"1", None),
    "negative": ({"x": entry("U8", [-1], 0, 1)}, b"1", None),
    "bool": ({"x": entry("U8", [True], 0, 1)}, b"1", None),
    "size": ({"x": entry("F32", [2], 0, 4)}, b"1234", None),
    "huge": ({"x": entry("U8", [1 << 40], 0, 1 << 40)}, b"1", None),
    "overlap": ({"x": entry("U8", [2], 0, 2), "y": entry("U8", [2], 1, 3)}, b"123", None),
    "hole": ({"x": entry("U8", [1], 0, 1), "y": entry("U8", [1], 2, 3)}, b"123", None),
    "truncated": ({"x": entry("U8", [4], 0, 4)}, b"123", None),
    "too long": ({"x": entry("U8", [2], 0, 2)}, b"123", None),
    "extra key": ({"x": entry("U8", [1], 0, 1) | {"y": 1}}, b"1", None),
    "metadata": ({"__metadata__": {"a": 1}}, b"", None),
}


@pytest.mark.parametrize(("header", "data", "length"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused(header, data, length, tmp_path):
    path = by_hand(tmp_path / "broken", header, data, length)
    with pytest.raises(PicoError, match="broken"):
        read_safetensors(path)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_damage_reads_or_is_refused(data):
    """Flip, cut, append: a PicoError or tensors, nothing else, and no absurd memory."""
    raw = bytearray(DAMAGED)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, min(400, len(raw) - 1)))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    path = Path(FOLDER) / "damaged"
    path.write_bytes(raw)
    with contextlib.suppress(PicoError):
        read_safetensors(path)


@pytest.fixture(scope="module", autouse=True)
def damaged(tmp_path_factory):
    global FOLDER, DAMAGED
    FOLDER = tmp_path_factory.mktemp("damage")
    write_safetensors(FOLDER / "whole", example())
    DAMAGED = (FOLDER / "whole").read_bytes()


def test_the_golden_weights_load_and_are_saved_the_same(model, tmp_path):
    load_weights(model, GOLDEN)
    save_weights(model, tmp_path / "again.safetensors")
    again = safetensors.numpy.load_file(tmp_path / "again.safetensors")
    golden = safetensors.numpy.load_file(GOLDEN)
    assert again.keys() == golden.keys()
    assert all(np.array_equal(again[name], golden[name]) for name in golden)


@pytest.mark.parametrize("kind", ["f2", "f8"])
def test_other_widths_become_the_model_s(kind, model, tmp_path):
    golden = safetensors.numpy.load_file(GOLDEN)
    write_safetensors(tmp_path / "a", {name: array.astype(kind) for name, array in golden.items()})
    load_weights(model, tmp_path / "a")
    for name, tensor in nn.state.get_state_dict(model).items():
        assert tensor.numpy().dtype == np.float32
        assert np.array_equal(tensor.numpy(), golden[name].astype(kind).astype(np.float32))


def test_loading_keeps_the_buffers(model):
    """Compiled graphs refer to them."""
    before = {n: t.uop.buffer for n, t in nn.state.get_state_dict(model).items()}
    load_weights(model, GOLDEN)
    assert all(t.uop.buffer is before[n] for n, t in nn.state.get_state_dict(model).items())


@pytest.mark.parametrize("defect", ["missing", "extra", "shape", "integers", "foreign"])
def test_weights_that_do_not_fit_change_nothing(defect, model, tmp_path):
    arrays = {n: np.zeros_like(a) for n, a in safetensors.numpy.load_file(GOLDEN).items()}
    if defect == "missing":
        del arrays["norm.weight"]
    elif defect == "extra":
        arrays["depth.weight"] = np.zeros(3, np.float32)
    elif defect == "shape":
        arrays["norm.weight"] = np.zeros(3, np.float32)
    elif defect == "integers":
        arrays["norm.weight"] = arrays["norm.weight"].astype(np.int32)
    else:
        arrays = {"other": np.zeros(3, np.float32)}
    write_safetensors(tmp_path / "bad", arrays)
    load_weights(model, GOLDEN)
    with pytest.raises(PicoError, match="bad does not fit the model"):
        load_weights(model, tmp_path / "bad")
    assert np.abs(model.embedding.weight.numpy()).max() > 0


def test_finding_checkpoints(tmp_path):
    run = tmp_path / "model" / "run"
    run.mkdir(parents=True)
    with pytest.raises(PicoError, match=r"pico_tg train .*model run"):
        find_checkpoint(run)
    for step in (5, 100, 20):
        write_safetensors(run / f"{step:08d}.safetensors", {})
    (run / ".00000900.safetensors.x.tmp").write_bytes(b"")
    (run / "notes.safetensors").write_bytes(b"")
    assert [step for step, _ in list_checkpoints(run)] == [5, 20, 100]
    names = [find_checkpoint(run, i).name for i in (-1, -3, 20)]
    assert names == ["00000100.safetensors", "00000005.safetensors", "00000020.safetensors"]
    for missing in (-4, 7):
        with pytest.raises(PicoError, match="5, 20, 100"):
            find_checkpoint(run, missing)


def test_load(tmp_path):
    CONFIG.to_json(tmp_path / "model.json")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "00000001.safetensors").write_bytes(GOLDEN.read_bytes())
    found = load(tmp_path, "run")
    assert np.array_equal(found.norm.weight.numpy(), read_safetensors(GOLDEN)[0]["norm.weight"])
    with pytest.raises(PicoError, match="init"):
        load_config(tmp_path / "run")


def test_writing_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PicoError, match="cannot write"):
        write_safetensors(tmp_path / "file" / "a.safetensors", {})


def test_saving_over_a_file_that_is_open(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": np.zeros(1000, np.float32)})
    with open(path, "rb") as file:
        old = np.memmap(file, np.uint8, "r")
        write_safetensors(path, {"x": np.ones(1000, np.float32)})
        assert not old[-4000:].any()
    assert read_safetensors(path)[0]["x"].all()
    assert os.listdir(tmp_path) == ["a.safetensors"]


def write_for_ever(path: Path, report: int) -> None:
    i = 0
    while True:
        i += 1
        os.write(report, b".")
        write_safetensors(path, {"x": np.full(1 << 18, i, np.float32)})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_saving(tmp_path):
    """SIGKILL at random moments, 30 times: the file is always one of those written, whole."""
    path = tmp_path / "a.safetensors"
    moments = random.Random(0)
    for _ in range(30):
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            try:
                write_for_ever(path, writing)
            finally:
                os._exit(1)
        os.close(writing)
        assert os.read(reading, 1) == b"."  # it has begun
        time.sleep(moments.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(reading)
        if path.exists():
            x = read_safetensors(path)[0]["x"]
            assert x[0] >= 1
            assert (x == x[0]).all()
    assert path.exists()


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_keeps_the_old_file(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        path = tmp_path / "a.safetensors"
        write_safetensors(path, {"x": np.ones(1 << 18, np.float32)})
        with pytest.raises(PicoError, match="No space left"):
            write_safetensors(path, {"x": np.zeros(1 << 18, np.float32)})
        assert read_safetensors(path)[0]["x"].all()
        assert os.listdir(tmp_path) == ["a.safetensors"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_tensors_survive_a_round_trip(tmp_path):
    """Through tinygrad as well: what is loaded is what computes."""
    model = Pico(CONFIG)
    load_weights(model, GOLDEN)
    x = Tensor(np.arange(32, dtype=np.uint8).reshape(1, 32))
    first = model(x)[0].numpy()
    save_weights(model, tmp_path / "w")
    other = Pico(CONFIG)
    load_weights(other, tmp_path / "w")
    assert np.array_equal(other(x)[0].numpy(), first)
