"""The command line: parses, calls the library and prints. Nothing else knows about terminals."""

import argparse
import codecs
import contextlib
import dataclasses
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from .checkpoint import load, load_config, load_weights
from .config import PRESETS, Config
from .data import DataSpec, load_data
from .device import describe_backend, parse_devices
from .files import PicoError, atomic_write
from .generate import GeneratedByte, generate
from .model import Pico
from .plot import training_chart
from .runs import read_metrics
from .train import CHOICES, TrainSettings, train

CONFIG_HELP = {
    "dim": "width of the residual stream",
    "next_tokens": "how many next bytes are predicted at once, one head each",
    "att_q_heads": "query heads of every attention",
    "att_kv_heads": "key/value heads, each shared by equally many query heads",
    "fb_num_blocks": "full-bandwidth blocks before, and again after, the latent ones",
    "fb_att_window_size": "how many bytes back a full-bandwidth block sees",
    "latent_capacity_factor": "fraction of the bytes that training sends to the latent blocks",
    "latent_num_blocks": "latent blocks, which run on the selected bytes only",
    "latent_att_window_size": "how many selected bytes back a latent block sees",
}
TRAIN_HELP = {
    "context_len": "bytes of one training window",
    "batch_size": "windows of one (micro-)batch",
    "learning_rate": "its peak; warms up linearly, then falls along a cosine to a tenth",
    "weight_decay": "decay of the weights, matrices only",
    "epochs": "passes over the data; training ends at --max-steps if that comes first",
    "max_steps": "steps after which training ends",
    "warmup_steps": "steps until the learning rate is at its peak",
    "grad_accumulation_steps": "batches whose gradients are averaged for one step",
    "validation_interval": "measure on the held-out data every so many steps, and at the end",
    "checkpoint_interval": "write the weights every so many steps, and at the end",
    "validation_bytes": "measure on at most so many held-out bytes",
    "optimizer": "SOAP, or AdamW",
    "precision": "of the factors of matrix products; auto: bf16 where the device has units for it",
    "keep_checkpoints": "delete older checkpoints, so that so many remain; 0 keeps all",
    "seed": "decides the fresh weights and the order of the data",
}
DATA_HELP = {
    "column_name": "column that holds the text (default: text, else bytes)",
    "train_file": "file of the data set to train on",
    "validation_file": "file of the data set to validate on",
    "train_split": "split to train on (default: train)",
    "validation_split": "split to validate on (default: validation if there is one)",
    "validation_size": "else hold out the last documents: a fraction of the bytes below 1, "
    "or a number of documents (default 0.05)",
}


class Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage in front."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def number(text: str) -> int | float:
    return float(text) if "." in text or "e" in text.lower() else int(text)


