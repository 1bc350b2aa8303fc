"""The folder of a training run: training.json, metrics.jsonl and the checkpoints.

- training.json: settings, data, model and devices of the run, and the names of its checkpoints
- metrics.jsonl: one record a step
- NNNNNNNN.safetensors, NNNNNNNN.state.safetensors: see `pico_tg.checkpoint`
"""

import contextlib
import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import (
    delete_older,
    list_checkpoints,
    load_config,
    load_weights,
    quarantine,
    remove_leftovers,
    save_checkpoint,
)
from .config import Config, TrainSettings
from .files import PicoError, atomic_write, command, differences
from .model import Pico

try:
    import fcntl
except ImportError:  # Windows: nothing prevents two processes from training one run
    fcntl = None

Record = dict[str, Any]
DESCRIBED = {"settings", "dataset", "model", "devices", "fingerprints"}  # keys of training.json
BITS = "validation_bits_per_byte"  # the figure that decides which checkpoint is the best
MAY_CHANGE = (
    "epochs", "max_steps", "max_minutes", "validation_interval", "checkpoint_interval",
    "keep_checkpoints", "keep_best",
)  # fmt: skip


@dataclass
class Progress:
    """The progress of a run, which a checkpoint holds as JSON.

    - step: completed steps; steps: number of steps at which training ends
    - windows: position in the order of the windows; bytes: bytes trained on
    - validated: the step was measured on the held-out data
    - seconds: time spent in steps, without compiling
    """

    step: int = 0
    bytes: int = 0
    windows: int = 0
    steps: int = 0
    validated: bool = False
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """The progress in a checkpoint of this or an earlier version; missing keys are 0."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


class Run:
    """The folder of a run, locked against other training processes until `close`.

    Raises PicoError if another process trains it, or if the folder cannot be written.
    """

    def __init__(self, folder: Path, resumed: bool) -> None:
        """Make the folder of a new run, or open that of a run to resume."""
        self.folder = folder
        self.last_checkpoint: Path | None = None  # the one written or loaded last
        self.saved_step = 0  # the step of the last checkpoint, even if writing it failed
        self.records: list[Record] = []  # records of the steps before resuming
        self.best = (math.inf, 0)  # bits per byte of the best validation, and its step
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(folder / ".lock", "ab")  # noqa: SIM115
        except OSError as error:
            raise PicoError(f"cannot write to {folder}: {error.strerror or error}") from error
        locked = False
        try:
            if fcntl is not None:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
        except BlockingIOError:
            self.lock.close()
            raise PicoError(f"another process trains {folder}; wait for it, or stop it") from None
        except OSError:
            pass  # a file system without locks
        if not resumed:  # again, since another process may have trained the run before the lock
            try:
                check_startable(folder, locked)
            except PicoError:
                self.lock.close()
                raise
        remove_leftovers(folder)
        if not resumed:  # delete the records of a run that ended before its first checkpoint
            with contextlib.suppress(OSError):
                (folder / "metrics.jsonl").unlink()

    def close(self) -> None:
        """Allow other processes to train the run."""
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
        progress: Progress,
        settings: TrainSettings,
    ) -> None:
        """Write a checkpoint, list it in training.json, delete the ones that need not be kept."""
        self.saved_step = step = progress.step
        values = dataclasses.asdict(progress)
        self.last_checkpoint = save_checkpoint(weights, state, values, self.folder)
        if settings.keep_checkpoints:
            spared = self.best[1] if settings.keep_best else None
            delete_older(self.folder, step, settings.keep_checkpoints, spared)
        self.describe(self.description)

    def log(self, record: Record, durable: bool = False) -> None:
        """Append one line to metrics.jsonl; other processes can read it immediately."""
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise PicoError(f"cannot write {path}: {error.strerror or error}") from error

    def is_best(self, record: Record) -> bool:
        """Whether the record holds the best validation so far, which is then stored in `best`."""
        found = (record.get(BITS, math.inf), record["step"])
        better = found[0] < self.best[0]
        self.best = found if better else self.best
        return better

    def truncate_to(self, step: int) -> None:
        """Remove records after `step`; quarantine later checkpoints, which are not valid."""
        checkpoints = dict(list_checkpoints(self.folder))
        for later in (path for at, path in checkpoints.items() if at > step):
            quarantine(later)
        path = self.folder / "metrics.jsonl"
        records = read_metrics(self.folder) if path.exists() else []
        self.records = [record for record in records if record["step"] <= step]
        self.rewrite()
        for record in self.records:
            if record["step"] in checkpoints:
                self.is_best(record)
        self.saved_step = step

    def rewrite(self) -> None:
        """Replace metrics.jsonl by `records`."""
        with atomic_write(self.folder / "metrics.jsonl") as file:
            for record in self.records:
                file.write((json.dumps(record) + "\n").encode())


# Reading a run ----------------------------------------------------------------------------------


def run_folder(path: str | os.PathLike, run: str | os.PathLike) -> Path:
    """The folder of RUN in the model folder PATH. Raises PicoError if RUN leads out of PATH."""
    name = Path(run)
    if name.is_absolute() or ".." in name.parts or name == Path():
        raise PicoError(f"RUN must name a run of {path}, not {os.fspath(run)!r}")
    return Path(path) / name


def find_checkpoint(run_dir: str | os.PathLike, checkpoint: int | str = -1) -> Path:
    """The checkpoint of a step, -1 for the newest, -2 for the one before, or "best".

    "best" is the checkpoint of the best validation. Raises PicoError, naming the existing
    checkpoints, if there is no such checkpoint.
    """
    found = dict(list_checkpoints(run_dir))
    if not found:
        model, run = Path(run_dir).parent, Path(run_dir).name
        raise PicoError(
            f"{run_dir} has no checkpoint; make one with: {command('train', model, run)}"
        )
    if checkpoint == "best":
        records = read_metrics(Path(run_dir))
        measured = {r["step"]: r[BITS] for r in records if r["step"] in found and BITS in r}
        if not measured:
            raise PicoError(f"no checkpoint of {run_dir} was validated; name one by its step")
        return found[min(measured, key=lambda step: measured[step])]
    if checkpoint in found:
        return found[checkpoint]
    if isinstance(checkpoint, int) and 0 < -checkpoint <= len(found):
        return list(found.values())[checkpoint]
    steps = ", ".join(map(str, found))
    raise PicoError(f"{run_dir} has no checkpoint {checkpoint}; checkpoints exist of steps {steps}")


def load(path: str | os.PathLike, run: str, checkpoint: int | str = -1) -> Pico:
    """The model PATH with weights of RUN: the newest (-1), an older one (-2, …), a step or "best".

    Raises PicoError if there is no such model, run or checkpoint, or if it is broken.
    """
    config = load_config(path)
    weights = find_checkpoint(run_folder(path, run), checkpoint)
    model = Pico(config, fresh=False)
    load_weights(model, weights)
    return model


def read_description(folder: Path) -> dict[str, Any]:
    """A run's training.json. Raises PicoError if it is missing, broken or not of pico_tg."""
    path = folder / "training.json"
    try:
        description = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise PicoError(
            f"{folder} is no training run to resume: cannot read {path} ({error.strerror})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise PicoError(f"{path} is broken ({error})") from error
    if isinstance(description, dict) and not description.keys() & DESCRIBED:
        raise _Foreign(f"{path} was not written by pico_tg, so the run cannot be resumed")
    if not isinstance(description, dict) or not description.keys() >= DESCRIBED:
        raise PicoError(f"{path} is broken: it must hold {', '.join(sorted(DESCRIBED))}")
    for key in ("settings", "dataset", "model"):
        if not isinstance(description[key], dict):
            raise PicoError(f"{path} is broken: {key} must be an object")
    return description


class _Foreign(PicoError):
    """The training.json of another program, such as the published implementation."""


def find_description(folder: Path) -> dict[str, Any] | None:
    """A run's training.json; None if pico_tg has written none, only weights from elsewhere."""
    if not (folder / "training.json").exists():
        return None
    try:
        return read_description(folder)
    except _Foreign:
        return None


def read_metrics(folder: Path) -> list[Record]:
    """The records in a run's metrics.jsonl; an incomplete last line is skipped.

    Raises PicoError if the file cannot be read.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise PicoError(
            f"cannot read {path}: {error.strerror or error}; train writes it into a run's folder"
        ) from error
    records = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and isinstance(r.get("step"), int)]


# Starting and resuming --------------------------------------------------------------------------


def check_startable(folder: Path, locked: bool = True) -> None:
    """Raise PicoError unless a new run may be trained in `folder`.

    `folder` must not exist, or hold only files of a run that ended before its first checkpoint.
    Without a lock another process may be training that run, so that `folder` must hold no run.
    """
    left = r"\.lock|training\.json|metrics\.jsonl|\d{8,}\.state\.safetensors|\..*\.tmp"
    if not folder.exists() or (
        folder.is_dir()
        and all(re.fullmatch(left, entry.name) for entry in folder.iterdir())
        and not list_checkpoints(folder)
        and (locked or not (folder / "training.json").exists())
    ):
        return
    raise PicoError(f"{folder} exists; continue it with --resume, choose another RUN, or delete it")


def stored_settings(stored: dict[str, Any], run: Path) -> TrainSettings:
    """The settings of a run, from its training.json. Raises PicoError if one is unknown."""
    known = {field.name for field in dataclasses.fields(TrainSettings)}
    if unknown := ", ".join(sorted(stored["settings"].keys() - known)):
        raise PicoError(f"{run}/training.json has settings that are unknown here: {unknown}")
    return TrainSettings(**stored["settings"])


def resumed_settings(
    given: dict[str, Any], stored: dict[str, Any], force: bool, run: Path
) -> TrainSettings:
    """The settings of a run that is resumed: the stored ones, changed to those given.

    Raises PicoError if a setting is given that may not change; batch_size may with `force`.
    """
    settings = stored_settings(stored, run)
    free = (*MAY_CHANGE, "batch_size") if force else MAY_CHANGE
    fixed = {name: value for name, value in given.items() if name not in free}
    if changed := differences(dataclasses.asdict(settings), fixed):
        hint = "; --force allows another batch_size" if "batch_size was" in changed else ""
        raise PicoError(
            f"{run} was trained with other settings: {changed}; leave these out to resume with the "
            f"stored ones, or train a new RUN{hint}"
        )
    return dataclasses.replace(settings, **given)


def check_model(config: Config, stored: dict[str, Any], run: Path) -> None:
    """Raise PicoError unless the run trained a model of this config."""
    before = dataclasses.asdict(Config.from_dict(stored["model"], f"{run}/training.json: model"))
    if changed := differences(before, dataclasses.asdict(config)):
        raise PicoError(
            f"{run} was trained with another model.json: {changed}; restore it, or train a new RUN"
        )
