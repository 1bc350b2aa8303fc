"""The safetensors format: exchange with the safetensors package; no header is trusted."""

import contextlib
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from pico_tg.files import PicoError
from pico_tg.safetensors import read_header, read_safetensors, write_safetensors


def example() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    kinds = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1"]
    tensors = {kind: (rng.normal(size=(3, 2)) * 9).astype(kind) for kind in kinds}
    return tensors | {"?": np.array([True, False, True]), "scalar": np.array(3, np.float32)}


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
    with pytest.raises(PicoError, match="broken"):
        read_header(path)


def test_the_header_alone(tmp_path):
    path = tmp_path / "a"
    write_safetensors(path, {"x": np.ones((2, 3), np.float32)}, {"step": "3"})
    assert read_header(path) == ({"x": ("F32", (2, 3), 0, 24)}, {"step": "3"})


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