def build_parser() -> Parser:
    parser = Parser(
        prog="pico_tg",
        description="Pico: a byte-level language model without a tokenizer, on tinygrad.",
        epilog="Start with: init models/small, then train models/small first, then run.",
    )
    parser.add_argument("--version", action="version", version=f"pico_tg {version('pico_tg')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wide = argparse.ArgumentDefaultsHelpFormatter

    init = commands.add_parser(
        "init", help="describe a new model in PATH/model.json", description=command_init.__doc__
    )
    init.add_argument("path", metavar="PATH", type=Path, help="folder to create for the model")
    init.add_argument("--preset", choices=PRESETS, default="xs", help="start from these sizes")
    for field in dataclasses.fields(Config):
        default = PRESETS["xs"][field.name]
        text = f"{CONFIG_HELP[field.name]} (xs: {default})"
        init.add_argument(flag(field.name), type=field.type, metavar="N", help=text)
    init.set_defaults(function=command_init)

    training = commands.add_parser(
        "train", help="train a model on text", description=command_train.__doc__
    )
    training.add_argument("path", metavar="PATH", type=Path, help="folder that init made")
    training.add_argument("run", metavar="RUN", help="name of this training run")
    training.add_argument(
        "dataset",
        metavar="DATASET",
        nargs="?",
        help="a Hugging Face name, a local folder of one, a .txt, .jsonl, .parquet or .csv file, "
        "or python-docs (default), English text that comes with Python",
    )
    for name, text in DATA_HELP.items():
        kind = number if name == "validation_size" else str
        training.add_argument(
            flag("dataset_" + name), type=kind, metavar="X", help=text, default=argparse.SUPPRESS
        )
    training.add_argument(
        "--base-weights", type=Path, metavar="FILE", default=argparse.SUPPRESS,
        help="start from these weights (.safetensors) instead of fresh ones",
    )  # fmt: skip
    for field in dataclasses.fields(TrainSettings):
        choice = {"choices": CHOICES[field.name]} if field.name in CHOICES else {"metavar": "N"}
        training.add_argument(
            flag(field.name), type=field.type, default=argparse.SUPPRESS,
            help=f"{TRAIN_HELP[field.name]} (default: {field.default})", **choice,
        )  # fmt: skip
    training.add_argument(
        "--resume", action="store_true",
        help="continue RUN from its newest valid checkpoint, with the settings that it had",
    )  # fmt: skip
    training.add_argument(
        "--tracker", choices=["wandb"], default=None,
        help="also log every record to Weights & Biases (pip install wandb)",
    )  # fmt: skip
    training.add_argument(
        "--devices", default="", metavar="N",
        help="share each batch among so many devices, or among these: CUDA:0,CUDA:1",
    )  # fmt: skip
    training.add_argument(
        "--force", action="store_true", help="resume although --batch-size is another one"
    )
    training.set_defaults(function=command_train)

    plotting = commands.add_parser(
        "plot", help="draw the curves of training runs", description=command_plot.__doc__
    )
    plotting.add_argument("path", metavar="PATH", type=Path, help="folder that init made")
    plotting.add_argument("runs", metavar="RUN", nargs="+", help="names of training runs")
    plotting.add_argument(
        "--output", type=Path, metavar="FILE", help="SVG to write (default: PATH/RUN-RUN.svg)"
    )
    plotting.set_defaults(function=command_plot)

    running = commands.add_parser(
        "run", help="write text with a trained model", description=command_run.__doc__,
        formatter_class=wide,
    )  # fmt: skip
    running.add_argument("path", metavar="PATH", type=Path, help="folder that init made")
    running.add_argument("run", metavar="RUN", help="name of the training run")
    running.add_argument(
        "--checkpoint", type=int, default=-1, metavar="N",
        help="step of the checkpoint; negative counts from the newest, -1",
    )  # fmt: skip
    running.add_argument("--prompt", default="", metavar="TEXT", help="text to continue")
    running.add_argument(
        "--temperature", type=float, default=1.0, metavar="T",
        help="below 1 more predictable, above 1 wilder, 0 always the likeliest byte",
    )  # fmt: skip
    running.add_argument(
        "--max-bytes", type=int, default=1024, metavar="N", help="stop after so many bytes"
    )
    running.add_argument(
        "--seed", type=int, default=argparse.SUPPRESS, metavar="N",
        help="the same seed writes the same text",
    )  # fmt: skip
    running.add_argument(
        "--show-router-decisions", action="store_true",
        help="put _ before each byte that the router sent through the latent blocks",
    )  # fmt: skip
    running.set_defaults(function=command_run)
    return parser


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def command_init(args: argparse.Namespace) -> int:
    """Describe a new model: writes PATH/model.json. Weights come into being with `train`."""
    names = [field.name for field in dataclasses.fields(Config)]
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = Config.preset(args.preset, **changes)
    if args.path.exists():
        raise PicoError(f"{args.path} exists; choose another PATH, or delete it to start over")
    try:
        args.path.mkdir(parents=True)
    except OSError as error:
        raise PicoError(f"cannot create {args.path}: {error.strerror}") from error
    config.to_json(args.path / "model.json")
    print(f"{args.path / 'model.json'}: {config.parameters:,} parameters")
    print(f"next: python -m pico_tg train {args.path} RUN DATASET")
    return 0


def command_train(args: argparse.Namespace) -> int:
    """Train the model in PATH on DATASET; writes weights and metrics to PATH/RUN."""
    options = vars(args)
    fields = [field.name for field in dataclasses.fields(TrainSettings)]
    settings = {name: options[name] for name in fields if name in options}
    named = {name: options["dataset_" + name] for name in DATA_HELP if "dataset_" + name in options}
    run_dir = args.path / args.run
    if args.resume and "base_weights" in options:
        raise PicoError("--base-weights starts a run; it cannot go with --resume")
    if args.resume and named and args.dataset is None:
        raise PicoError("give the DATASET too, or leave its options out: --resume knows them")
    if args.force and not args.resume:
        raise PicoError("--force goes with --resume")
    resumed = args.resume and args.dataset is None
    spec = None if resumed else DataSpec(args.dataset or "python-docs", **named)
    config = load_config(args.path)
    if run_dir.exists() and not args.resume:
        raise PicoError(f"{run_dir} exists; continue it with --resume, or choose another RUN")
    devices = parse_devices(args.devices) if args.devices else ()
    tracker = import_tracker(args.tracker)
    # what can be wrong is looked at before the model is built
    if not args.resume:
        TrainSettings(**settings)
    data = None if spec is None else load_data(spec)
    model = Pico(config, settings.get("seed", TrainSettings.seed))
    if "base_weights" in options:
        load_weights(model, args.base_weights)
    stopping = StopSignals()
    with contextlib.ExitStack() as stack:
        tracked = None
        if tracker:
            name = f"{args.path.name}/{args.run}"
            tracked = start_tracker(tracker, name, dataclasses.asdict(config) | settings)
            stack.callback(tracked.finish)
        records = train(
            model, data, run_dir, devices=devices, resume=args.resume, force=args.force,
            stop=stopping, progress=True, say=say, **settings,
        )  # fmt: skip
        say(f"{describe_backend()}; {config.parameters:,} parameters")
        # not before: until the first step, a Ctrl-C just leaves
        with stopping:
            checkpoint = show_training(logged(records, tracked) if tracked else records)
    if not checkpoint:
        say(f"{run_dir} has nothing left to train; a larger --max-steps would give it more")
        return 0
    again = f"python -m pico_tg train {args.path} {args.run} --resume"
    if stopping():
        say(f"wrote {checkpoint}; go on with: {again}")
        return 130
    say(f"wrote {checkpoint}; write text with: python -m pico_tg run {args.path} {args.run}")
    return 0


def import_tracker(name: str | None) -> ModuleType | None:
    if name is None:
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PicoError(f"--tracker {name} needs its package: pip install {name}") from error


def start_tracker(tracker: ModuleType, name: str, settings: dict[str, Any]) -> Any:
    try:
        return tracker.init(project="pico_tg", name=name, config=settings)
    except Exception as error:  # it has exceptions of its own: not logged in, no network
        raise PicoError(f"--tracker {tracker.__name__}: {error}") from error


def logged(records: Iterator[dict], tracked: Any) -> Iterator[dict]:
    """The records, each logged to a tracker's run on its way."""
    for record in records:
        tracked.log(record, step=record["step"])
        yield record


class StopSignals:
    """While it lasts, Ctrl-C and SIGTERM ask for a stop after the step; a second one is final.

    Signals within a second are one: whoever forwards a signal often sends it twice.
    """

    asked_at: float | None = None

    def __enter__(self) -> "StopSignals":
        self.before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, signum: int, frame: object) -> None:
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            say("\nstopping after this step (again: at once, without saving)")
        elif now - self.asked_at > 1:
            os._exit(130)

    def __call__(self) -> bool:
        return self.asked_at is not None

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


