"""Training: a generator that yields one record per step. Nothing here prints.

for record in train(model, "python-docs", max_steps=200, context_len=512, batch_size=4):
    print(record["step"], record["bits_per_byte"])

Reading order: `learning_rate`, `TrainStep` (one optimizer step), `train` (opens or resumes a run),
`_loop` (step, record, validate, log, save, yield).
"""

import atexit
import contextlib
import dataclasses
import math
import os
import time
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Device, Tensor, dtypes, nn

from .backend.precision import choose_precision, graph_context
from .backend.runtime import exclusive, jit_method, write_all, write_into
from .checkpoint import checkpoint_path, list_checkpoints, load_newest, load_weights
from .config import Config, TrainSettings
from .costs import CHOSEN, check_memory, plan
from .data import Data, DataSpec, Windows, describe_data, open_data, trained_on
from .evaluation import Validation
from .files import PicoError, differences
from .model import Pico, inputs_and_targets, loss_fn
from .ops import entropy
from .optim.soap import SOAP, all_finite
from .progress import Events
from .routing import top_k_decisions
from .runs import (
    BITS,
    Progress,
    Record,
    Run,
    ancestry,
    check_model,
    check_startable,
    edited,
    read_description,
    resumed_settings,
)

LEAST_TEXT = 256  # bytes to train on, tags included; fewer are taken for a mistake
UNREAD = 0.03  # share of the data; `train` says so if more of them are in no window
# settings that do not change the compiled step, except that it depends on router_warmup_steps > 0
NOT_COMPILED = (
    "learning_rate", "epochs", "max_steps", "max_minutes", "warmup_steps", "router_warmup_steps",
    "validation_interval", "checkpoint_interval", "validation_bytes", "keep_checkpoints",
    "keep_best", "seed",
)  # fmt: skip
ADAMW_STATE = ("b1_t", "b2_t", "m", "v")


