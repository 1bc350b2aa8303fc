"""Training: a generator that yields one record a step; nothing here prints.

for record in train(model, "python-docs", max_steps=200, context_len=512, batch_size=4):
    print(record["step"], record["bits_per_byte"])
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Tensor, dtypes, nn

from .checkpoint import load_newest, load_weights, weights_of
from .config import TrainSettings
from .data import Data, DataSpec, Windows, load_data
from .evaluation import Validation
from .files import PicoError
from .model import Pico, inputs_and_targets, loss_fn
from .precision import choose_precision
from .remat import graph_context
from .runs import Record, Run, read_description
from .runtime import jit_method, on_devices, write_all
from .soap import SOAP, all_finite

ADAMW_STATE = ("b1_t", "b2_t", "m", "v")


def learning_rate(step: int, settings: TrainSettings, total_steps: int) -> float:
    """The rate of step 0, 1, …: linear warm-up, then a cosine down to 10 % at `total_steps`."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    remaining = max(1, total_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / remaining)
    return settings.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


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


def move(tensors: list[Tensor], devices: tuple[str, ...]) -> None:
    """Put tensors, in place, on one device or whole on each of several; none: leave them."""
    if devices:
        for tensor in tensors:
            tensor.to_(devices if len(devices) > 1 else devices[0])
        Tensor.realize(*tensors)


