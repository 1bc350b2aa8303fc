"""The safetensors format: every header is checked, every file is written atomically.

This module does not use tinygrad's, whose writer is not atomic and whose reader trusts the header.
"""

import json
import math
import os
from typing import BinaryIO

import numpy as np

from .files import PicoError, atomic_write

MAX_HEADER = 100 << 20  # bytes; the limit of the safetensors package

# NumPy has no BF16: a BF16 number is read as the upper half of a float32, which is exact
KINDS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
DTYPES = {name: np.dtype(kind) for name, kind in KINDS.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}

# name -> (dtype's name, shape, first byte, end); bytes count from the start of the data
Entries = dict[str, tuple[str, tuple[int, ...], int, int]]


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a .safetensors file, and its metadata. BF16 becomes float32.

    Raises PicoError, naming the file and the defect, unless the header is valid and the tensors
    fill the rest of the file exactly, without overlaps or holes.
    """
    entries, metadata, data = _read(path, whole=True)
    tensors = {}
    for name, (kind, shape, first, end) in entries.items():
        array = np.frombuffer(data[first:end], DTYPES[kind])
        if kind == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = array.reshape(shape).copy()
    return tensors, metadata


def read_header(path: str | os.PathLike) -> tuple[Entries, dict[str, str]]:
    """The tensors' entries and the metadata, checked as in `read_safetensors` without the data."""
    return _read(path, whole=False)[:2]


def _read(path: str | os.PathLike, whole: bool) -> tuple[Entries, dict[str, str], bytes]:
    """(entries, metadata, data); data is empty unless `whole`."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            entries, metadata, end = _parse_header(file, size)
            data = file.read(end) if whole else b""
            if whole and len(data) != end:
                raise ValueError("it changed while it was read")
            return entries, metadata, data
    except OSError as error:
        raise PicoError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise PicoError(f"{path} is broken, or no safetensors file: {error}") from error


def _parse_header(file: BinaryIO, size: int) -> tuple[Entries, dict[str, str], int]:
    """(entries, metadata, bytes of data); leaves the file position at the start of the data."""
    start = file.read(8)
    if start.startswith(b"PK\3\4"):  # a zip archive
        raise ValueError("it is a file of torch.save; examples/interop.py converts it")
    length = int.from_bytes(start, "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise ValueError("it is shorter than its header")
    header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are no text")
    entries = {name: _check_entry(name, entry) for name, entry in header.items()}
    end = 0
    for _, _, first, last in sorted(entries.values(), key=lambda entry: entry[2:]):
        if first != end:
            raise ValueError("its tensors overlap or leave holes")
        end = last
    if end != size - 8 - length:
        raise ValueError(f"its tensors take {end} bytes, it has {size - 8 - length}: truncated?")
    return entries, metadata, end


def _unique(pairs: list[tuple]) -> dict:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("its header contains a name twice")
    return dict(pairs)


def _check_entry(name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    try:
        kind, shape, (first, end) = (entry[key] for key in ("dtype", "shape", "data_offsets"))
        numbers = [*shape, first, end]
        valid = len(entry) == 3 and len(shape) <= 32 and isinstance(shape, list)
        valid &= all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
        if valid and end - first == math.prod(shape) * DTYPES[kind].itemsize:
            return kind, tuple(shape), first, end
    except (KeyError, TypeError, IndexError, ValueError):
        pass
    raise ValueError(f"its entry {name[:80]!r} is no tensor: {str(entry)[:80]}")


def write_safetensors(
    path: str | os.PathLike, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Write arrays as a .safetensors file, atomically. Raises PicoError if that fails."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    # the widest types first, so that each tensor is aligned to its own width
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    end = 0
    for name in order:
        array, first = tensors[name], end
        end += array.nbytes
        kind = NAMES[array.dtype.newbyteorder("<")]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = tensors[name]
            file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
