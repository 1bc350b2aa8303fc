"""Training: a generator that yields one record per step. Nothing here prints.

for record in train(model, "python-docs", max_steps=200, context_len=512, batch_size=4):
    print(record["step"], record["bits_per_byte"])

Reading order: `learning_rate`, `TrainStep` (one optimizer step), `train` (opens or resumes a run),
`_loop` (the steps).
"""

import atexit
import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Device, Tensor, dtypes, nn

from .backend.precision import choose_precision, graph_context
from .backend.runtime import exclusive, jit_method, on_devices, write_all, write_into
from .checkpoint import (
    checkpoint_path,
    list_checkpoints,
    load_newest,
    load_weights,
    weights_of,
)
from .config import Config, TrainSettings, field_help
from .costs import check_memory
from .data import Data, DataSpec, Windows
from .evaluation import Validation
from .files import PicoError
from .model import Pico, inputs_and_targets, loss_fn
from .ops import entropy
from .optim.soap import SOAP, all_finite
from .routing import top_k_decisions
from .runs import (
    BITS,
    Progress,
    Record,
    Run,
    check_model,
    check_startable,
    describe_data,
    differences,
    open_data,
    read_description,
    resumed_settings,
)

ADAMW_STATE = ("b1_t", "b2_t", "m", "v")


def learning_rate(position: float, settings: TrainSettings, total_steps: int) -> float:
    """The learning rate at step 0, 1, …: linear warm-up, then a cosine to 10 % at `total_steps`.

    With max_minutes, `position` follows the elapsed training time and is not a whole number.
    """
    if position < settings.warmup_steps:
        return settings.learning_rate * min(1.0, (position + 1) / settings.warmup_steps)
    remaining = max(1, total_steps - settings.warmup_steps)
    fraction = min(1.0, (position - settings.warmup_steps) / remaining)
    return settings.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * fraction)))


def adamw(parameters: list[Tensor], weight_decay: float) -> nn.optim.OptimizerGroup:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    group = nn.optim.OptimizerGroup(
        nn.optim.AdamW(matrices, lr=0.0, weight_decay=weight_decay),
        nn.optim.AdamW(vectors, lr=0.0, weight_decay=0.0),
    )
    # tinygrad initializes the state with constants, which have no buffer for resuming to overwrite
    for part in group.optimizers:
        for tensor in (part.b1_t, part.b2_t, *part.m, *part.v):
            tensor.replace(tensor.contiguous().realize())
    return group


@exclusive
def move(tensors: list[Tensor], devices: tuple[str, ...]) -> None:
    """Move tensors in place to one device, or replicate them on several; () leaves them alone."""
    if devices:
        for tensor in tensors:
            tensor.to_(devices if len(devices) > 1 else devices[0])
        Tensor.realize(*tensors)


def most_uncertain(logits: Tensor, config: Config) -> Tensor:
    """The `capacity` bytes with the highest entropy of head 0's prediction: bool [B, N].

    logits [B, N, T, 256]; no gradient passes.
    """
    uncertainty = entropy(logits[:, :, 0].detach())
    return top_k_decisions(uncertainty, config.capacity(logits.shape[1]))


