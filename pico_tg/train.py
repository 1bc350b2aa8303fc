"""Training: a generator that yields one record a step; nothing here prints.

for record in train(model, "python-docs", max_steps=200, context_len=512, batch_size=4):
    print(record["step"], record["bits_per_byte"])
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Device, Tensor, dtypes, nn
from tinygrad.helpers import JIT, Context

from .checkpoint import (
    checkpoint_path,
    delete_older,
    list_checkpoints,
    load_newest,
    save_checkpoint,
    weights_of,
)
from .data import Corpus, Data, DataSpec, Windows, load_data
from .files import PicoError, atomic_write
from .kernels import compiled, multiplies_bf16, write_all
from .model import Pico, cross_entropy, loss_fn
from .soap import SOAP

Record = dict[str, Any]


CHOICES = {"optimizer": ("soap", "adamw"), "precision": ("auto", "fp32", "bf16")}
ADAMW_STATE = ("b1_t", "b2_t", "m", "v")
MAY_BE_ZERO = ("learning_rate", "weight_decay", "warmup_steps", "seed", "keep_checkpoints")


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Raises PicoError on an impossible value.

    - context_len: bytes of one training window; batch_size: windows of one micro-batch
    - learning_rate: its peak, after warmup_steps; weight_decay: on matrices only
    - epochs, max_steps: training ends with whichever comes first
    - grad_accumulation_steps: micro-batches whose gradients are averaged for one step
    - validation_interval, checkpoint_interval: in steps; both also happen at the end
    - validation_bytes: measure on at most this many held-out bytes, the same ones every time
    - optimizer: soap or adamw
    - precision: fp32; bf16 rounds the factors of matrix products to bfloat16, while weights, sums,
      softmax, norms, router, loss and optimizer stay float32; auto is bf16 where the device has
      matrix units for it, else fp32
    - keep_checkpoints: delete older ones, so that so many remain; 0 keeps all
    - seed: order of the windows (and fresh weights, on the command line)
    """

    context_len: int = 6144
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    epochs: int = 1
    max_steps: int = 3600
    warmup_steps: int = 150
    grad_accumulation_steps: int = 1
    validation_interval: int = 100
    checkpoint_interval: int = 500
    validation_bytes: int = 1 << 18
    optimizer: str = "soap"
    precision: str = "auto"
    keep_checkpoints: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in CHOICES:
                if value not in CHOICES[field.name]:
                    allowed = " or ".join(CHOICES[field.name])
                    raise PicoError(f"{field.name} must be {allowed}, not {value!r}")
                continue
            whole = field.type is int
            least = 0 if field.name in MAY_BE_ZERO else 1
            kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
            if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
                kind = "a whole number" if whole else "a number"
                raise PicoError(f"{field.name} must be {kind} of at least {least}, not {value!r}")
            if not math.isfinite(value):
                raise PicoError(f"{field.name} must be finite, not {value!r}")


def learning_rate(step: int, settings: TrainSettings, total_steps: int) -> float:
    """The rate of step 0, 1, …: linear warm-up, then a cosine down to 10 % at `total_steps`."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    remaining = max(1, total_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / remaining)
    return settings.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def inputs_and_targets(windows: Tensor, next_tokens: int) -> tuple[Tensor, Tensor]:
    """Windows [B, N + T] of bytes -> inputs [B, N], targets [B, N, T]: byte n + 1 + k."""
    N = windows.shape[1] - next_tokens
    targets = Tensor.stack(*[windows[:, k : k + N] for k in range(1, next_tokens + 1)], dim=2)
    return windows[:, :N].contiguous(), targets.contiguous()


def adamw(parameters: list[Tensor], weight_decay: float) -> nn.optim.OptimizerGroup:
    """AdamW with decay on matrices only."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    group = nn.optim.OptimizerGroup(
        nn.optim.AdamW(matrices, lr=0.0, weight_decay=weight_decay),
        nn.optim.AdamW(vectors, lr=0.0, weight_decay=0.0),
    )
    # its state begins as constants; resuming overwrites it, which takes memory
    for part in group.optimizers:
        for tensor in (part.b1_t, part.b2_t, *part.m, *part.v):
            tensor.replace(tensor.contiguous().realize())
    return group


