"""Checkpoints: weights, optimizer state and progress of a training run, as .safetensors files.

A checkpoint of step N is a pair of files. NNNNNNNN.state.safetensors, the optimizer's state and
the progress, is written first; NNNNNNNN.safetensors, the weights alone, completes the pair. Each
file holds a digest of the other's tensors, so a pair of files from different saves is invalid.

The state is several times as large as the weights, and only resuming reads it. So the two newest
checkpoints keep their states: one to resume from, and one in case the first is damaged.
"""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import nn

from .backend.runtime import exclusive, write_into
from .files import PicoError
from .model import Pico
from .safetensors import read_header, read_safetensors, write_safetensors

STATES = 2  # how many of the newest checkpoints keep the optimizer's state


def save_weights(model: Pico, path: str | os.PathLike) -> None:
    """Write `model.weights()` as a .safetensors file."""
    write_safetensors(path, model.weights())


def load_weights(model: Pico, path: str | os.PathLike) -> None:
    """Read weights into the model, in place; F64, F32, F16 and BF16 become float32.

    Raises PicoError, and changes nothing, unless the file holds exactly the model's names and
    shapes, and finite numbers.
    """
    _set_weights(model, read_safetensors(path)[0], path)


@exclusive
def _set_weights(model: Pico, arrays: dict[str, np.ndarray], path: str | os.PathLike) -> None:
    named = nn.state.get_state_dict(model)
    problems = [f"{name} is missing" for name in named if name not in arrays]
    problems += [f"{name} is not of this model" for name in arrays if name not in named]
    for name in named.keys() & arrays.keys():
        if named[name].shape != arrays[name].shape:
            problems.append(f"{name} is {arrays[name].shape}, the model's {named[name].shape}")
        elif arrays[name].dtype.kind != "f":
            problems.append(f"{name} holds {arrays[name].dtype}, not floating-point numbers")
        elif not np.isfinite(arrays[name]).all():
            problems.append(f"{name} holds numbers that are not finite")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise PicoError(f"{path} does not fit the model: {'; '.join(problems[:3])}{more}")
    for name, tensor in named.items():
        write_into(tensor, arrays[name].astype(np.float32))


def save_checkpoint(
    weights: dict[str, np.ndarray],
    state: dict[str, np.ndarray],
    progress: dict[str, Any],
    run_dir: str | os.PathLike,
) -> None:
    """Write the checkpoint of step progress["step"].

    `state` is the optimizer's, `progress` any JSON. Raises PicoError if a file cannot be written;
    older checkpoints stay as they are.
    """
    path = checkpoint_path(run_dir, progress["step"])
    with contextlib.suppress(OSError):  # invalid weights of that step must not join a new state
        path.unlink()
    notes = {"progress": json.dumps(progress), "weights": _digest(weights)}
    write_safetensors(_state_path(path), state, notes)
    try:
        write_safetensors(path, weights, {"state": _digest(state)})
    except PicoError:
        with contextlib.suppress(OSError):  # free the space: the disk may be full
            _state_path(path).unlink()
        raise


def load_checkpoint(model: Pico, path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict]:
    """Read a checkpoint's weights into the model; returns the optimizer's state and `progress`.

    Raises PicoError, and changes nothing, if a file is missing or broken, or if the two files do
    not belong together.
    """
    path = Path(path)
    state_path = _state_path(path)
    state, notes = read_safetensors(state_path)
    weights, marks = read_safetensors(path)
    try:
        progress = json.loads(notes["progress"])
        digests, step = (notes["weights"], marks["state"]), progress["step"]
    except (KeyError, ValueError, TypeError):
        raise PicoError(f"{state_path} is not the state of a training run") from None
    if digests != (_digest(weights), _digest(state)) or path != checkpoint_path(path.parent, step):
        raise PicoError(f"{path} and {state_path.name} do not belong together")
    _set_weights(model, weights, path)
    return state, progress


def check(path: str | os.PathLike) -> None:
    """Raise PicoError if a checkpoint's file is truncated or no safetensors file.

    Only headers and sizes are read. Older checkpoints and weights from elsewhere have no state.
    """
    read_header(path)
    if (state := _state_path(Path(path))).exists():
        read_header(state)


def load_newest(
    model: Pico, run_dir: str | os.PathLike
) -> tuple[Path, dict[str, np.ndarray], dict, list[str]]:
    """`load_checkpoint` of the newest valid one.

    Returns its path, state and progress, and why each newer one is invalid. Raises PicoError if no
    checkpoint is valid.
    """
    refused: list[str] = []
    for _, path in reversed(list_checkpoints(run_dir)):
        try:
            return path, *load_checkpoint(model, path), refused
        except PicoError as error:
            refused.append(str(error))
    why = f": {refused[0]}" if refused else ""
    raise PicoError(
        f"{run_dir} has no checkpoint to resume from{why}; train a new RUN instead, or delete it"
    )


def delete_older(
    run_dir: str | os.PathLike, step: int, keep: int, spared: int | None = None
) -> None:
    """Delete what need not be kept beside the checkpoint of `step`, which is valid.

    Of the checkpoints before, the oldest are deleted until `keep` (0: all) remain together with
    `step`'s. The weights of the step `spared` are not deleted and do not count. Then all but the
    `STATES` newest lose their optimizer's state.
    """
    before = [(at, path) for at, path in list_checkpoints(run_dir) if at < step]
    older = [path for at, path in before if at != spared]
    deleted = older[: max(0, len(older) - (keep - 1))] if keep else []
    kept = [path for _, path in before if path not in deleted]
    without_state = deleted + kept[: len(kept) - (STATES - 1)]
    # first the weights: without weights, a state is a leftover
    for file in (*deleted, *map(_state_path, without_state)):
        with contextlib.suppress(OSError):  # no such file, or a read-only folder, which keeps all
            file.unlink()


def quarantine(path: Path) -> None:
    """Rename an invalid checkpoint's files to *.broken."""
    for file in (path, _state_path(path)):
        with contextlib.suppress(OSError):
            file.rename(f"{file}.broken")


def remove_leftovers(run_dir: str | os.PathLike) -> None:
    """Remove the leftovers of killed processes: half-written files, and states without weights."""
    for file in Path(run_dir).iterdir():
        half = re.fullmatch(r"\.(\d{8,}|training)\..*\.tmp", file.name)
        state = re.fullmatch(r"(\d{8,})\.state\.safetensors", file.name)
        if half or (state and not file.with_name(f"{state[1]}.safetensors").exists()):
            with contextlib.suppress(OSError):
                file.unlink()


def _state_path(weights: Path) -> Path:
    return weights.with_suffix(".state.safetensors")


def _digest(arrays: dict[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].shape} {arrays[name].dtype}".encode())
        total.update(np.ascontiguousarray(arrays[name]))
    return total.hexdigest()


def checkpoint_path(run_dir: str | os.PathLike, step: int) -> Path:
    """Path of the weights after `step` steps: run_dir/NNNNNNNN.safetensors."""
    return Path(run_dir) / f"{step:08d}.safetensors"


def list_checkpoints(run_dir: str | os.PathLike) -> list[tuple[int, Path]]:
    """(step, path of the weights) of a run's checkpoints, oldest first; none without the folder."""
    found = []
    for path in Path(run_dir).glob("*.safetensors"):
        if match := re.fullmatch(r"(\d{8,})\.safetensors", path.name):
            found.append((int(match[1]), path))
    return sorted(found)
