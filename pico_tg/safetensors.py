"""The safetensors format: every header is checked, every file is written atomically.

This module does not use tinygrad's, whose writer is not atomic and whose reader trusts the header.
"""

import json
import math
import os
import struct
from typing import BinaryIO

import numpy as np

from .files import PicoError, atomic_write

MAX_HEADER = 100 << 20  # bytes; the limit of the safetensors package

# NumPy has no BF16: a BF16 number is read as the upper half of a float32, which is exact
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}

# name -> (dtype's name, shape, first byte, end); bytes count from the start of the data
Entries = dict[str, tuple[str, tuple[int, ...], int, int]]


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a .safetensors file, and its metadata. BF16 becomes float32.

    Raises PicoError, naming the file and the defect, unless the header is valid and the tensors
    fill the rest of the file exactly, without overlaps or holes.
    """
    try:
        with open(path, "rb") as file:
            entries, metadata, size = _parse_header(file, path)
            data = file.read(size)
    except OSError as error:
        raise PicoError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) != size:
        raise PicoError(f"{path} is broken: it changed while it was read")
    tensors = {}
    for name, (kind, shape, first, end) in entries.items():
        array = np.frombuffer(data[first:end], DTYPES[kind])
        if kind == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = array.reshape(shape).copy()
    return tensors, metadata


def read_header(path: str | os.PathLike) -> tuple[Entries, dict[str, str]]:
    """The tensors' entries and the metadata, checked as in `read_safetensors` without the data."""
    try:
        with open(path, "rb") as file:
            return _parse_header(file, path)[:2]
    except OSError as error:
        raise PicoError(f"cannot read {path}: {error.strerror or error}") from error


def _parse_header(file: BinaryIO, path: str | os.PathLike) -> tuple[Entries, dict[str, str], int]:
    """(entries, metadata, bytes of data); leaves the file position at the start of the data."""

    def broken(why: str) -> PicoError:
        return PicoError(f"{path} is not a valid safetensors file: {why}")

    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise broken("it is shorter than a header")
    start = file.read(8)
    if start.startswith(b"PK\3\4"):  # a zip archive
        raise PicoError(
            f"{path} is a file of torch.save, not safetensors; examples/interop.py converts it"
        )
    (length,) = struct.unpack("<Q", start)
    if length > min(size - 8, MAX_HEADER):
        raise broken(f"its header claims {length} bytes, the file has {size} in all")

    def unique(pairs: list[tuple]) -> dict:
        if len(dict(pairs)) != len(pairs):
            raise broken("its header contains a name twice")
        return dict(pairs)

    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise broken("its header is not JSON") from error
    if not isinstance(header, dict):
        raise broken("its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise broken("its metadata are not text")
    entries = {name: _check_entry(name, entry, broken) for name, entry in header.items()}
    end = 0
    for _, _, first, last in sorted(entries.values(), key=lambda entry: entry[2:]):
        if first != end:
            raise broken("its tensors overlap or leave holes")
        end = last
    if end != size - 8 - length:
        raise broken(f"its tensors take {end} bytes, it has {size - 8 - length}: truncated?")
    return entries, metadata, end


def _check_entry(name: str, entry: object, broken) -> tuple[str, tuple[int, ...], int, int]:
    def whole(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise broken(f"the entry {name!r} does not have the keys dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise broken(f"{name!r} has the unknown type {kind!r}")
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(whole, shape)):
        raise broken(f"{name!r} has the shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(whole, offsets)):
        raise broken(f"{name!r} has the offsets {str(offsets)[:80]}")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[kind].itemsize:
        raise broken(f"{name!r} has a shape that does not fit its bytes")
    return kind, tuple(shape), *offsets


def write_safetensors(
    path: str | os.PathLike, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Write arrays as a .safetensors file, atomically. Raises PicoError if that fails."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    # the widest types first, so that each tensor is aligned to its own width
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    offset = 0
    for name in order:
        array = tensors[name]
        end = offset + array.nbytes
        kind = NAMES[array.dtype.newbyteorder("<")]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            array = tensors[name]
            file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
