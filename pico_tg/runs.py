"""The folder of a training run: training.json, metrics.jsonl and the checkpoints.

- training.json: settings, data, model and devices of the run
- metrics.jsonl: a record a step. It is only appended to: after a crash, the resumed run repeats
  the steps since its checkpoint, and the last record of a step counts
- NNNNNNNN.safetensors, NNNNNNNN.state.safetensors: see `pico_tg.checkpoint`
"""

import contextlib
import dataclasses
import json
import math
import os
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: two processes can train one run
    fcntl = None

from .checkpoint import (
    delete_older,
    list_checkpoints,
    load_weights,
    quarantine,
    remove_leftovers,
    save_checkpoint,
)
from .config import Config, TrainSettings
from .costs import CLOSE, validation_steps, validations_left
from .files import PicoError, atomic_write, command, did_you_mean, differences
from .model import Pico
from .progress import say

SHIPPED = Path(__file__).parent / "stories"  # the model that comes with the package
Record = dict[str, Any]
DESCRIBED = {"settings", "dataset", "model", "devices", "fingerprints"}  # keys of training.json
BITS = "validation_bits_per_byte"  # the figure that decides which checkpoint is the best
MAY_CHANGE = (
    "epochs", "max_steps", "max_minutes", "validation_interval", "checkpoint_interval",
    "keep_checkpoints", "keep_best",
)  # fmt: skip
FIRST_MEASURED = 5  # steps before the time that is left is estimated


@dataclass
class Progress:
    """The progress of a run, which a checkpoint holds as JSON.

    - step: completed steps; steps: number of steps at which training ends
    - windows: position in the order of the windows; bytes: bytes trained on
    - seconds: time spent in steps, without compiling and pauses
    """

    step: int = 0
    bytes: int = 0
    windows: int = 0
    steps: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        # of this process; no fields, so that no checkpoint holds them
        self.steps_here = 0
        self.step_times: deque[float] = deque(maxlen=101)  # without the steps that compile
        self.validation_times: list[float] = []

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """The progress in a checkpoint of this or an earlier version; missing keys are 0."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    def took(self, seconds: float, windows: int, bytes_: int) -> None:
        """Count a step. A process compiles in its first two steps; they count with the mean time.

        A later step counts with at most ten mean times, since more is a pause (Ctrl-Z).
        """
        self.steps_here += 1
        mean = self.seconds / max(1, self.step)
        if self.steps_here <= 2:
            seconds = mean
        else:
            self.step_times.append(seconds)
            seconds = min(seconds, 10 * mean) if mean else seconds
        self.seconds += seconds
        self.step += 1
        self.windows += windows
        self.bytes += bytes_

    def position(self, settings: TrainSettings) -> float:
        """The position on the learning rate's curve: steps or time, whichever is further."""
        limit = settings.max_minutes * 60 or math.inf  # seconds
        return max(self.step, self.steps * self.seconds / limit)

    def validation_due(self, settings: TrainSettings) -> bool:
        """Whether a validation is made after this step, unless it is the last one.

        That is each validation_interval, but none shortly before the last step, which has its own.
        """
        last = self.step * self.steps / max(1, self.position(settings))
        interval = settings.validation_interval
        return self.step % interval == 0 and last - self.step >= CLOSE * interval

    def seconds_left(self, settings: TrainSettings, held_out: int) -> float | None:
        """The time to the end of the run by the medians of its steps and validations.

        None before FIRST_MEASURED steps are measured. The first validation compiles; before the
        second one, its time follows from that of the steps.
        """
        if len(self.step_times) < FIRST_MEASURED:
            return None
        step, validations = median(self.step_times), self.validation_times[1:]
        limit = 60 * settings.max_minutes - self.seconds if settings.max_minutes else math.inf
        steps = max(0, min(self.steps - self.step, limit / step))
        validation = median(validations or [step * validation_steps(settings, held_out)])
        if not steps:
            return 0.0
        # the last one measures top-k routing, too
        count = 1 + validations_left(settings, self.step, self.step + steps)
        return step * steps + validation * count