class TrainStep:
    """One compiled optimizer step on bytes uint8 [A, B, N + T], averaged over A micro-batches.

    Returns float32 [6]:

    - loss, aux loss, next-byte loss (nats)
    - share of the bytes that causal routing selects
    - share of the bytes that training selects, but that have no slot
    - 1 if every gradient is finite; else 0, and no weight has changed

    `consistent` is False while weights and optimizer state are being updated.
    """

    @exclusive
    def __init__(self, model: Pico, settings: TrainSettings, devices: tuple[str, ...] = ()) -> None:
        self.model, self.settings, self.devices = model, settings, devices
        if len(devices) > 1 and settings.batch_size % len(devices):
            raise PicoError(
                f"batch_size {settings.batch_size} cannot be shared by {len(devices)} devices; "
                f"take a multiple of {len(devices)}"
            )
        self.tensors = nn.state.get_parameters(model)
        move(self.tensors, devices)
        self.parameters = [tensor for tensor in self.tensors if tensor.is_param]
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
        self.router_warmup: Tensor | None = None  # int32 [1]: 1 during router warm-up, else 0
        if settings.router_warmup_steps:
            self.router_warmup = Tensor.zeros(1, dtype=dtypes.int32).contiguous().realize()
            move([self.router_warmup], devices)
        self.consistent = True
        self.whole_step = jit_method(self._whole_step)
        self.accumulate = jit_method(self._accumulate)
        self.update = jit_method(self._update)

    def _gradients(self, windows: Tensor) -> tuple[Tensor, list[Tensor]]:
        config = self.model.config
        x, targets = inputs_and_targets(windows, config.next_tokens)
        logits, z, decisions = self.model(x)
        router_target = decisions
        # computed in every step: a second graph would take seconds to compile
        if self.router_warmup is not None:
            warmup = (self.router_warmup > 0).expand(*decisions.shape)
            router_target = warmup.where(most_uncertain(logits, config), decisions)
        extra = self.settings.extra_heads_weight
        losses = loss_fn(logits, z, router_target, targets, config, extra)
        rate = self.model.decide(x, z, causal=True).cast(dtypes.float32).mean()
        gradients = losses[0].gradient(*self.parameters)
        overflow = losses[0].zeros_like()
        if config.router != "learned":  # top-k fills exactly the slots
            selected = decisions.sum(axis=1, dtype=dtypes.int32)  # (B,)
            overflow = (selected - config.capacity(x.shape[1])).maximum(0).mean() / x.shape[1]
        # contiguous: one kernel of all these sums would use only a few threads of a GPU
        losses = [x.detach().contiguous() for x in (*losses, rate, overflow)]
        losses = Tensor.stack(*losses).contiguous()
        # a loss that is not finite sets one gradient to NaN, which makes `_apply` skip the update
        smallest = min(range(len(gradients)), key=lambda i: gradients[i].numel())
        finite = losses.sum().isfinite()
        gradients[smallest] = finite.where(gradients[smallest], math.nan)
        return losses, gradients

    def _apply(self, gradients: list[Tensor], lr: Tensor) -> Tensor:
        """Update the parameters; float32 [1]: 1 if the gradients are finite, else 0."""
        if isinstance(self.optimizer, SOAP):  # skips an update with non-finite gradients itself
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

    @exclusive
    def __call__(
        self,
        batches: np.ndarray,
        lr: float,
        interrupt: Callable[[int], bool] = lambda done: False,
        router_warmup: bool = False,
    ) -> np.ndarray | None:
        """Take the step. `interrupt(done)` is called after each of several micro-batches.

        router_warmup: whether `most_uncertain` bytes are the target of the router; no effect if
        router_warmup_steps is 0.

        If `interrupt` returns True before the last micro-batch, the gradients are discarded,
        weights and optimizer stay unchanged, and the result is None.
        """
        rate = on_devices(np.array([lr], np.float32), self.devices)
        if self.router_warmup is not None:
            write_into(self.router_warmup, np.array([router_warmup], np.int32))
        with Tensor.train(), graph_context(self.settings, self.devices):
            if len(batches) == 1:
                windows = on_devices(batches[0], self.devices, 0)
                self.consistent = False
                losses = self.whole_step(windows, rate).numpy()
            else:
                parts = []
                for done, batch in enumerate(batches, 1):
                    parts.append(self.accumulate(on_devices(batch, self.devices, 0)).numpy())
                    if interrupt(done) and done < len(batches):
                        for total in self.sums:
                            write_into(total, np.zeros(total.shape, np.float32))
                        return None
                self.consistent = False
                losses = np.concatenate([np.mean(parts, axis=0), self.update(rate).numpy()])
        if isinstance(self.optimizer, SOAP):
            self.optimizer.refresh()
        self.consistent = True
        return losses

    def _state(self) -> dict[str, Tensor]:
        if isinstance(self.optimizer, SOAP):
            return self.optimizer.state_dict()
        named = nn.state.get_state_dict(self.optimizer)
        return {name: t for name, t in named.items() if {*name.split(".")} & {*ADAMW_STATE}}

    @exclusive
    def state(self) -> dict[str, np.ndarray]:
        """The optimizer's state, by name."""
        return {name: tensor.numpy() for name, tensor in self._state().items()}

    @exclusive
    def load_state(self, state: dict[str, np.ndarray], path: Path) -> None:
        """Overwrite the optimizer's state. Raises PicoError, naming `path`, if it does not fit."""
        try:
            write_all(self._state(), state)
        except ValueError as error:
            raise PicoError(
                f"the optimizer state of {path} does not fit this model: {error}"
            ) from error


