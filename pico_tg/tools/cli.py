"""The command line: parses, calls the library and prints. Nothing else knows about terminals."""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from ..backend import describe_backend, kernel_search, parse_devices
from ..checkpoint import find_checkpoint, load, load_config
from ..config import PRECISIONS, PRESETS, Config, TrainSettings, field_help
from ..data import DataSpec, has_validation, load_data, load_whole
from ..evaluation import SPLITS, check_options, evaluate
from ..files import PicoError, atomic_write, check_writable
from ..generation import GeneratedByte, Stats, generate
from ..interrupts import as_usual
from ..model import Pico
from ..runs import find_description, read_metrics
from ..training import stored_spec, train
from .bench import bench_decode, bench_train
from .html import html_page
from .info import describe
from .plot import training_chart
from .report import describe_evaluation, describe_measured, describe_model, describe_stats
from .terminal import (
    RESET,
    StopSignals,
    colored_text,
    decode_text,
    drop_output,
    put,
    say,
    show_training,
    split_prompt,
    split_samples,
    visible,
)

BENCH_SETTINGS = (
    "batch_size", "grad_accumulation_steps", "optimizer", "precision", "checkpoint_activations",
)  # fmt: skip
DATA_HELP = {
    "column_name": "column that holds the text (default: text, else bytes)",
    "train_file": "file of the data set to train on",
    "validation_file": "file of the data set to validate on",
    "train_split": "split to train on (default: train if there is one, else the only one)",
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


def add_setting(
    parser: argparse.ArgumentParser, field: dataclasses.Field, default: Any, only: str = ""
) -> None:
    """The flag of a setting of training; only a flag that is given gets into the options."""
    choices = field.metadata["choices"]
    if field.type is bool:
        kind = {"action": "store_true"}
    else:
        kind = {"choices": choices} if choices else {"metavar": "N"}
        kind |= {"type": field.type}
    end = "" if field.type is bool else f" (default: {default})"
    text = only + field.metadata["help"] + end
    parser.add_argument(flag(field.name), default=argparse.SUPPRESS, help=text, **kind)


def number(text: str) -> int | float:
    return float(text) if "." in text or "e" in text.lower() else int(text)


def build_parser() -> Parser:
    parser = Parser(
        prog="pico_tg",
        description="Pico: a byte-level language model without a tokenizer, on tinygrad.",
        epilog="Start with: init models/small, then train models/small first --context-len 512 "
        "--batch-size 4 --epochs 8 (the defaults are for a GPU), then run models/small first.",
    )
    parser.add_argument("--version", action="version", version=f"pico_tg {version('pico_tg')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    init = commands.add_parser(
        "init", help="describe a new model in PATH/model.json", description=command_init.__doc__
    )
    init.add_argument("path", metavar="PATH", type=Path, help="folder to create for the model")
    init.add_argument("--preset", choices=PRESETS, default="xs", help="start from these sizes")
    add_sizes(init)
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
    add_data_flags(training)
    training.add_argument(
        "--base-weights", type=Path, metavar="FILE", default=argparse.SUPPRESS,
        help="start from these weights (.safetensors) instead of fresh ones",
    )  # fmt: skip
    for field in dataclasses.fields(TrainSettings):
        add_setting(training, field, field.default)
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
    add_beam(training)
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

    evaluating = commands.add_parser(
        "eval", help="measure a trained model on text", description=command_eval.__doc__
    )
    evaluating.add_argument("path", metavar="PATH", type=Path, help="folder that init made")
    evaluating.add_argument("run", metavar="RUN", help="name of the training run")
    evaluating.add_argument(
        "dataset", metavar="DATASET", nargs="?",
        help="as for train (default: the data that the run was trained on)",
    )  # fmt: skip
    add_data_flags(evaluating)
    add_checkpoint_flag(evaluating)
    evaluating.add_argument(
        "--split", choices=SPLITS,
        help="validation or train, the parts that train makes of DATASET, or all, which holds "
        "nothing out (default: validation; all of a DATASET that has no validation data of its "
        "own and that the run was not trained on)",
    )  # fmt: skip
    evaluating.add_argument(
        "--max-bytes", type=int, metavar="N", help="only the first so many bytes (default: all)"
    )
    evaluating.add_argument(
        "--context-len", type=int, metavar="N",
        help="bytes that each byte has before it, or all there are (default: as in training)",
    )  # fmt: skip
    evaluating.add_argument(
        "--stride", type=int, metavar="N",
        help="new bytes of each window; windows have context-len more (default: context-len)",
    )  # fmt: skip
    evaluating.add_argument(
        "--batch-size", type=int, metavar="N",
        help="windows of one pass (default: as many as make 16,384 bytes)",
    )  # fmt: skip
    evaluating.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help=field_help(TrainSettings)["precision"],
    )
    evaluating.add_argument(
        "--json", action="store_true", help="print the figures as JSON instead of tables"
    )
    evaluating.add_argument(
        "--html", type=Path, metavar="FILE",
        help="also write a page with the first 4,000 bytes, shaded by router weight",
    )  # fmt: skip
    evaluating.set_defaults(function=command_eval)

    informing = commands.add_parser(
        "info", help="sizes and costs of a model, checkpoints of a run",
        description=command_info.__doc__,
    )  # fmt: skip
    informing.add_argument("path", metavar="PATH", type=Path, help="folder that init made")
    informing.add_argument("run", metavar="RUN", nargs="?", help="name of a training run")
    informing.add_argument("--json", action="store_true", help="print it as JSON")
    informing.set_defaults(function=command_info)

    running = commands.add_parser(
        "run", help="write text with a trained model", description=command_run.__doc__
    )
    running.add_argument("path", metavar="PATH", type=Path, help="folder that init made")
    running.add_argument("run", metavar="RUN", help="name of the training run")
    add_checkpoint_flag(running)

    prompting = running.add_argument_group("what is continued (default: a new document)")
    source = prompting.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", default="", metavar="TEXT", help="this text; - reads bytes from standard input"
    )
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="the bytes of this file")
    prompting.add_argument(
        "--raw-prompt", action="store_true",
        help="the model sees nothing but the prompt; else it is the beginning of a document",
    )  # fmt: skip

    sampling = running.add_argument_group("how bytes are chosen")
    sampling.add_argument(
        "--temperature", type=float, default=1.0, metavar="T",
        help="below 1 more predictable, above 1 wilder, 0 always the likeliest byte (default: 1)",
    )  # fmt: skip
    sampling.add_argument(
        "--top-k", type=int, default=0, metavar="K",
        help="only among the K likeliest bytes (default: 0, all)",
    )  # fmt: skip
    sampling.add_argument(
        "--top-p", type=float, default=1.0, metavar="P",
        help="only among the likeliest bytes that together reach the probability P (default: 1)",
    )  # fmt: skip
    sampling.add_argument(
        "--min-p", type=float, default=0.0, metavar="P",
        help="only among bytes at least P times as likely as the likeliest one (default: 0)",
    )  # fmt: skip
    sampling.add_argument(
        "--seed", type=int, metavar="N", help="the same seed writes the same text"
    )
    sampling.add_argument(
        "--max-bytes", type=int, default=1024, metavar="N",
        help="stop after so many bytes (default: 1024)",
    )  # fmt: skip
    sampling.add_argument(
        "--ignore-end", action="store_true",
        help="write on where the model would end the document; the end tag is part of the text",
    )  # fmt: skip
    sampling.add_argument(
        "--num-samples", type=int, default=1, metavar="N",
        help="continue the prompt so many times, each after a line --- sample 1 of N --- "
        "(default: 1, without that line)",
    )  # fmt: skip
    sampling.add_argument(
        "--no-speculative", action="store_true",
        help="one pass a byte, instead of verifying the model's own guesses of the next ones; "
        "slower, with the same distribution of texts",
    )  # fmt: skip
    sampling.add_argument(
        "--disable-latent", action="store_true",
        help="leave the latent blocks out, to see what they are for",
    )  # fmt: skip

    showing = running.add_argument_group("how the text is shown")
    showing.add_argument(
        "--output", choices=["text", "raw"], default="text",
        help="text (default): the prompt and its continuation, with U+FFFD for bytes that are not "
        "UTF-8, and a final line break; raw: the bytes that the model writes, as they are, "
        "without the prompt",
    )  # fmt: skip
    showing.add_argument(
        "--show-router-decisions", action="store_true",
        help="put _ before each byte that the router sent through the latent blocks",
    )  # fmt: skip
    showing.add_argument(
        "--color", action="store_true",
        help="shade each character by its router weight (grey, and orange above 0.5, the highest "
        "of its bytes) and underline accepted drafts; off if standard output is no terminal, "
        "or NO_COLOR is set",
    )  # fmt: skip
    showing.add_argument(
        "--html", type=Path, metavar="FILE",
        help="also write a page with the same marks, and what is known of each byte",
    )  # fmt: skip
    showing.add_argument(
        "--stats", action="store_true", help="say at the end how fast it went, on standard error"
    )
    add_beam(running)
    running.set_defaults(function=command_run)

    measuring = commands.add_parser(
        "bench", help="measure how fast it is here", description=command_bench.__doc__
    )
    measuring.add_argument(
        "mode", choices=["train", "decode"], nargs="?", default="train",
        help="a step of training (default), or writing",
    )  # fmt: skip
    shape = measuring.add_mutually_exclusive_group()
    shape.add_argument("--preset", choices=PRESETS, default="xs", help="sizes of the model")
    shape.add_argument(
        "--model", type=Path, metavar="PATH", help="folder with the model.json to take instead"
    )
    add_sizes(measuring)
    measuring.add_argument(
        "--context-len", type=int, default=1024, metavar="N",
        help="bytes of a training window, or of the prompt (default: 1024)",
    )  # fmt: skip
    for field in dataclasses.fields(TrainSettings):
        if field.name in BENCH_SETTINGS:
            default = 1 if field.name == "batch_size" else field.default
            add_setting(measuring, field, default, "train: ")
    measuring.add_argument(
        "--devices", default="", metavar="N",
        help="train: share each batch among so many devices, or among these: CUDA:0,CUDA:1",
    )  # fmt: skip
    measuring.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="medians of so many (default: 5)"
    )
    measuring.add_argument("--json", action="store_true", help="print records, one JSON a line")
    add_beam(measuring)
    measuring.set_defaults(function=command_bench)
    return parser


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The flags of a model's sizes."""
    for field in dataclasses.fields(Config):
        default = PRESETS["xs"].get(field.name, field.default)
        text = f"{field.metadata['help']} (xs: {default})"
        choices = field.metadata["choices"]
        kind = {"choices": choices} if choices else {"metavar": "N"}
        parser.add_argument(flag(field.name), type=field.type, help=text, **kind)