class Run:
    """The folder of a run, locked against other training processes until `close`.

    Raises PicoError if it is being trained already, or if the folder cannot be written.
    """

    def __init__(self, folder: Path, resumed: bool) -> None:
        """Make the folder of a new run, or open that of a run to resume."""
        self.folder = folder
        self.saved_step = 0  # of the last checkpoint, even if writing it failed
        self.logged_step = 0  # of the last record
        self.best = (math.inf, 0)  # bits per byte of the best validation, and its step
        self.last: Record = {}  # the record of the step after which the run is resumed
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(folder / ".lock", "ab")  # noqa: SIM115
        except OSError as error:
            raise PicoError(f"cannot write to {folder}: {error.strerror or error}") from error
        try:
            if fcntl is not None:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.close()
            raise PicoError(
                f"{folder} is being trained; wait for that process, or stop it (in one script, "
                "records.close() ends the training of records = train(…))"
            ) from None
        except OSError:
            pass  # a file system without locks: two processes can train one run
        if not resumed:
            try:
                check_startable(folder)  # again: before the lock another process may have trained
            except PicoError:
                self.close()
                raise
            (folder / "metrics.jsonl").unlink(missing_ok=True)
        remove_leftovers(folder)

    def close(self) -> None:
        """Allow other processes to train the run."""
        self.lock.close()

    def describe(self, description: dict[str, Any]) -> None:
        """Write training.json."""
        with atomic_write(self.folder / "training.json") as file:
            file.write((json.dumps(description, indent=2) + "\n").encode())

    def save(
        self,
        weights: dict[str, np.ndarray],
        state: dict[str, np.ndarray],
        progress: Progress,
        settings: TrainSettings,
    ) -> None:
        """Write a checkpoint, delete the ones that need not be kept."""
        self.saved_step = step = progress.step
        save_checkpoint(weights, state, dataclasses.asdict(progress), self.folder)
        spared = self.best[1] if settings.keep_best else None
        delete_older(self.folder, step, settings.keep_checkpoints, spared)

    def log(self, record: Record) -> None:
        """Append a line to metrics.jsonl, durably if the record names a checkpoint.

        Other processes can read the line immediately. Raises PicoError if it cannot be written.
        """
        self._append(json.dumps(record) + "\n", durable="checkpoint" in record)
        self.logged_step = record["step"]

    def _append(self, text: str, durable: bool = False) -> None:
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
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

    def resume_after(self, step: int) -> None:
        """Continue after the checkpoint of `step`; quarantine later ones, which are not valid."""
        self.saved_step = self.logged_step = step
        checkpoints = dict(list_checkpoints(self.folder))
        for later in (path for at, path in checkpoints.items() if at > step):
            quarantine(later)
        path = self.folder / "metrics.jsonl"
        if path.exists():
            for record in read_metrics(self.folder):
                if record["step"] <= step and record["step"] in checkpoints:
                    self.is_best(record)
                if record["step"] == step:
                    self.last = record
            if not path.read_bytes().endswith(b"\n"):  # a killed process left part of a line
                self._append("\n")


# Reading a run ----------------------------------------------------------------------------------


def model_folder(path: str | os.PathLike) -> Path:
    """The folder of the model PATH; `stories` is SHIPPED unless a model `stories` exists here."""
    own = os.path.exists(os.path.join(path, "model.json"))
    return SHIPPED if os.fspath(path) == "stories" and not own else Path(path)


def load_config(path: str | os.PathLike, remedy: str = "") -> Config:
    """The Config of the model PATH. Raises PicoError if it has no valid model.json.

    remedy: what to do if there is none, in place of the command that makes a model
    """
    folder = model_folder(path)
    if folder.is_file():
        raise PicoError(f"{path} is a file; give the folder of a model, which holds model.json")
    if not (folder / "model.json").exists():
        if not remedy and (folder.parent / "model.json").exists() and list_checkpoints(folder):
            raise PicoError(f"{path} is a run, not a model; write {folder.parent} {folder.name}")
        why = "it holds no model.json" if folder.exists() else "there is no such folder"
        remedy = remedy or f"to train one, begin with: {command('init', path)}"
        there = [file.parent.name for file in folder.parent.glob("*/model.json")]
        there += [SHIPPED.name] if folder.parent == Path() else []
        meant = did_you_mean(folder.name, there, folder.parent)
        raise PicoError(f"{path} is no model{meant}: {why}; {remedy}")
    return Config.from_json(folder / "model.json")