def on_devices(values: np.ndarray, devices: tuple[str, ...], axis: int | None = None) -> Tensor:
    """A realised tensor: split along `axis` over the devices, or whole on each."""
    x = Tensor(values)
    return (x.shard(devices, axis=axis) if len(devices) > 1 else x).realize()


def choose_precision(precision: str, devices: tuple[str, ...] = ()) -> str:
    """fp32 or bf16, whatever `auto` means on these devices (none: the default one)."""
    if precision != "auto":
        return precision
    return "bf16" if multiplies_bf16((devices or (Device.DEFAULT,))[0]) else "fp32"


def graph_context(settings: TrainSettings, devices: tuple[str, ...]) -> Context:
    """How graphs are made and replayed: the precision of products, and whether as one graph.

    Not on several devices, since 0.13 does not order them there: measured on two CPU devices,
    replayed graphs read weights from before the update.
    """
    options = {"PICO_BF16": int(choose_precision(settings.precision, devices) == "bf16")}
    if len(devices) > 1 and JIT.value:
        options["JIT"] = 2
    return Context(**options)


def move(tensors: list[Tensor], devices: tuple[str, ...]) -> None:
    """Put tensors, in place, on one device or whole on each of several; none: leave them."""
    if devices:
        for tensor in tensors:
            tensor.to_(devices if len(devices) > 1 else devices[0])
        Tensor.realize(*tensors)