def learning_rate(position: float, settings: TrainSettings, total_steps: int) -> float:
    """The learning rate at step 0, 1, …: linear warm-up, then a cosine to 10 % at `total_steps`.

    With max_minutes, `position` may follow the elapsed training time; then it is no whole number.
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
    # of all heads' logits, so that the loss shares the sums; only head 0's entropy is computed
    uncertainty = entropy(logits)[:, :, 0].detach()
    return top_k_decisions(uncertainty, config.capacity(logits.shape[1]))


@contextlib.contextmanager
def _graph_context(settings: TrainSettings, devices: tuple[str, ...]) -> Iterator[None]:
    with Tensor.train(), graph_context(settings, devices):
        yield


class TrainStep:
    """One compiled optimizer step on bytes uint8 [A, B, N + T], averaged over A micro-batches.

    Returns float32 [6]:

    - loss, aux loss, next-byte loss (nats)
    - share of the bytes that causal routing selects
    - share of the bytes that training selects, but that have no slot
    - 1 if every loss and gradient is finite; else 0, and no weight has changed

    `consistent` is False from the start of an update until the caller has counted the step.
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
        self.consistent = True
        constants = [(k, v) for k, v in vars(settings).items() if k not in NOT_COMPILED]
        compiled = partial(
            jit_method,
            devices=devices,
            context=partial(_graph_context, settings, devices),
            tensors=self._graph_tensors(),
            determined_by=(model.config, constants, settings.router_warmup_steps > 0),
            of_training=True,
        )
        self.whole_step = compiled(self._whole_step)
        self.accumulate = compiled(self._accumulate)
        self.update = compiled(self._update)

    def _gradients(self, windows: Tensor, warmup: Tensor) -> tuple[Tensor, list[Tensor]]:
        config = self.model.config
        x, targets = inputs_and_targets(windows, config.next_tokens)
        logits, z, decisions = self.model(x)
        router_target = decisions
        # computed in every step: a second graph would take seconds to compile
        if self.settings.router_warmup_steps:
            warmup = (warmup > 0).expand(*decisions.shape)
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

    def _whole_step(self, windows: Tensor, warmup: Tensor, lr: Tensor) -> Tensor:
        losses, gradients = self._gradients(windows, warmup)
        Tensor.realize(losses, *gradients)
        return losses.cat(self._apply(gradients, lr)).realize()

    def _accumulate(self, windows: Tensor, warmup: Tensor) -> Tensor:
        losses, gradients = self._gradients(windows, warmup)
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
        events: Events | None = None,
        router_warmup: bool = False,
    ) -> np.ndarray | None:
        """Take the step, or return None if `events` stop it between two micro-batches.

        A stop discards the gradients; weights and optimizer stay unchanged. router_warmup: whether
        `most_uncertain` bytes are the target of the router; no effect if router_warmup_steps is 0.
        """
        events = events or Events()
        rate, warmup = np.array([lr], np.float32), np.array([router_warmup], np.int32)
        if len(batches) == 1:
            self.consistent = False
            losses = self.whole_step(batches[0], warmup, rate).copy()
        else:
            parts = []
            for done, batch in enumerate(batches, 1):
                parts.append(self.accumulate(batch, warmup).copy())
                events.part(done, len(batches))
                if done < len(batches) and events.stop():
                    for total in self.sums:
                        write_into(total, np.zeros(total.shape, np.float32))
                    return None
            self.consistent = False
            losses = np.concatenate([np.mean(parts, axis=0), self.update(rate)])
        if isinstance(self.optimizer, SOAP):
            self.optimizer.refresh()
        return losses

    def _graph_tensors(self) -> list[Tensor]:
        """All tensors that the compiled methods read or write."""
        tensors = [*self.tensors, *self._state().values(), *self.rates, *self.sums]
        if isinstance(self.optimizer, SOAP):
            tensors += [self.optimizer.finite, *self.optimizer.indices]
        return tensors

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
    events: Events | None = None,
    settings: str | None = None,
    **given: int | float | str,
) -> Iterator[Record]:
    """Train `model` in place, yielding one record (a dict that is valid JSON) per step.

    - dataset: `pico_tg.DataSpec`, its `dataset` alone, or loaded data; None is `python-docs`
    - run_dir: receives training.json, metrics.jsonl (the records) and checkpoints, see
      `pico_tg.runs`; must be new, or of a run that ended before its first checkpoint. The folder
      above it receives model.json; a model.json that is there already must be of this model
    - devices: names such as ("CUDA:0", "CUDA:1") share each batch; training leaves the model on the
      first
    - resume: continue the run in run_dir from its newest valid checkpoint, bit for bit. May differ
      from the run: the settings in `pico_tg.runs.MAY_CHANGE`, the path of unchanged data, and with
      `force` batch_size
    - base_weights: .safetensors file to start from; recorded in training.json. Before the
      first step, `events` say how well these weights predict the held-out text
    - events: the user interface. `StopSignals` in pico_tg.tools.terminal stops at Ctrl-C
    - given: fields of `pico_tg.TrainSettings`
    - settings: source of the fields of a new run that are not given: "chosen", the default, for the
      device, the model and the data (`pico_tg.costs.choose`), or "published"

    A record has: step (from 1), steps (total), epoch (from 0), loss, next_byte_loss, aux_loss
    (nats; its target changes after router_warmup_steps), bits_per_byte (of the next byte, training
    routing, the tags between documents included), router_rate (share of bytes that causal routing
    selects), router_overflow (share of bytes that a rule selects beyond `Config.capacity`, which
    skip the deep blocks), lr, bytes (trained on so far), bytes_per_second. After some steps a
    record also has seconds_left (estimated, validations included), with max_minutes minutes (used
    so far) and max_minutes, after a validation the keys of `Validation`, and with a checkpoint
    `checkpoint`, its path. The first record of a run with chosen settings has `chosen`, a dict of
    them.

    The last step is saved if `events` stop, if the caller closes the generator or ends with an
    error, and if a validation ends with any error but the one below. An error or Ctrl-C during an
    update saves nothing, since the weights may be half updated; the run then resumes from the
    checkpoint before.

    Raises PicoError on bad settings or data, before anything is written, and on a loss or gradient
    that is not finite, before that step changes the weights. A validation that is not finite raises
    it too, and that step is neither saved nor logged.
    """
    events = events or Events()
    folder = None if run_dir is None else Path(run_dir)
    stored = _stored_run(model.config, folder, base_weights) if resume else {}
    if settings not in (None, "chosen", "published"):
        raise PicoError(f"settings must be chosen or published, not {settings!r}")
    if resume and settings:
        raise PicoError("settings is for a new run; a resumed run has its own, leave it out")
    chosen = _chosen_settings(given, stored, folder, devices, force)
    _check_for_model(chosen, model.config)
    if not resume and chosen.learning_rate == 0:
        raise PicoError("learning_rate must be a number above 0, not 0")
    if folder is not None and not resume:
        check_startable(folder)
        model.config.exists(folder.parent / "model.json")
    data = open_data(dataset, stored, folder, events.bars)
    if (size := len(data.train.bytes)) < LEAST_TEXT and not resume:
        raise PicoError(
            f"{size} bytes to train on, from {data.spec.dataset}, are too few: at least "
            f"{LEAST_TEXT} are needed, document tags included"
        )
    device = (devices or (Device.DEFAULT,))[0]
    picked, lines = {}, []
    if not resume and settings != "published":
        chosen, lines = plan(
            model.config, len(data.train.bytes), device, given | {"precision": chosen.precision},
            trained=base_weights is not None, held_out=len(data.validation.bytes),
            progress=events.bars,
        )  # fmt: skip
        if len(devices) > 1 and device.startswith("CPU"):
            lines.append(
                "several CPU devices share the cores: training takes longer than estimated"
            )
        picked = {name: getattr(chosen, name) for name in CHOSEN if name not in given}
        _check_for_model(chosen, model.config)
    micro_batches = chosen.batch_size * chosen.grad_accumulation_steps
    T = model.config.next_tokens
    windows = Windows(data.train, chosen.context_len, T, micro_batches, chosen.seed)
    check_memory(model.config, chosen, device)
    if base_weights is not None:
        load_weights(model, base_weights)
        if line := edited(model.config, Path(base_weights).parent):
            events.say(line)
        for trained, known in ancestry(Path(base_weights).parent):
            if line := trained_on(data.validation.bytes, data, known, trained):
                lines.append(f"warning: text to validate on: {line}")
    validate = Validation(model, data.validation, chosen, devices)
    train_step = TrainStep(model, chosen, devices)
    run = None if folder is None else Run(folder, resumed=resume)
    progress = _resume(run, train_step, stored, events) if resume else Progress()
    if not resume:
        for line in (data.note, *lines):
            events.say(line)
        if windows.unread > UNREAD * len(data.train.bytes):
            events.say(
                f"the last {windows.unread:,} bytes are in no window, since they are fewer than "
                f"context_len ({chosen.context_len}); a smaller one leaves out less"
            )
    _set_steps(progress, chosen, windows, events, stored.get("settings", {}))
    if progress.steps < chosen.max_steps and not resume and "max_steps" not in picked:
        epochs = "1 epoch" if chosen.epochs == 1 else f"{chosen.epochs} epochs"
        events.say(
            f"{progress.steps} steps, not max_steps ({chosen.max_steps}): the data end after "
            f"{epochs}; more epochs give more steps"
        )
    if len(data.validation.bytes) > chosen.validation_bytes:
        events.say(f"each validation measures the first {chosen.validation_bytes:,} held-out bytes")
    if run and not (resume and _limit_reached(progress, chosen)):  # else nothing is trained
        if not resume and not model.config.exists(folder.parent / "model.json"):
            model.config.to_json(folder.parent / "model.json")
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
    before = base_weights is not None
    records = _loop(train_step, windows, validate, run, progress, events, before, picked)
    # an uncaught error in a script can keep the generator open until the interpreter has torn down
    # the modules that saving needs: close the generator before that
    # (test_resume.test_a_script_s_error_saves_the_last_step)
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
        raise PicoError("base_weights is for a new run; a resumed run has its own, leave it out")
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