def show_training(records: Iterator[dict]) -> str:
    """A progress bar, and a line a validation; returns the last checkpoint's path."""
    checkpoint, smoothed = "", None
    with tqdm(unit="step", desc="compiling", dynamic_ncols=True) as bar:
        for shown, record in enumerate(records, 1):
            bits = record["bits_per_byte"]
            smoothed = bits if smoothed is None else 0.9 * smoothed + 0.1 * bits
            if shown <= 2:
                # The first two steps compile, and the steps of a run that is resumed took no time
                # here: the clock starts after them, or the time left would be theirs to say.
                bar.reset(record["steps"])
                bar.n = bar.last_print_n = bar.initial = record["step"]
            else:
                bar.update(1)
            if shown == 2:
                bar.set_description("training", refresh=False)
            bar.set_postfix_str(
                f"loss {record['loss']:.3f}, {smoothed:.3f} bits/byte, "
                f"{record['router_rate']:.0%} routed, lr {record['lr']:.1e}, "
                f"{record['bytes_per_second']:,.0f} bytes/s"
            )
            checkpoint = record.get("checkpoint", checkpoint)
            if "validation_bits_per_byte" in record:
                tqdm.write(
                    f"step {record['step']}: validation "
                    f"{record['validation_bits_per_byte']:.3f} bits/byte as used, "
                    f"{record['validation_bits_per_byte_top_k']:.3f} with training's routing, "
                    f"{record['validation_router_rate']:.0%} of the bytes routed "
                    f"({record['validation_seconds']:.1f} s)",
                    file=sys.stderr,
                )
    return checkpoint