def chosen_sizes(args: argparse.Namespace) -> dict[str, int | float | str]:
    """The sizes that were given as flags."""
    names = [field.name for field in dataclasses.fields(Config)]
    sizes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if sizes.get("router") in ("all", "none") and "latent_capacity_factor" in sizes:
        raise PicoError(
            f"--latent-capacity-factor means nothing with --router {sizes['router']}; leave it out"
        )
    return sizes


def add_beam(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--beam", type=int, metavar="N",
        help="let tinygrad search schedules for its kernels, N candidates at a time: slow once, "
        "then cached (default: no search)",
    )  # fmt: skip


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    for name, text in DATA_HELP.items():
        kind = number if name == "validation_size" else str
        parser.add_argument(
            flag("dataset_" + name), type=kind, metavar="X", help=text, default=argparse.SUPPRESS
        )


def named_data(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of DataSpec that were given as flags."""
    options = vars(args)
    return {name: options["dataset_" + name] for name in DATA_HELP if "dataset_" + name in options}


def add_checkpoint_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=int, default=-1, metavar="N",
        help="step of the checkpoint; negative counts from the newest, -1 (default)",
    )  # fmt: skip


def command_init(args: argparse.Namespace) -> int:
    """Describe a new model: writes PATH/model.json. Weights come into being with `train`."""
    config = Config.preset(args.preset, **chosen_sizes(args))
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
    named = named_data(args)
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
    stopping = StopSignals()
    with contextlib.ExitStack() as stack:
        tracked, ids = None, {}
        if tracker:
            name = f"{args.path.name}/{args.run}"
            stored = find_description(run_dir) if args.resume else None
            ids = (stored or {}).get("tracker") or {}
            known = ids.get(args.tracker)
            tracked = start_tracker(tracker, name, config.to_dict() | settings, known)
            stack.callback(tracked.finish)
            ids = {args.tracker: tracked.id}
        records = train(
            model, data, run_dir, devices=devices, resume=args.resume, force=args.force,
            base_weights=options.get("base_weights"), stop=stopping, progress=True, say=say,
            tracker=ids, **settings,
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


def start_tracker(
    tracker: ModuleType, name: str, settings: dict[str, Any], known: str | None
) -> Any:
    """A tracker's run: a new one, or that of the id `known`, which goes on."""
    resumed = {"id": known, "resume": "allow", "allow_val_change": True} if known else {}
    try:
        return tracker.init(project="pico_tg", name=name, config=settings, **resumed)
    except Exception as error:  # it has exceptions of its own: not logged in, no network
        raise PicoError(f"--tracker {tracker.__name__}: {error}") from error


def logged(records: Iterator[dict], tracked: Any) -> Iterator[dict]:
    """The records, each logged to a tracker's run on its way."""
    for record in records:
        tracked.log(record, step=record["step"])
        yield record


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


PASSAGE = 4000  # bytes of the page of eval


def command_eval(args: argparse.Namespace) -> int:
    """Measure the model PATH as trained in RUN on a split: bits per byte, heads, drafts, router."""
    load_config(args.path)
    run_dir = args.path / args.run
    checkpoint = find_checkpoint(run_dir, args.checkpoint)
    stored = find_description(run_dir)
    named = named_data(args)
    if args.dataset:
        spec = DataSpec(args.dataset, **named)
    elif named:
        raise PicoError("give the DATASET too, or leave its options out: the run's are known")
    elif stored:
        spec = stored_spec(stored, run_dir)
    else:
        raise PicoError(f"{run_dir} has no training.json that names its data; give a DATASET")
    context_len = args.context_len
    if context_len is None:
        settings = stored["settings"] if stored else {}
        context_len = settings.get("context_len", TrainSettings.context_len)
    options = {
        "split": args.split or "validation",
        "context_len": context_len,
        "stride": args.stride,
        "batch_size": args.batch_size,
        "max_bytes": args.max_bytes,
        "precision": args.precision,
    }
    check_options(**options)
    page = args.html
    if page:
        check_writable(page)
    if args.split is None and args.dataset and not has_validation(spec):
        known = stored["dataset"].get("dataset", "") if stored else ""
        if not known or os.path.realpath(known) != os.path.realpath(args.dataset):
            options["split"] = "all"
    data = load_whole(spec) if options["split"] == "all" else load_data(spec)
    model = load(args.path, args.run, args.checkpoint)
    say(describe_backend())
    measured = evaluate(model, data, passage=PASSAGE if page else 0, progress=True, **options)
    title = f"{args.path.name}, run {args.run}"
    facts = {"step": int(checkpoint.stem), "data": spec.dataset, "split": options["split"]}
    if page:
        shown = {
            "bits per byte": f"{measured.bits_per_byte:.3f}",
            "without latent blocks": f"{measured.bits_per_byte_without_latent:.3f}",
            "router rate": f"{measured.router_rate:.1%}",
        }
        with atomic_write(page) as file:
            text = html_page(b"", measured.passage, title, facts | shown, name="Passage")
            file.write(text.encode())
    if args.json:
        put(json.dumps(facts | measured.as_dict(), indent=2) + "\n")
    else:
        part = "all" if facts["split"] == "all" else f"{facts['split']} data"
        put(f"{title}, step {facts['step']}: {part} of {spec.dataset}\n\n")
        put(describe_evaluation(measured) + "\n")
    return 0


def command_info(args: argparse.Namespace) -> int:
    """Say what is known of the model PATH, and of its RUN: parameters, costs, checkpoints."""
    facts = describe(args.path, args.run)
    put((json.dumps(facts, indent=2) if args.json else describe_model(facts)) + "\n")
    return 0


def command_run(args: argparse.Namespace) -> int:
    """Write text with the model PATH as trained in RUN, as it is made."""
    raw = args.output == "raw"
    for option, reason in (
        (args.color, "--color, which adds escape sequences"),
        (args.show_router_decisions, "--show-router-decisions, which adds marks"),
        (args.num_samples > 1, "--num-samples, whose samples could not be told apart"),
    ):
        if raw and option:
            raise PicoError(f"--output raw cannot go with {reason}")
    prompt = read_prompt(args)
    page = args.html
    if page:
        check_writable(page)
    model = load(args.path, args.run, args.checkpoint)
    stats = Stats()
    records = generate(
        model,
        prompt,
        max_bytes=args.max_bytes,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        num_samples=args.num_samples,
        speculative=not args.no_speculative,
        ignore_end=args.ignore_end,
        raw_prompt=args.raw_prompt,
        latent=not args.disable_latent,
        stats=stats,
    )
    say(describe_backend())
    kept: list[GeneratedByte] = []
    complete = False
    if page:
        records = keep(records, kept)
    try:
        if raw:
            for record in records:
                put(bytes([record.byte]))
        else:
            show_samples(records, prompt, args)
        complete = True
    finally:  # also when interrupted, or when nobody reads on: what there is, if anything
        if page and (kept or complete):
            with atomic_write(page) as file:
                file.write(sample_page(prompt, kept, args).encode())
        if args.stats:
            say(describe_stats(stats))
    return 0


def read_prompt(args: argparse.Namespace) -> bytes:
    """The bytes to continue, from wherever the options say; no bytes for a new document."""
    try:
        if args.prompt_file:
            prompt, name, option = args.prompt_file.read_bytes(), args.prompt_file, "--prompt-file"
        elif args.prompt == "-":
            name, option = "standard input", "--prompt"
            prompt = sys.stdin.buffer.read() if sys.stdin else b""
        else:
            return os.fsencode(args.prompt)
    except OSError as error:
        raise PicoError(f"cannot read {args.prompt_file or name}: {error.strerror}") from error
    if not prompt:
        raise PicoError(f"{name} is empty; leave {option} out to start a new document")
    return prompt


def keep(records: Iterator[GeneratedByte], kept: list[GeneratedByte]) -> Iterator[GeneratedByte]:
    """The records, each added to `kept` on its way."""
    for record in records:
        kept.append(record)
        yield record


def show_samples(records: Iterator[GeneratedByte], prompt: bytes, args: argparse.Namespace) -> None:
    """Print the prompt and each sample after it, as they come."""
    terminal = sys.stdout.isatty()
    dumb = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    color = args.color and terminal and not dumb
    mark = "_" if args.show_router_decisions else ""
    text, begun = split_prompt(prompt)
    for number, sample in enumerate(split_samples(records, args.num_samples), 1):
        if args.num_samples > 1:
            put(f"--- sample {number} of {args.num_samples} ---\n")
        put(visible(text) if terminal else text)
        try:
            for piece in (colored_text if color else decode_text)(sample, mark, begun):
                put(visible(piece) if terminal and not color else piece)
        finally:  # an interrupt may have cut a piece in two
            put(f"{RESET if color else ''}\n")


def sample_page(prompt: bytes, kept: list[GeneratedByte], args: argparse.Namespace) -> str:
    """The page of --html, with the options that matter for the text."""
    facts = {"checkpoint": args.checkpoint} if args.checkpoint != -1 else {}
    facts["temperature"] = f"{args.temperature:g}"
    for name, default in (("top_k", 0), ("top_p", 1), ("min_p", 0), ("seed", None)):
        if getattr(args, name) != default:
            facts[name.replace("_", "-")] = getattr(args, name)
    if args.disable_latent:
        facts["latent blocks"] = "left out"
    samples = [list(sample) for sample in split_samples(kept, args.num_samples)]
    return html_page(prompt, samples, f"{args.path.name}, run {args.run}", facts)


def command_bench(args: argparse.Namespace) -> int:
    """Measure a step of training, or decoding, on this machine: a model of random weights.

    Times are medians. `needed` are the operations that the mathematics asks for, `done` those that
    the kernels do; `of gemm` compares what is needed, by time, with a plain matrix product here.
    """
    sizes, options = chosen_sizes(args), vars(args)
    if args.model:
        config = dataclasses.replace(load_config(args.model), **sizes)
    else:
        config = Config.preset(args.preset, **sizes)
    given = {name: options[name] for name in BENCH_SETTINGS if name in options}
    shown = {"repeats": args.repeats, "progress": True}
    if args.mode == "decode":
        for name in (*given, *(["devices"] if args.devices else [])):
            raise PicoError(f"bench decode has no use for {flag(name)}: it belongs to bench train")
        records = bench_decode(config, args.context_len, **shown)
    else:
        settings = TrainSettings(**{"context_len": args.context_len, "batch_size": 1} | given)
        devices = parse_devices(args.devices) if args.devices else ()
        records = bench_train(config, settings, devices, **shown)
    for record in records:
        print(json.dumps(record) if args.json else describe_measured(record), flush=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for an error, 130 when interrupted."""
    # a stream that was closed (`>&-`) is None; its descriptor must not go to another file
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    # bytes of a prompt or of a sample that are not UTF-8 must not stop the stream
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(arguments)
    function: Callable[[argparse.Namespace], int] = args.function
    try:
        as_usual()
        with kernel_search(getattr(args, "beam", None)):
            return function(args)
    except PicoError as error:
        message = " ".join(str(error).split())
        say(f"pico_tg: error: {message}")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read us has had enough
        drop_output()
        return 0
    except (OSError, MemoryError) as error:  # a name too long, say
        say(f"pico_tg: error: {' '.join(str(error).split()) or 'not enough memory'}")
        return 2