def train(
    model: Pico,
    dataset: str | os.PathLike | DataSpec | Data | None = None,
    run_dir: str | os.PathLike | None = None,
    *,
    devices: tuple[str, ...] = (),
    resume: bool = False,
    force: bool = False,
    base_weights: str | os.PathLike | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_micro_batch: Callable[[int, int], None] = lambda done, total: None,
    progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
    **settings: int | float | str,
) -> Iterator[Record]:
    """Train `model` in place, yielding one record (a dict that is valid JSON) per step.

    - dataset: `pico_tg.DataSpec`, its `dataset` alone, or loaded data; None is `python-docs`
    - run_dir: receives training.json, metrics.jsonl (the records) and checkpoints, see
      `pico_tg.runs`; must be new, or of a run that ended before its first checkpoint
    - devices: names such as ("CUDA:0", "CUDA:1") share each batch; training leaves the model on the
      first
    - resume: continue the run in run_dir from its newest valid checkpoint, bit for bit. Data and
      settings default to the run's. Only settings in `pico_tg.runs.MAY_CHANGE` may differ, with
      `force` also batch_size, and the path of the data if the content is the same
    - base_weights: .safetensors file to start from; recorded in training.json
    - stop: called after every micro-batch; True saves the last complete step and ends training
    - on_micro_batch: called with (done, total) after each of several micro-batches of a step
    - progress: show a bar while data are read; say: called with each message, a line, for the user
    - settings: the fields of `pico_tg.TrainSettings`

    A record has: step (from 1), steps (total), epoch (from 0), loss, next_byte_loss, aux_loss
    (nats; after router_warmup_steps, aux_loss has another target), bits_per_byte (of the next byte,
    training routing), router_rate (share of bytes that causal routing selects), router_overflow
    (share of bytes that a rule selects beyond `Config.capacity`, which skip the latent blocks), lr,
    bytes (trained on so far), bytes_per_second. With max_minutes a record also has minutes (used so
    far), after a validation the keys of `Validation`, and with a checkpoint `checkpoint`, its path.
    The last step is saved if the caller closes the generator or raises, and at Ctrl-C, except in
    the first two steps, which compile.

    Raises PicoError on bad settings or data, before anything is written, and on a loss or gradient
    that is not finite, before that step changes the weights.
    """
    folder = None if run_dir is None else Path(run_dir)
    stored = _stored_run(model.config, folder, base_weights) if resume else {}
    chosen = _chosen_settings(settings, stored, folder, devices, force)
    _check_for_model(chosen, model.config)
    if folder is not None and not resume:
        check_startable(folder)
    data = open_data(dataset, stored, folder, progress)
    micro_batches = chosen.batch_size * chosen.grad_accumulation_steps
    T = model.config.next_tokens
    windows = Windows(data.train, chosen.context_len, T, micro_batches, chosen.seed)
    check_memory(model.config, chosen, (devices or (Device.DEFAULT,))[0])
    if base_weights is not None:
        load_weights(model, base_weights)
    validate = Validation(model, data.validation, chosen, devices)
    train_step = TrainStep(model, chosen, devices)
    run = None if folder is None else Run(folder, resumed=resume)
    reached = _resume(run, train_step, stored, say) if resume else Progress()
    if not resume:
        say(data.note)
    _set_steps(reached, chosen, windows, say)
    if len(data.validation.bytes) > chosen.validation_bytes:
        say(f"each validation measures the first {chosen.validation_bytes:,} held-out bytes")
    if run:
        weights = base_weights and os.path.abspath(base_weights)
        run.describe(
            {"settings": dataclasses.asdict(chosen)}
            | describe_data(data)
            | {
                "model": model.config.to_dict(),
                "base_weights": weights or stored.get("base_weights"),
                "devices": list(devices),
            }
        )
    records = _loop(train_step, windows, validate, run, reached, stop, on_micro_batch)
    # an uncaught error in a script can keep the generator open until the interpreter has torn down
    # the modules that saving needs: close the generator before that
    atexit.register(_close, weakref.ref(records), os.getpid())
    return records


def _close(reference: weakref.ref, owner: int) -> None:
    if (records := reference()) is not None and os.getpid() == owner:  # not in a forked child
        records.close()


def _stored_run(
    config: Config, folder: Path | None, base_weights: str | os.PathLike | None
) -> dict[str, Any]:
    """The training.json of the run to resume. Raises PicoError if it trained another model."""
    if base_weights is not None:
        raise PicoError("base_weights is for a new run; a resumed run has its own weights")
    if folder is None:
        raise PicoError("nothing to resume: no run was named")
    stored = read_description(folder)
    check_model(config, stored, folder)
    return stored