def run_folder(path: str | os.PathLike, run: str | os.PathLike) -> Path:
    """The folder of RUN in the model PATH. Raises PicoError if RUN leads out of PATH."""
    name = Path(run)
    if name.is_absolute() or ".." in name.parts or name == Path():
        raise PicoError(f"RUN must name a run of {path}, not {os.fspath(run)!r}{_misplaced(run)}")
    return model_folder(path) / name


def _misplaced(run: str | os.PathLike) -> str:
    if os.path.isfile(run):
        return "; a DATASET follows the RUN"
    return "; a text follows --prompt (run) or --text (eval)" if " " in os.fspath(run) else ""


def existing_run(path: str | os.PathLike, run: str | os.PathLike) -> Path:
    """`run_folder`. Raises PicoError, naming the runs that the model has, if it does not exist."""
    folder = run_folder(path, run)
    if not folder.is_dir():
        there = ", ".join(runs_of(path))
        way = f"its runs are: {there}" if there else f"make one with: {command('train', path, run)}"
        raise PicoError(f"{path} has no run {run}; {way}{_misplaced(run)}")
    return folder


def runs_of(path: str | os.PathLike) -> list[str]:
    """The runs of the model PATH that have a checkpoint, that of the newest one first."""
    model = model_folder(path)
    folders = {file.parent for file in model.rglob("*.safetensors")}
    newest = [found[-1][1] for folder in folders if (found := list_checkpoints(folder))]
    newest.sort(key=lambda file: (file.stat().st_mtime_ns, file), reverse=True)
    return [file.parent.relative_to(model).as_posix() for file in newest]


def find_checkpoint(run_dir: str | os.PathLike, checkpoint: int | str = -1) -> Path:
    """The checkpoint of a step, -1 for the newest, -2 for the one before, or "best".

    "best" is the checkpoint of the best validation. Raises PicoError, naming the existing
    checkpoints, if there is no such checkpoint.
    """
    found = dict(list_checkpoints(run_dir))
    if not found:
        model, run = Path(run_dir).parent, Path(run_dir).name
        if stored := find_description(Path(run_dir)):
            first = stored["settings"].get("checkpoint_interval", TrainSettings.checkpoint_interval)
            raise PicoError(
                f"{run_dir} has no checkpoint; in training the first one comes after step {first}; "
                f"if training was killed: {command('train', model, run, '--resume')}"
            )
        raise PicoError(
            f"{run_dir} has no checkpoint; make one with: {command('train', model, run)}"
        )
    if checkpoint == "best":
        measured = [step for step in best_validations(run_dir) if step in found]
        if not measured:
            raise PicoError(f"no checkpoint of {run_dir} was validated; name one by its step")
        return found[measured[0]]
    if checkpoint in found:
        return found[checkpoint]
    if isinstance(checkpoint, int) and 0 < -checkpoint <= len(found):
        return list(found.values())[checkpoint]
    steps = ", ".join(map(str, found))
    raise PicoError(f"{run_dir} has no checkpoint {checkpoint}; checkpoints exist of steps {steps}")


def newest_run(path: str | os.PathLike) -> str:
    """The run of the model PATH that has the newest checkpoint, or else one in training.

    Raises PicoError if there is none.
    """
    load_config(path)
    if not (runs := runs_of(path)):
        for described in Path(path).rglob("training.json"):  # `find_checkpoint` says more
            return described.parent.relative_to(path).as_posix()
        train = command("train", path, "RUN", "DATASET")
        raise PicoError(f"no run of {path} has a checkpoint; make one with: {train}")
    return runs[0]


def best_validations(run_dir: str | os.PathLike) -> list[int]:
    """The steps of a run's validations, the best first, whether or not they have a checkpoint."""
    measured = {r["step"]: r[BITS] for r in read_metrics(Path(run_dir)) if BITS in r}
    return sorted(measured, key=lambda step: measured[step])