class TrainStep:
    """One optimizer step on [A, B, N + T] bytes, compiled: A micro-batches, averaged.

    Returns float32 [5]: loss, aux loss, next-byte loss (nats), share of bytes that causal routing
    selects, and 1 if every gradient was finite; where it is 0 no weight was changed.
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
        for rate in self.rates:
            rate.replace(rate.contiguous().realize())
        self.sums: list[Tensor] = []
        if settings.grad_accumulation_steps > 1:
            self.sums = [p.zeros_like().contiguous().realize() for p in self.parameters]
        self.whole_step = jit_method(self._whole_step)
        self.accumulate = jit_method(self._accumulate)
        self.update = jit_method(self._update)

    def _gradients(self, windows: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, targets = inputs_and_targets(windows, self.model.config.next_tokens)
        logits, z, decisions = self.model(x)
        loss, aux_loss, next_byte_loss = loss_fn(
            logits, z, decisions, targets, self.model.config.router == "learned"
        )
        rate = self.model.decide(x, z, causal=True).cast(dtypes.float32).mean()
        gradients = loss.gradient(*self.parameters)
        losses = Tensor.stack(loss, aux_loss, next_byte_loss, rate).detach().contiguous()
        # if a loss is not finite, then neither is a gradient, and nothing is updated
        smallest = min(range(len(gradients)), key=lambda i: gradients[i].numel())
        finite = losses.sum().isfinite()
        gradients[smallest] = finite.where(gradients[smallest], math.nan)
        return losses, gradients

    def _apply(self, gradients: list[Tensor], lr: Tensor) -> Tensor:
        """Update the parameters; float32 [1]: 1 if the gradients were finite, else 0."""
        if isinstance(self.optimizer, SOAP):  # leaves everything as it is if they are not
            finite = self.optimizer.finite
        else:
            finite = all_finite(gradients)
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


def train(
    model: Pico,
    dataset: str | DataSpec | Data | None = None,
    run_dir: str | os.PathLike | None = None,
    *,
    devices: tuple[str, ...] = (),
    resume: bool = False,
    force: bool = False,
    base_weights: str | os.PathLike | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
    tracker: dict[str, str] | None = None,
    **settings: int | float | str,
) -> Iterator[Record]:
    """Train `model` in place, yielding one record (a dict that is valid JSON) a step.

    dataset: what `pico_tg.DataSpec` takes, or its `dataset` alone, or loaded data; None is
    `python-docs`. `settings` are the fields of `pico_tg.TrainSettings`. With `run_dir` (which must
    not exist yet), it receives training.json, metrics.jsonl (the records) and checkpoints: weights
    as NNNNNNNN.safetensors, and beside them what resuming needs.
    `base_weights`, a .safetensors file, replaces the model's weights first; its path is recorded.
    `tracker`, a package's name and the id of its run that logs this one, is recorded as well.
    `stop()` is asked after every step: True saves and ends training.
    Several `devices` (`("CUDA:0", "CUDA:1")`) share each batch; the model is on all of them until
    training ends, and then on the first.

    `resume` continues the run in `run_dir` from its newest valid checkpoint as if nothing had
    happened. Data and settings not given are the run's; those given must be the run's, except
    max_steps, validation_interval, checkpoint_interval and keep_checkpoints, and with `force`
    batch_size; the model's config must be the run's too. The same data may have moved. Another
    max_steps bends the learning rate's curve from here on. `say` is told in one line where it
    continues, and whatever else is worth knowing.

    A record has: step (from 1), steps (in all), epoch (from 0), loss, next_byte_loss, aux_loss
    (nats), bits_per_byte (of the next byte, training routing), router_rate (share of bytes that
    causal routing selects), lr, bytes (seen so far), bytes_per_second; after a validation also its
    keys (see `Validation`), after a checkpoint `checkpoint`, its path.

    Raises PicoError on bad settings or data before anything is written, and when a loss or gradient
    is not finite; the weights are then those before that step.
    """
    if resume and base_weights is not None:
        raise PicoError("base_weights start a run; a run that is resumed has its own")
    known = {field.name for field in dataclasses.fields(TrainSettings)}
    if wrong := ", ".join(sorted(set(settings) - known)):
        raise PicoError(f"unknown setting {wrong}; there are: {', '.join(sorted(known))}")
    spec = DataSpec(dataset) if isinstance(dataset, str) else dataset
    stored: dict[str, Any] = {}
    if resume:
        if run_dir is None:
            raise PicoError("nothing to resume: no run was named")
        stored = read_description(Path(run_dir))
        _check_model(model.config.to_dict(), stored["model"], run_dir)
        spec = stored_spec(stored, run_dir) if spec is None else spec
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
    if model.config.router != "none" and model.config.capacity(chosen.context_len) < 1:
        raise PicoError(
            f"context_len {chosen.context_len} is too short: at a capacity factor of "
            f"{model.config.latent_capacity_factor} no byte is selected; take at least "
            f"{math.ceil(1 / model.config.latent_capacity_factor)}"
        )
    spec = DataSpec() if spec is None else spec
    data = spec if isinstance(spec, Data) else load_data(spec, progress=progress)
    spec = data.spec
    windows = Windows(
        data.train,
        chosen.context_len,
        model.config.next_tokens,
        chosen.batch_size * chosen.grad_accumulation_steps,
        chosen.seed,
    )
    described = dataclasses.asdict(spec)
    if os.path.exists(spec.dataset):  # wherever it is resumed from
        described["dataset"] = os.path.abspath(spec.dataset)
    fingerprints = [data.train.fingerprint, data.validation.fingerprint]
    if resume and stored["fingerprints"] != fingerprints:
        raise PicoError(_changed_data(described, stored, run_dir))
    if base_weights is not None:
        load_weights(model, base_weights)
    validation = Validation(model, data.validation, chosen, devices)
    train_step = TrainStep(model, chosen, devices)
    description = {
        "settings": dataclasses.asdict(chosen),
        "dataset": described,
        "data": data.note,
        "fingerprints": fingerprints,
        "model": model.config.to_dict(),
        "base_weights": stored.get("base_weights"),
        "devices": list(devices),
        "tracker": tracker or stored.get("tracker"),
    }
    if base_weights is not None:
        description["base_weights"] = os.path.abspath(base_weights)
    run, records = None, []
    reached = {"step": 0, "bytes": 0, "windows": 0}
    if resume:
        run = Run(Path(run_dir), resumed=True)
        path, state, reached, refused = load_newest(model, run_dir)
        train_step.load_state(state, path)
        run.last_checkpoint = path
        for problem in refused:
            say(f"skipped a checkpoint: {problem}")
        say(f"resuming after step {reached['step']}, from {path}")
        if stored["devices"] != list(devices):
            say(f"devices were {stored['devices'] or 'one'}, now {list(devices) or 'one'}")
        records = run.truncate_to(reached["step"])
    elif run_dir is not None:
        run = Run(Path(run_dir), resumed=False)
    total = _steps(chosen, windows, reached)
    if total != reached.get("steps", total):
        say(
            f"{total} steps in all, not {reached['steps']}: from step {reached['step'] + 1} on the "
            "learning rate follows the curve of the new number"
        )
    reached |= {"steps": total}
    if not resume:
        say(data.note)
    if len(data.validation.bytes) > chosen.validation_bytes:
        say(f"each validation measures the first {chosen.validation_bytes:,} of those bytes")
    if total <= chosen.warmup_steps:
        say(
            f"the {total} steps that there are end within warmup_steps ({chosen.warmup_steps}), so "
            "the learning rate never gets to its peak; more epochs or smaller batches give more"
        )
    if run:
        run.describe(description)
    steps = _train(train_step, windows, validation, run, records, reached, stop)
    return _until_the_end(steps, train_step, run)


def _steps(settings: TrainSettings, windows: Windows, reached: dict[str, int]) -> int:
    """At which step training ends: at max_steps, or when all epochs' windows were seen."""
    left = settings.epochs * len(windows) - reached["windows"]
    return min(settings.max_steps, reached["step"] + math.ceil(max(0, left) / windows.batch_size))


def _until_the_end(
    records: Iterator[Record], train_step: TrainStep, run: Run | None
) -> Iterator[Record]:
    """The records; however training ends, the model is then on the first device, the run free."""
    try:
        yield from records
    finally:
        move(train_step.parameters, train_step.devices[:1])
        if run:
            run.close()