def _resume(run: Run, train_step: TrainStep, stored: dict[str, Any], events: Events) -> Progress:
    """Load the newest valid checkpoint; without a checkpoint, the run starts at step 0."""
    model, progress = train_step.model, Progress()
    if list_checkpoints(run.folder):
        path, state, values, refused = load_newest(model, run.folder)
        train_step.load_state(state, path)
        progress = Progress.from_dict(values)
        for problem in refused:
            events.say(f"skipped a checkpoint: {problem}")
        events.say(f"resuming after step {progress.step}, from {path}")
    else:
        if stored.get("base_weights"):
            load_weights(model, stored["base_weights"])
        events.say(f"{run.folder} ended before its first checkpoint: starting at step 1")
    now = {"devices": list(train_step.devices) or "one"}
    if changed := differences({"devices": stored["devices"] or "one"}, now):
        events.say(changed)
    run.resume_after(progress.step)
    return progress


def _set_steps(
    progress: Progress,
    settings: TrainSettings,
    windows: Windows,
    events: Events,
    before: dict[str, Any],
) -> None:
    """Set the step at which training ends: max_steps, or when all epochs' windows are read.

    before: the settings of the run that is resumed; a jump of the learning rate is said.
    """
    left = settings.epochs * len(windows) - progress.windows
    total = min(settings.max_steps, progress.step + math.ceil(max(0, left) / windows.batch_size))
    now = {"the last step": total, "max_minutes": settings.max_minutes}
    changed = differences(before | {"the last step": progress.steps or total}, now)
    progress.steps = total
    if limit := _limit_reached(progress, settings):
        events.say(f"nothing left to train; a larger --{limit.replace('_', '-')} continues the run")
    elif progress.step and changed:
        events.say(
            f"{changed}: from step {progress.step + 1} on the learning rate follows the curve of "
            "the new number"
        )
    if total <= settings.warmup_steps:
        events.say(
            f"all {total} steps are within warmup_steps ({settings.warmup_steps}), so the learning "
            "rate only rises; more epochs or smaller batches give more steps"
        )
    if 0 < total <= settings.router_warmup_steps:
        events.say(
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


def _loop(
    train_step: TrainStep,
    windows: Windows,
    validate: Validation,
    run: Run | None,
    progress: Progress,
    events: Events,
    measure_before: bool,
    picked: dict[str, int | float],
) -> Iterator[Record]:
    """Run the steps until the last one or a stop, and save the last complete step.

    At the end the model is on the first device, and other processes may train the run.
    """
    settings, stopped, record = train_step.settings, False, {}

    def save() -> None:
        run.save(train_step.model.weights(), train_step.state(), progress, settings)

    def validated(record: Record) -> Record:
        """The record with a validation if one is due and `events` do not stop it.

        A stop leaves it out, and the resumed run makes up for it.
        """
        last = bool(_limit_reached(progress, settings))
        if not last and not progress.validation_due(settings):
            return record
        events.phase("validating")
        found = validate(events, top_k=last) or {}
        return record | _finite(found, train_step, record)

    try:
        if measure_before:
            events.phase("validating")
            if measured := validate(events):
                bits = measured[BITS]
                events.say(f"before the first step: {bits:.3f} bits per byte of held-out text")
                if bits > 8:  # what equal probabilities of all bytes take
                    events.say(
                        "these weights know nothing of this text (chance takes 8 bits); fresh "
                        "ones, without --from or --base-weights, may learn it better"
                    )
            stopped = events.stop()
        if run and run.last and BITS not in run.last:
            record = validated(run.last)
            if BITS in record:
                run.is_best(record)
                run.log(record)
            stopped = events.stop()
        while not stopped and not _limit_reached(progress, settings):
            record = _step(train_step, windows, progress, events)
            if not record:  # stopped within the step
                break
            if picked:
                record["chosen"], picked = picked, {}
            start, record = time.perf_counter(), validated(record)
            if (left := progress.seconds_left(settings, validate.bytes)) is not None:
                record["seconds_left"] = round(left, 1)
            ended, stopped = _limit_reached(progress, settings), events.stop()
            if run:
                best = run.is_best(record) and settings.keep_best
                due = progress.step % settings.checkpoint_interval == 0
                if saving := stopped or ended or due or best:
                    record["checkpoint"] = str(checkpoint_path(run.folder, progress.step))
                run.log(record)  # before saving: a resumed run has the records of all its steps
                if saving:
                    save()
            yield record
            if BITS in record:  # with the checkpoint, and what the caller does after it
                progress.validation_times.append(time.perf_counter() - start)
            if ended == "epochs" and settings.max_minutes:
                events.say("the epochs end before max_minutes; a larger --epochs continues the run")
    finally:  # also after an error, and when the caller closes the generator
        move(train_step.tensors, train_step.devices[:1])
        if run:
            with contextlib.closing(run):
                if train_step.consistent and run.saved_step < progress.step:
                    if run.logged_step < progress.step:  # the validation failed, or the log
                        with contextlib.suppress(PicoError):
                            run.log(record)
                    save()


def _step(
    train_step: TrainStep, windows: Windows, progress: Progress, events: Events
) -> Record | None:
    """Take a step and count it -> its record; None if `events` stopped it."""
    events.phase("training" if progress.steps_here >= 2 else "compiling")
    settings, start = train_step.settings, time.perf_counter()
    rate = learning_rate(progress.position(settings), settings, progress.steps)
    batch = windows.batch(progress.windows)  # (A * B, N + T)
    batch = batch.reshape(settings.grad_accumulation_steps, settings.batch_size, -1)
    warmup = progress.step < settings.router_warmup_steps
    losses = train_step(batch, rate, events, router_warmup=warmup)
    if losses is None:
        return None
    if losses[-1] != 1 or not np.isfinite(losses).all():
        raise PicoError(
            f"a loss or gradient is not finite at step {progress.step + 1} (lr {rate:.2e}); the "
            "weights were not updated, and no checkpoint is written; try a smaller --learning-rate"
        )
    seconds, epoch = time.perf_counter() - start, progress.windows // len(windows)
    progress.took(seconds, windows.batch_size, windows.batch_size * settings.context_len)
    train_step.consistent = True
    speed = windows.batch_size * settings.context_len / seconds
    record = _record(losses, progress) | {"epoch": epoch, "lr": rate, "bytes_per_second": speed}
    timed = {"minutes": progress.seconds / 60, "max_minutes": settings.max_minutes}
    return record | (timed if settings.max_minutes else {})


def _finite(measured: Record, train_step: TrainStep, record: Record) -> Record:
    """A validation's figures. Raises PicoError if one is not finite; the step is then not saved."""
    if np.isfinite(list(measured.values())).all():
        return measured
    train_step.consistent = False
    raise PicoError(
        f"the validation of step {record['step']} is not finite (lr {record['lr']:.2e}); this step "
        "is not saved, and the run resumes from the checkpoint before; try a smaller "
        "--learning-rate in a new RUN"
    )


def _record(losses: np.ndarray, progress: Progress) -> Record:
    """The part of a record that follows from what `TrainStep` returns, and from the progress."""
    loss, aux_loss, next_byte_loss, router_rate, router_overflow = map(float, losses[:5])
    return {
        "step": progress.step,
        "steps": progress.steps,
        "loss": loss,
        "next_byte_loss": next_byte_loss,
        "aux_loss": aux_loss,
        "bits_per_byte": next_byte_loss / math.log(2),
        "router_rate": router_rate,
        "router_overflow": router_overflow,
        "bytes": progress.bytes,
    }