def _chosen_settings(
    given: dict[str, Any],
    stored: dict[str, Any],
    folder: Path | None,
    devices: tuple[str, ...],
    force: bool,
) -> TrainSettings:
    """The settings of a new run, or of one to resume; precision is never `auto`."""
    known = field_help(TrainSettings).keys()
    if wrong := ", ".join(sorted(given.keys() - known)):
        raise PicoError(f"unknown setting {wrong}; there are: {', '.join(sorted(known))}")
    if "precision" in given or not stored:
        precision = given.get("precision", TrainSettings.precision)
        given = given | {"precision": choose_precision(precision, devices)}
    return resumed_settings(given, stored, force, folder) if stored else TrainSettings(**given)


def _check_for_model(settings: TrainSettings, config: Config) -> None:
    if settings.router_warmup_steps and config.router != "learned":
        raise PicoError(
            f"router_warmup_steps is for the router learned, not for {config.router}; leave it out"
        )
    if config.router != "none" and config.capacity(settings.context_len) < 1:
        raise PicoError(
            f"context_len {settings.context_len} is too short: at a capacity factor of "
            f"{config.latent_capacity_factor} no byte is selected; take at least "
            f"{math.ceil(1 / config.latent_capacity_factor)}"
        )


def _resume(
    run: Run, train_step: TrainStep, stored: dict[str, Any], say: Callable[[str], None]
) -> Progress:
    """Load the newest valid checkpoint; without a checkpoint, the run starts at step 0."""
    model, reached = train_step.model, Progress()
    if list_checkpoints(run.folder):
        path, state, values, refused = load_newest(model, run.folder)
        train_step.load_state(state, path)
        reached = Progress.from_dict(values)
        run.last_checkpoint = path
        for problem in refused:
            say(f"skipped a checkpoint: {problem}")
        say(f"resuming after step {reached.step}, from {path}")
    else:
        if stored.get("base_weights"):
            load_weights(model, stored["base_weights"])
        say(f"{run.folder} ended before its first checkpoint: starting at step 1")
    now = {"devices": list(train_step.devices) or "one"}
    if changed := differences({"devices": stored["devices"] or "one"}, now):
        say(changed)
    run.truncate_to(reached.step)
    return reached


def _set_steps(
    reached: Progress, settings: TrainSettings, windows: Windows, say: Callable[[str], None]
) -> None:
    """Set the step at which training ends: max_steps, or when all epochs' windows are read."""
    left = settings.epochs * len(windows) - reached.windows
    total = min(settings.max_steps, reached.step + math.ceil(max(0, left) / windows.batch_size))
    if reached.steps not in (0, total):
        say(
            f"{total} steps in all, not {reached.steps}: from step {reached.step + 1} on the "
            "learning rate follows the curve of the new number"
        )
    reached.steps = total
    if limit := _limit_reached(reached, settings):
        say(f"nothing left to train; a larger --{limit.replace('_', '-')} continues the run")
    if total <= settings.warmup_steps:
        say(
            f"all {total} steps are within warmup_steps ({settings.warmup_steps}), so the learning "
            "rate never reaches its peak; more epochs or smaller batches give more steps"
        )
    if 0 < total <= settings.router_warmup_steps:
        say(
            f"all {total} steps are within router_warmup_steps ({settings.router_warmup_steps}), "
            "so the router is never trained on its own decisions; take fewer router_warmup_steps"
        )


def _limit_reached(progress: Progress, settings: TrainSettings) -> str:
    """The setting that ends training after the present step; "" if training goes on."""
    if settings.max_minutes and progress.seconds >= 60 * settings.max_minutes:
        return "max_minutes"
    if progress.step >= progress.steps:
        return "max_steps" if progress.steps == settings.max_steps else "epochs"
    return ""


class _NotFinite(PicoError):
    """A loss or gradient is not finite; `_loop` then writes no checkpoint."""