MAY_CHANGE = ("max_steps", "validation_interval", "checkpoint_interval", "keep_checkpoints")


def _resumed_settings(given: dict, stored: dict, force: bool, run_dir: str | os.PathLike) -> dict:
    free = (*MAY_CHANGE, "batch_size") if force else MAY_CHANGE
    differences = [
        f"{name} was {stored[name]}, now {value}"
        for name, value in given.items()
        if name not in free and stored.get(name, value) != value
    ]
    if differences:
        forced = any(text.startswith("batch_size was") for text in differences)
        hint = "; --force allows another batch_size" if forced else ""
        raise PicoError(
            f"{run_dir} was trained otherwise: {', '.join(differences)}; leave these out to resume "
            f"with what it had, or train a new RUN{hint}"
        )
    if unknown := ", ".join(sorted(stored.keys() - TrainSettings.__dataclass_fields__.keys())):
        raise PicoError(f"{run_dir}/training.json has settings that are unknown here: {unknown}")
    return stored | given


def _check_model(now: dict[str, Any], before: dict[str, Any], run_dir: str | os.PathLike) -> None:
    names = sorted(now.keys() | before.keys())
    changed = [
        f"{name} was {before.get(name)}, now {now.get(name)}"
        for name in names
        if now.get(name) != before.get(name)
    ]
    if changed:
        raise PicoError(
            f"{run_dir} was trained with another model.json: {', '.join(changed)}; restore it, or "
            "train a new RUN"
        )


def stored_spec(stored: dict[str, Any], run_dir: str | os.PathLike) -> DataSpec:
    """The data of a run, from its training.json. Raises PicoError if that is broken."""
    try:
        return DataSpec(**stored["dataset"])
    except TypeError as error:
        raise PicoError(f"{run_dir}/training.json is broken: dataset: {error}") from error


def _changed_data(now: dict[str, Any], stored: dict[str, Any], run_dir: str | os.PathLike) -> str:
    before = stored["dataset"]
    changed = [
        f"{name} was {before[name]!r}, now {value!r}"
        for name, value in now.items()
        if name in before and value != before[name]
    ]
    if changed:
        return f"{run_dir} was trained on other data: {', '.join(changed)}"
    return f"the data of {run_dir} have changed since; train a new RUN on them"


def _train(
    train_step: TrainStep,
    windows: Windows,
    validation: Validation,
    run: Run | None,
    records: list[Record],
    reached: dict[str, int],
    stop: Callable[[], bool],
) -> Iterator[Record]:
    settings = train_step.settings
    accumulation, batch_size = settings.grad_accumulation_steps, settings.batch_size
    step, total, seen, position = (reached[k] for k in ("step", "steps", "bytes", "windows"))

    def due() -> bool:
        return step == total or step % settings.validation_interval == 0

    if records and step % settings.validation_interval == 0 and "validated" not in reached:
        # it was stopped before it could: catch up, so that the history is that of a straight run
        records[-1] |= validation()
        run.rewrite(records)
    stopped = False
    while step < total and not stopped:
        start = time.perf_counter()
        rate = learning_rate(step, settings, total)
        batch = windows.batch_at(position).reshape(accumulation, batch_size, -1)
        losses = train_step(batch, rate)
        if losses[4] != 1 or not np.isfinite(losses).all():
            saved = run.last_checkpoint if run else None
            raise PicoError(
                f"a loss or gradient is not finite at step {step + 1} (lr {rate:.2e}); the weights "
                f"were not updated; last checkpoint: {saved or 'none'}; try a smaller "
                "--learning-rate"
            )
        epoch = position // len(windows)
        step, position = step + 1, position + accumulation * batch_size
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
        progress = {"step": step, "bytes": seen, "windows": position, "steps": total}
        stopped = stop()
        # whoever asks for a stop may not wait: save, and leave measuring to the resumed run
        if due() and not stopped:
            record |= validation()
            progress["validated"] = True
            stopped = stop()
        if run:
            saving = stopped or step == total or step % settings.checkpoint_interval == 0
            _record(train_step, run, record, progress, saving)
        yield record


def _record(
    train_step: TrainStep, run: Run, record: Record, progress: dict[str, int], saving: bool
) -> None:
    """Log a record, then save if it is time; if logging fails, save all the same and raise."""
    problem = None
    if saving:
        record["checkpoint"] = run.checkpoint_path(record["step"])
    try:
        run.log(record, durable=saving)  # before the checkpoint: a resumed run has all records
    except PicoError as error:
        problem = error
    if saving or problem:
        keep = train_step.settings.keep_checkpoints
        run.save(weights_of(train_step.model), train_step.state(), progress, keep)
    if problem:
        raise problem