def load(path: str | os.PathLike, run: str | None = None, checkpoint: int | str = -1) -> Pico:
    """The model PATH with weights of RUN: the newest (-1), an older one (-2, …), a step or "best".

    path: a folder, or `stories`, the model that comes with the package; run: by default the one
    with the newest checkpoint. Says on stderr if RUN was trained with another model.json. Raises
    PicoError if there is no such model, run or checkpoint, or if it is broken.
    """
    config = load_config(path)
    weights = find_checkpoint(existing_run(path, run or newest_run(path)), checkpoint)
    model = Pico(config, fresh=False)
    load_weights(model, weights)
    if line := edited(config, weights.parent):
        say(line)
    return model


def find_description(folder: Path) -> dict[str, Any] | None:
    """A run's training.json; None if there is none of pico_tg, only weights from elsewhere.

    Raises PicoError if the file is broken.
    """
    path = folder / "training.json"
    try:
        description = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PicoError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise PicoError(f"{path} is broken ({error})") from error
    if isinstance(description, dict) and not description.keys() & DESCRIBED:
        return None  # of another program, such as the published implementation
    if not isinstance(description, dict) or not description.keys() >= DESCRIBED:
        raise PicoError(f"{path} is broken: it must hold {', '.join(sorted(DESCRIBED))}")
    for key in ("settings", "dataset", "model"):
        if not isinstance(description[key], dict):
            raise PicoError(f"{path} is broken: {key} must be an object")
    return description


def read_description(folder: Path) -> dict[str, Any]:
    """`find_description`. Raises PicoError if there is none."""
    if (description := find_description(folder)) is None:
        raise PicoError(
            f"{folder} is no training run to resume: it has no training.json of pico_tg"
        )
    return description


def ancestry(run: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A run and the runs from whose weights it started, each with its training.json.

    It ends at weights whose run has none. Raises PicoError if a training.json is broken.
    """
    seen: set[Path] = set()
    while run not in seen and (stored := find_description(run)) is not None:
        yield run, stored
        seen.add(run)
        base = stored.get("base_weights")
        if base and not isinstance(base, str):
            raise PicoError(f"{run}/training.json is broken: base_weights must be a path")
        run = Path(base).parent if base else run


def read_metrics(folder: Path) -> list[Record]:
    """The records in a run's metrics.jsonl, one a step; an incomplete line is skipped.

    A record replaces those of its own and of later steps that were logged before: a resumed run
    repeats the steps since its checkpoint. Raises PicoError if the file cannot be read.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        why = "only the command train writes it, into its runs"
        raise PicoError(f"{folder} has no metrics.jsonl: {why}") from None
    except OSError as error:
        raise PicoError(f"cannot read {path}: {error.strerror or error}") from error
    records: list[Record] = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            # earlier versions logged NaN, which is not JSON: that figure counts as missing
            record = json.loads(line, parse_constant=lambda _: None)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                record = {name: value for name, value in record.items() if value is not None}
                while records and records[-1]["step"] >= record["step"]:
                    records.pop()
                records.append(record)
    return records


# Starting and resuming --------------------------------------------------------------------------


def check_startable(folder: Path) -> None:
    """Raise PicoError unless a new run may be trained in `folder`.

    `folder` must not exist, or hold only files of a run that ended before its first checkpoint.
    """
    if SHIPPED.resolve() in folder.resolve().parents:
        tune = command("train", "models/mine", folder.name, "DATASET", "--from", "stories", "first")
        raise PicoError(f"the model stories stays as it comes with the package; copy it: {tune}")
    left = r"\.lock|training\.json|metrics\.jsonl|\d{8,}\.state\.safetensors|\..*\.tmp"
    if not folder.exists() or (
        folder.is_dir() and all(re.fullmatch(left, p.name) for p in folder.iterdir())
    ):
        return
    raise PicoError(f"{folder} exists; continue it with --resume, choose another RUN, or delete it")


def stored_settings(stored: dict[str, Any], run: Path) -> TrainSettings:
    """The settings of a run, from its training.json. Raises PicoError if one is unknown."""
    try:
        return TrainSettings(**stored["settings"])
    except PicoError as error:
        raise PicoError(f"{run}/training.json: {error}") from None


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


def edited(config: Config, run: Path) -> str:
    """What `check_model` says of a run; "" if nothing, or if its weights are from elsewhere."""
    try:
        if stored := find_description(run):
            check_model(config, stored, run)
    except PicoError as error:
        return str(error)
    return ""