class TrainStep:
    """One optimizer step on [A, B, N + T] bytes, compiled: A micro-batches, averaged.

    Returns float32 [5]: loss, aux loss, next-byte loss (nats), share of bytes with weight > 0.5,
    and 1 if every gradient was finite; where it is 0 no weight was changed.
    """

    def __init__(self, model: Pico, settings: TrainSettings, devices: tuple[str, ...] = ()) -> None:
        self.model, self.settings, self.devices = model, settings, devices
        if len(devices) > 1 and settings.batch_size % len(devices):
            raise PicoError(
                f"batch_size {settings.batch_size} cannot be shared by {len(devices)} devices; "
                f"take a multiple of {len(devices)}"
            )
        self.parameters = nn.state.get_parameters(model)
        move(self.parameters, devices)
        if settings.optimizer == "soap":
            self.optimizer = SOAP(self.parameters, lr=0.0, weight_decay=settings.weight_decay)
            self.rates = [self.optimizer.lr]
        else:
            self.optimizer = adamw(self.parameters, settings.weight_decay)
            self.rates = [part.lr for part in self.optimizer.optimizers]
        self.sums: list[Tensor] = []
        if settings.grad_accumulation_steps > 1:
            self.sums = [p.zeros_like().contiguous().realize() for p in self.parameters]
        self.whole_step = compiled(self._whole_step)
        self.accumulate = compiled(self._accumulate)
        self.update = compiled(self._update)

    def _gradients(self, windows: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, targets = inputs_and_targets(windows, self.model.config.next_tokens)
        logits, z, decisions = self.model(x)
        loss, aux_loss, next_byte_loss = loss_fn(logits, z, decisions, targets)
        rate = (z > 0).cast(dtypes.float32).mean()
        gradients = loss.gradient(*self.parameters)
        return Tensor.stack(loss, aux_loss, next_byte_loss, rate).detach(), gradients

    def _apply(self, gradients: list[Tensor], lr: Tensor) -> Tensor:
        """Update the parameters; float32 [1]: 1 if the gradients were finite, else 0."""
        if isinstance(self.optimizer, SOAP):  # leaves everything as it is if they are not
            finite = self.optimizer.finite
        else:
            finite = Tensor.stack(*[g.sum() for g in gradients]).sum().isfinite().contiguous()
            lr, gradients = finite.where(lr, 0.0), [finite.where(g, 0.0) for g in gradients]
        for rate in self.rates:
            rate.assign(lr)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        updated = self.optimizer.schedule_step()
        self.optimizer.zero_grad()
        Tensor.realize(*updated, *self.rates)
        return finite.cast(dtypes.float32).reshape(1)

    def _whole_step(self, windows: Tensor, lr: Tensor) -> Tensor:
        losses, gradients = self._gradients(windows)
        Tensor.realize(losses, *gradients)
        return losses.cat(self._apply(gradients, lr)).realize()

    def _accumulate(self, windows: Tensor) -> Tensor:
        losses, gradients = self._gradients(windows)
        for total, gradient in zip(self.sums, gradients, strict=True):
            total.assign(total + gradient / self.settings.grad_accumulation_steps)
        Tensor.realize(losses, *self.sums)
        return losses

    def _update(self, lr: Tensor) -> Tensor:
        finite = self._apply(self.sums, lr).realize()
        Tensor.realize(*[total.assign(total.zeros_like()) for total in self.sums])
        return finite

    def __call__(self, batches: np.ndarray, lr: float) -> np.ndarray:
        rate = on_devices(np.array([lr], np.float32), self.devices)
        with Tensor.train(), graph_context(self.settings, self.devices):
            if len(batches) == 1:
                losses = self.whole_step(on_devices(batches[0], self.devices, 0), rate).numpy()
            else:
                inputs = (on_devices(batch, self.devices, 0) for batch in batches)
                parts = [self.accumulate(x).numpy() for x in inputs]
                losses = np.concatenate([np.mean(parts, axis=0), self.update(rate).numpy()])
        if isinstance(self.optimizer, SOAP):
            self.optimizer.refresh()
        return losses

    def _state(self) -> dict[str, Tensor]:
        if isinstance(self.optimizer, SOAP):
            return self.optimizer.state_dict()
        own = nn.state.get_state_dict(self.optimizer)
        return {name: t for name, t in own.items() if {*name.split(".")} & {*ADAMW_STATE}}

    def state(self) -> dict[str, np.ndarray]:
        """The optimizer's state, by name."""
        return {name: tensor.numpy() for name, tensor in self._state().items()}

    def load_state(self, state: dict[str, np.ndarray], path: Path) -> None:
        """Overwrite the optimizer's state. Raises PicoError if what `path` held does not fit."""
        try:
            write_all(self._state(), state)
        except ValueError as error:
            raise PicoError(
                f"the optimizer's state beside {path} is not of this model: {error}"
            ) from error


class Validation:
    """Bits per byte on the same held-out windows every time, wrapper bytes left out.

    Measured the way the model is used (causal routing: weight > 0.5) and, beside it, with the
    top-k routing of training, which may look ahead.
    """

    def __init__(
        self,
        model: Pico,
        corpus: Corpus,
        settings: TrainSettings,
        devices: tuple[str, ...] = (),
    ) -> None:
        self.model, self.settings, self.devices = model, settings, devices
        T = model.config.next_tokens
        held_out = corpus.bytes[: settings.validation_bytes]
        # a byte is scored when it has a byte before it and stands in a document's own text
        scored = ~corpus.wrapper_mask(0, len(held_out))
        length = min(settings.context_len, max(1, len(held_out) - 1))
        count = math.ceil(max(1, len(held_out) - 1) / length)
        self.batch_size = min(settings.batch_size, count)
        if len(devices) > 1:  # each takes its share
            self.batch_size = math.ceil(self.batch_size / len(devices)) * len(devices)
        rounded = math.ceil(count / self.batch_size) * self.batch_size
        padded = np.zeros(rounded * length + T, np.uint8)
        padded[: len(held_out)] = held_out
        mask = np.zeros(rounded * length + 1, bool)
        mask[: len(held_out)] = scored
        starts = np.arange(rounded)[:, None] * length
        self.windows = padded[starts + np.arange(length + T)]  # (rounded, length + T)
        self.mask = mask[starts + 1 + np.arange(length)]  # (rounded, length): of the byte predicted
        if not self.mask.any():
            raise PicoError(
                f"the validation data has {len(held_out)} bytes, too few to measure anything; "
                "hold out more with --dataset-validation-size"
            )
        self.slots = min(length, 2 * max(1, model.config.capacity(length)))
        self.length = length
        self.measure = compiled(self._measure)
        self.measure_all = compiled(self._measure_all)

    def _measure(self, windows: Tensor, mask: Tensor) -> Tensor:
        return self._sums(windows, mask, self.slots)

    def _measure_all(self, windows: Tensor, mask: Tensor) -> Tensor:
        return self._sums(windows, mask, self.length)

    def _sums(self, windows: Tensor, mask: Tensor, count: int) -> Tensor:
        x, targets = inputs_and_targets(windows, self.model.config.next_tokens)
        mask = mask.cast(dtypes.float32)
        causal, z, decisions = self.model(x, causal=True, count=count)
        training, _, _ = self.model(x)
        nats = [
            (cross_entropy(logits[:, :, 0], targets[:, :, 0]) * mask).sum()
            for logits in (causal, training)
        ]
        most = decisions.sum(axis=1, dtype=dtypes.int32).max().cast(dtypes.float32)
        chosen = ((z > 0) * mask).sum()
        return Tensor.stack(*nats, chosen, most).realize()

    def __call__(self) -> Record:
        """Keys: validation_bits_per_byte, …_top_k, validation_router_rate, validation_seconds."""
        start = time.perf_counter()
        total = np.zeros(3, np.float64)
        for first in range(0, len(self.windows), self.batch_size):
            rows = slice(first, first + self.batch_size)
            arrays = (self.windows[rows].copy(), self.mask[rows].copy())
            inputs = [on_devices(array, self.devices, 0) for array in arrays]
            with graph_context(self.settings, self.devices):
                sums = self.measure(*inputs).numpy()
                if sums[3] > self.slots:  # more bytes than there were slots: one for each
                    sums = self.measure_all(*inputs).numpy()
            total += sums[:3]
        bits = total / self.mask.sum() / np.array([math.log(2), math.log(2), 1])
        return {
            "validation_bits_per_byte": float(bits[0]),
            "validation_bits_per_byte_top_k": float(bits[1]),
            "validation_router_rate": float(bits[2]),
            "validation_seconds": time.perf_counter() - start,
        }


def train(
    model: Pico,
    dataset: str | DataSpec | Data | None = None,
    run_dir: str | os.PathLike | None = None,
    *,
    devices: tuple[str, ...] = (),
    resume: bool = False,
    force: bool = False,
    stop: Callable[[], bool] = lambda: False,
    progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
    **settings: int | float | str,
) -> Iterator[Record]:
    """Train `model` in place, yielding one record (a dict that is valid JSON) a step.

    dataset: what `pico_tg.DataSpec` takes, or its `dataset` alone, or loaded data; None is
    `python-docs`. `settings` are the fields of `pico_tg.TrainSettings`. With `run_dir` (which must
    not exist yet), it receives training.json, metrics.jsonl (the records) and checkpoints: weights
    as NNNNNNNN.safetensors, and beside them what resuming needs.
    `stop()` is asked after every step: True ends training as if it were the last step.
    Several `devices` (`("CUDA:0", "CUDA:1")`) share each batch; the model is on all of them until
    training ends, and then on the first.

    `resume` continues the run in `run_dir` from its newest valid checkpoint as if nothing had
    happened. Data and settings not given are the run's; those given must be the run's, except
    max_steps, validation_interval, checkpoint_interval and keep_checkpoints, and with `force`
    batch_size. `say` is told in one line where it continues, and which checkpoints were broken.

    A record has: step (from 1), steps (in all), epoch (from 0), loss, next_byte_loss, aux_loss
    (nats), bits_per_byte (of the next byte, training routing), router_rate (share of bytes with
    weight > 0.5), lr, bytes (seen so far), bytes_per_second; after a validation also its keys (see
    `Validation`), after a checkpoint `checkpoint`, its path.

    Raises PicoError on bad settings or data before anything is written, and when a loss or gradient
    is not finite; the weights are then those before that step.
    """
    known = {field.name for field in dataclasses.fields(TrainSettings)}
    if wrong := ", ".join(sorted(set(settings) - known)):
        raise PicoError(f"unknown setting {wrong}; there are: {', '.join(sorted(known))}")
    spec = DataSpec(dataset) if isinstance(dataset, str) else dataset
    stored: dict[str, Any] = {}
    if resume:
        if run_dir is None:
            raise PicoError("nothing to resume: no run was named")
        stored = read_description(Path(run_dir))
        spec = _resumed_spec(spec, stored, run_dir)
        if "precision" in settings:
            chosen = choose_precision(settings["precision"], devices)
            settings = settings | {"precision": chosen}
        settings = _resumed_settings(settings, stored["settings"], force, run_dir)
    elif run_dir is not None and Path(run_dir).exists():
        raise PicoError(
            f"{run_dir} exists; continue it with --resume, choose another RUN, or delete it"
        )
    chosen = TrainSettings(**settings)
    # what is recorded, and resumed, is what `auto` means here
    chosen = dataclasses.replace(chosen, precision=choose_precision(chosen.precision, devices))
    if model.config.capacity(chosen.context_len) < 1:
        raise PicoError(
            f"context_len {chosen.context_len} is too short: at a capacity factor of "
            f"{model.config.latent_capacity_factor} no byte is selected; take at least "
            f"{math.ceil(1 / model.config.latent_capacity_factor)}"
        )
    spec = DataSpec("python-docs") if spec is None else spec
    data = spec if isinstance(spec, Data) else load_data(spec, progress=progress)
    windows = Windows(
        data.train,
        chosen.context_len,
        model.config.next_tokens,
        chosen.batch_size * chosen.grad_accumulation_steps,
        chosen.seed,
    )
    fingerprints = [data.train.fingerprint, data.validation.fingerprint]
    if stored.get("fingerprints", fingerprints) != fingerprints:
        raise PicoError(f"the data of {run_dir} have changed since; train a new RUN on them")
    validation = Validation(model, data.validation, chosen, devices)
    train_step = TrainStep(model, chosen, devices)
    description = {
        "settings": dataclasses.asdict(chosen),
        "dataset": dataclasses.asdict(spec) if isinstance(spec, DataSpec) else None,
        "data": data.note,
        "fingerprints": fingerprints,
    }
    run, reached = None, {"step": 0, "bytes": 0}
    if resume:
        path, state, reached, refused = load_newest(model, run_dir)
        train_step.load_state(state, path)
        for problem in refused:
            say(f"skipped a checkpoint: {problem}")
        say(f"resuming after step {reached['step']}, from {path}")
        run = Run(Path(run_dir), description)
        run.forget_after(reached["step"])
    elif run_dir is not None:
        try:
            Path(run_dir).mkdir(parents=True)
        except OSError as error:
            raise PicoError(f"cannot create {run_dir}: {error.strerror}") from error
        run = Run(Path(run_dir), description)
    return _until_the_end(_train(train_step, windows, validation, run, reached, stop), train_step)


def _until_the_end(records: Iterator[Record], train_step: TrainStep) -> Iterator[Record]:
    """The records; however training ends, the model is then on the first device."""
    try:
        yield from records
    finally:
        move(train_step.parameters, train_step.devices[:1])


MAY_CHANGE = ("max_steps", "validation_interval", "checkpoint_interval", "keep_checkpoints")


def _resumed_settings(given: dict, stored: dict, force: bool, run_dir: str | os.PathLike) -> dict:
    free = (*MAY_CHANGE, "batch_size") if force else MAY_CHANGE
    differences = [
        f"{name} was {stored[name]}, now {value}"
        for name, value in given.items()
        if name not in free and stored.get(name, value) != value
    ]
    if differences:
        forced = "; --force allows another batch_size" if "batch_size" in given else ""
        raise PicoError(
            f"{run_dir} was trained otherwise: {', '.join(differences)}; leave these out to resume "
            f"with what it had, or train a new RUN{forced}"
        )
    return stored | given


def _resumed_spec(
    given: DataSpec | Data | None, stored: dict, run_dir: str | os.PathLike
) -> DataSpec | Data:
    known = None if stored["dataset"] is None else DataSpec(**stored["dataset"])
    if given is None and known is None:
        raise PicoError(f"{run_dir} was trained on data from a script; give them again to resume")
    if isinstance(given, DataSpec) and known is not None and given != known:
        changed = [
            f"{name} was {old!r}, now {getattr(given, name)!r}"
            for name, old in dataclasses.asdict(known).items()
            if old != getattr(given, name)
        ]
        raise PicoError(f"{run_dir} was trained on other data: {', '.join(changed)}")
    return known if given is None else given


def _train(
    train_step: TrainStep,
    windows: Windows,
    validation: Validation,
    run: "Run | None",
    reached: dict[str, int],
    stop: Callable[[], bool],
) -> Iterator[Record]:
    settings = train_step.settings
    accumulation, batch_size = settings.grad_accumulation_steps, settings.batch_size
    total = min(settings.max_steps, math.ceil(settings.epochs * windows.steps_per_epoch))
    step, seen, stopped = reached["step"], reached["bytes"], False
    while step < total and not stopped:
        start = time.perf_counter()
        rate = learning_rate(step, settings, total)
        batch = windows.batch(step).reshape(accumulation, batch_size, -1)
        losses = train_step(batch, rate)
        if losses[4] != 1 or not np.isfinite(losses).all():
            saved = run.last_checkpoint() if run else "none"
            raise PicoError(
                f"a loss or gradient is not finite at step {step + 1} (lr {rate:.2e}); the weights "
                f"were not updated; last checkpoint: {saved}; try a smaller --learning-rate"
            )
        epoch = windows.epoch(step)
        step += 1
        trained = accumulation * batch_size * settings.context_len
        seen += trained
        record: Record = {
            "step": step,
            "steps": total,
            "epoch": epoch,
            "loss": float(losses[0]),
            "next_byte_loss": float(losses[2]),
            "aux_loss": float(losses[1]),
            "bits_per_byte": float(losses[2]) / math.log(2),
            "router_rate": float(losses[3]),
            "lr": rate,
            "bytes": seen,
            "bytes_per_second": trained / (time.perf_counter() - start),
        }
        stopped = stop()
        last = stopped or step == total
        if last or step % settings.validation_interval == 0:
            record |= validation()
        if run:
            saving = last or step % settings.checkpoint_interval == 0
            if saving:
                record["checkpoint"] = str(checkpoint_path(run.folder, step))
            run.log(record, durable=saving)  # before the checkpoint: a resumed run has all records
            if saving:
                run.save(train_step, {"step": step, "bytes": seen})
        yield record


class Run:
    """The folder of one training run: training.json, metrics.jsonl and checkpoints."""

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.folder, self.description = folder, description
        self._describe()

    def _describe(self) -> None:
        checkpoints = [path.name for _, path in list_checkpoints(self.folder)]
        with atomic_write(self.folder / "training.json") as file:
            described = self.description | {"checkpoints": checkpoints}
            file.write((json.dumps(described, indent=2) + "\n").encode())

    def save(self, train_step: TrainStep, reached: dict[str, int]) -> None:
        """Write a checkpoint, list it in training.json, delete those not to be kept."""
        state, step = train_step.state(), reached["step"]
        save_checkpoint(weights_of(train_step.model), state, reached, self.folder, step)
        if train_step.settings.keep_checkpoints:
            delete_older(self.folder, step, train_step.settings.keep_checkpoints)
        self._describe()

    def last_checkpoint(self) -> str:
        checkpoints = list_checkpoints(self.folder)
        return str(checkpoints[-1][1]) if checkpoints else "none"

    def log(self, record: Record, durable: bool = False) -> None:
        """Append one line to metrics.jsonl, readable at once by others."""
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            if durable:
                file.flush()
                os.fsync(file.fileno())

    def forget_after(self, step: int) -> None:
        """Drop the records of steps that will be taken again."""
        path = self.folder / "metrics.jsonl"
        records = read_metrics(self.folder) if path.exists() else []
        with atomic_write(path) as file:
            for record in records:
                if record["step"] <= step:
                    file.write((json.dumps(record) + "\n").encode())


def read_description(folder: Path) -> dict[str, Any]:
    """A run's training.json. Raises PicoError if it is missing or broken."""
    path = folder / "training.json"
    try:
        description = json.loads(path.read_text("utf-8"))
        if not {"settings", "dataset"} <= description.keys():
            raise ValueError("keys are missing")
    except OSError as error:
        raise PicoError(
            f"{folder} is no training run to resume: cannot read {path} ({error.strerror})"
        ) from error
    except (ValueError, AttributeError) as error:
        raise PicoError(f"{path} is broken ({error})") from error
    return description


def read_metrics(folder: Path) -> list[Record]:
    """The records in a run's metrics.jsonl; a line still being written is left out.

    Raises PicoError if there is none.
    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise PicoError(
            f"cannot read {path}: {error.strerror or error}; is {folder} a training run?"
        ) from error
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records