def command_plot(args: argparse.Namespace) -> int:
    """Draw the curves of training runs, overlaid: bits per byte, router rate, learning rate."""
    load_config(args.path)
    runs = {}
    for name in args.runs:
        runs[name] = [r for r in read_metrics(args.path / name) if "bytes" in r]
        if not runs[name]:
            raise PicoError(f"{args.path / name}/metrics.jsonl holds no step yet")
    # a run may lie in a folder of its own: sub/a
    names = [re.sub(r"[/\\]+", "-", name).strip("-.") for name in args.runs]
    output = args.output or args.path / f"{'-'.join(names)}.svg"
    with atomic_write(output) as file:
        file.write(training_chart(runs).encode())
    print(output)
    return 0


def command_run(args: argparse.Namespace) -> int:
    """Write text with the model PATH as trained in RUN, as it is made."""
    model = load(args.path, args.run, args.checkpoint)
    say(describe_backend())
    records = generate(
        model,
        os.fsencode(args.prompt),
        max_bytes=args.max_bytes,
        temperature=args.temperature,
        seed=getattr(args, "seed", None),
    )
    sys.stdout.write(args.prompt)
    sys.stdout.flush()
    for text in decode_text(records, "_" if args.show_router_decisions else ""):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return 0


def decode_text(records: Iterable[GeneratedByte], mark: str = "") -> Iterator[str]:
    """The text as far as it is decided after each byte; `mark` before each routed byte.

    A byte that is not valid UTF-8 becomes U+FFFD. The mark of a byte inside a character stands
    before that character.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    marks = ""
    for record in records:
        marks += mark if record.router_decision else ""
        if text := decoder.decode(bytes([record.byte])):
            yield marks + text
            marks = ""
    if text := decoder.decode(b"", final=True):
        yield marks + text


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for an error, 130 when interrupted."""
    # bytes of a prompt or of a sample that are not UTF-8 must not stop the stream
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(arguments)
    function: Callable[[argparse.Namespace], int] = args.function
    try:
        return function(args)
    except PicoError as error:
        message = " ".join(str(error).split())
        say(f"pico_tg: error: {message}")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # whoever read us has had enough; keep Python's own flush at exit from complaining
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError) as error:  # a name too long, say
        say(f"pico_tg: error: {' '.join(str(error).split()) or 'not enough memory'}")
        return 2