def _loop(
    train_step: TrainStep,
    windows: Windows,
    validate: Validation,
    run: Run | None,
    progress: Progress,
    stop: Callable[[], bool],
    on_micro_batch: Callable[[int, int], None],
) -> Iterator[Record]:
    """Run the steps until the last one or a stop, and save the last complete step.

    An error saves that step as well, except for a loss or gradient that is not finite. At the end
    the model is on the first device, and other processes may train the run.
    """
    settings = train_step.settings
    accumulation, context_len = settings.grad_accumulation_steps, settings.context_len
    time_limit = settings.max_minutes * 60 or math.inf  # seconds
    step_bytes = windows.batch_size * context_len
    pending: Record | None = None  # a record that is not in metrics.jsonl yet

    def ended() -> bool:
        return bool(_limit_reached(progress, settings))

    def interrupt(done: int) -> bool:
        on_micro_batch(done, accumulation)
        return stop()

    def save() -> None:
        if run and run.saved_step < progress.step:
            run.save(weights_of(train_step.model), train_step.state(), progress, settings)

    try:
        if run:
            _catch_up(run, progress, settings, validate, ended())
        stopped, steps_here = False, 0
        while not stopped and not ended():
            start = time.perf_counter()
            # the learning rate follows steps or time, whichever has progressed further
            position = max(progress.step, progress.steps * progress.seconds / time_limit)
            rate = learning_rate(position, settings, progress.steps)
            warmup = progress.step < settings.router_warmup_steps
            batch = windows.batch_at(progress.windows)  # (A * B, N + T)
            batch = batch.reshape(accumulation, settings.batch_size, -1)
            # not while the first steps compile, which takes long
            with _deferred_interrupt() if steps_here >= 2 else contextlib.nullcontext([]) as caught:
                losses = train_step(batch, rate, interrupt, router_warmup=warmup)
            if losses is None:  # stopped within the step
                break
            if losses[-1] != 1 or not np.isfinite(losses).all():
                saved = run.last_checkpoint if run else None
                raise _NotFinite(
                    f"a loss or gradient is not finite at step {progress.step + 1} (lr {rate:.2e});"
                    f" the weights were not updated; last checkpoint: {saved or 'none'}; try a "
                    "smaller --learning-rate"
                )
            seconds = time.perf_counter() - start
            epoch = progress.windows // len(windows)
            steps_here += 1
            # the first two steps of a process compile: each counts as the mean of all steps before
            mean = progress.seconds / max(1, progress.step)
            progress.seconds += seconds if steps_here > 2 else mean
            progress.step += 1
            progress.windows += windows.batch_size
            progress.bytes += step_bytes
            progress.validated = False
            record: Record = {
                "step": progress.step,
                "steps": progress.steps,
                "epoch": epoch,
                "loss": float(losses[0]),
                "next_byte_loss": float(losses[2]),
                "aux_loss": float(losses[1]),
                "bits_per_byte": float(losses[2]) / math.log(2),
                "router_rate": float(losses[3]),
                "router_overflow": float(losses[4]),
                "lr": rate,
                "bytes": progress.bytes,
                "bytes_per_second": step_bytes / seconds,
            }
            if settings.max_minutes:
                record["minutes"] = progress.seconds / 60
            pending = record
            stopped = stop() or bool(caught)
            # a stop skips the validation, which the resumed run makes up for in `_catch_up`
            if not stopped and (ended() or progress.step % settings.validation_interval == 0):
                record |= validate()
                progress.validated = True
                stopped = stop()
            if run:
                best = run.is_best(record) and settings.keep_best
                due = progress.step % settings.checkpoint_interval == 0
                saving = stopped or ended() or due or best
                if saving:
                    record["checkpoint"] = str(checkpoint_path(run.folder, progress.step))
                pending = None
                # log before saving, so that a resumed run has the records of all its steps
                run.log(record, durable=saving)
                if saving:
                    save()
            if caught:
                raise KeyboardInterrupt
            yield record
        save()
    except _NotFinite:
        raise
    except BaseException:  # also GeneratorExit, when the caller closes the generator or raises
        if run and train_step.consistent:
            with contextlib.suppress(PicoError):
                if pending:
                    run.log(pending, durable=True)
            save()
        raise
    finally:
        move(train_step.tensors, train_step.devices[:1])
        if run:
            run.close()


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    """Collect Ctrl-C in the yielded list, where KeyboardInterrupt would leave an update half done.

    Only in the main thread, and only while Python's own handler is in place.
    """
    caught: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield caught
        return
    signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _catch_up(
    run: Run, progress: Progress, settings: TrainSettings, validate: Validation, ended: bool
) -> None:
    """Validate the last step if a stop skipped that, so that no validation is missing."""
    due = ended or progress.step % settings.validation_interval == 0
    if not due or progress.validated or not run.records:
        return
    record = run.records[-1]
    if record["step"] == progress.step and BITS not in record:
        record |= validate()
        run.is_best(record)
        run.rewrite()
