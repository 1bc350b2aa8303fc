"""The folder of one training run: training.json, metrics.jsonl and the checkpoints."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import (
    checkpoint_path,
    delete_older,
    list_checkpoints,
    quarantine,
    remove_leftovers,
    save_checkpoint,
)
from .files import PicoError, atomic_write

try:
    import fcntl
except ImportError:  # Windows: nobody watches that a run is trained once at a time
    fcntl = None

Record = dict[str, Any]
DESCRIBED = {"settings", "dataset", "model", "devices", "fingerprints"}


class Run:
    """A run that is being trained, by this process alone until `close`.

    Raises PicoError if another process trains it, or if the folder cannot be written.
    """

    def __init__(self, folder: Path, resumed: bool) -> None:
        """A new run's folder is made."""
        self.folder = folder
        self.last_checkpoint: Path | None = None  # the one written or loaded last
        try:
            if not resumed:
                folder.mkdir(parents=True)
            self.lock = open(folder / ".lock", "ab")  # noqa: SIM115
        except OSError as error:
            raise PicoError(f"cannot write to {folder}: {error.strerror or error}") from error
        try:
            if fcntl is not None:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            raise PicoError(f"another process trains {folder}; wait for it, or stop it") from None
        except OSError:
            pass  # a file system without locks
        remove_leftovers(folder)

    def close(self) -> None:
        """Let others train it."""
        self.lock.close()

    def describe(self, description: dict[str, Any]) -> None:
        """Write training.json."""
        self.description = description
        checkpoints = [path.name for _, path in list_checkpoints(self.folder)]
        with atomic_write(self.folder / "training.json") as file:
            described = description | {"checkpoints": checkpoints}
            file.write((json.dumps(described, indent=2) + "\n").encode())

    def save(
        self,
        weights: dict[str, np.ndarray],
        state: dict[str, np.ndarray],
        progress: dict[str, Any],
        keep: int,
    ) -> None:
        """Write a checkpoint, list it in training.json, delete older ones so that `keep` remain."""
        step = progress["step"]
        self.last_checkpoint = save_checkpoint(weights, state, progress, self.folder, step)
        if keep:
            delete_older(self.folder, step, keep)
        self.describe(self.description)

    def log(self, record: Record, durable: bool = False) -> None:
        """Append one line to metrics.jsonl, readable at once by others."""
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise PicoError(f"cannot write {path}: {error.strerror or error}") from error

    def truncate_to(self, step: int) -> list[Record]:
        """Forget what came after `step`: its records, and checkpoints, which were not valid.

        Returns the records that are left.
        """
        for at, path in list_checkpoints(self.folder):
            if at > step:
                quarantine(path)
        path = self.folder / "metrics.jsonl"
        records = read_metrics(self.folder) if path.exists() else []
        records = [record for record in records if record["step"] <= step]
        self.rewrite(records)
        return records

    def rewrite(self, records: list[Record]) -> None:
        """Write metrics.jsonl anew."""
        with atomic_write(self.folder / "metrics.jsonl") as file:
            for record in records:
                file.write((json.dumps(record) + "\n").encode())

    def checkpoint_path(self, step: int) -> str:
        return str(checkpoint_path(self.folder, step))


def read_description(folder: Path) -> dict[str, Any]:
    """A run's training.json. Raises PicoError if it is missing, broken or not of pico_tg."""
    path = folder / "training.json"
    try:
        description = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise PicoError(
            f"{folder} is no training run to resume: cannot read {path} ({error.strerror})"
        ) from error
    except ValueError as error:
        raise PicoError(f"{path} is broken ({error})") from error
    if isinstance(description, dict) and not description.keys() & DESCRIBED:
        raise _Foreign(f"{path} was not written by pico_tg; the run cannot go on from it")
    if not isinstance(description, dict) or not description.keys() >= DESCRIBED:
        raise PicoError(f"{path} is broken: it must hold {', '.join(sorted(DESCRIBED))}")
    return description


class _Foreign(PicoError):
    """The training.json of another program, such as the published implementation."""


def find_description(folder: Path) -> dict[str, Any] | None:
    """A run's training.json; None if it has none of pico_tg, only weights from elsewhere."""
    if not (folder / "training.json").exists():
        return None
    try:
        return read_description(folder)
    except _Foreign:
        return None


def read_metrics(folder: Path) -> list[Record]:
    """The records in a run's metrics.jsonl; a line still being written is left out.

    Raises PicoError if there is none.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise PicoError(
            f"cannot read {path}: {error.strerror or error}; is {folder} a training run?"
        ) from error
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and isinstance(r.get("step"), int)]
