"""The command line: reads the options, calls the library and prints. One function per command."""

import argparse
import codecs
import contextlib
import dataclasses
import errno
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tinygrad import Device

from ..backend.device import (
    check_backend,
    describe_backend,
    enable_compile_cache,
    parse_devices,
)
from ..checkpoint import list_checkpoints
from ..config import PURPOSES, Config, TrainSettings
from ..costs import check_memory
from ..data import (
    DataSpec,
    describe_data,
    has_validation,
    load_data,
    load_whole,
    stored_spec,
    trained_on,
)
from ..data.formats import odd
from ..decoder import Decoder
from ..evaluation import EvalSettings, evaluate
from ..files import PicoError, atomic_write, command, did_you_mean
from ..generation import LONG_PROMPT, GeneratedByte, SampleSettings, Stats, generate
from ..model import Pico
from ..progress import drop_output, say, visible
from ..runs import (
    SHIPPED,
    ancestry,
    best_validations,
    existing_run,
    find_checkpoint,
    find_description,
    load,
    load_config,
    model_folder,
    newest_run,
    read_description,
    read_metrics,
    run_folder,
    stored_settings,
)
from ..scoring import score
from ..training import train
from .bench import bench_decode, bench_train
from .html import html_page
from .info import describe
from .options import (
    BENCH_DEFAULTS,
    BENCH_TRAIN,
    PASSAGE,
    SAMPLE_BYTES,
    build_parser,
    given,
    mark_texts,
    option_of,
    with_options,
)
from .plot import training_chart
from .report import (
    conclusion,
    describe_evaluation,
    describe_measured,
    describe_model,
    describe_stats,
    printable,
)
from .router_report import passage, router_report
from .terminal import (
    TrainingDisplay,
    put,
    results,
    results_alone,
    show,
    show_samples,
    split_samples,
)
from .web import Server


def title_of(args: argparse.Namespace) -> str:
    """The model and its run, for a heading."""
    return f"{args.path.resolve().name}, run {args.run}"


def choose_run(args: argparse.Namespace) -> None:
    """Without a RUN, take the newest one, and say so."""
    if args.run is None:
        args.run = newest_run(args.path)
        say(f"{args.path}, run {args.run}")


def command_init(args: argparse.Namespace) -> int:
    """Describe a new model: write PATH/model.json. `train` makes the weights."""
    sizes, path = given_sizes(args), args.path
    config = Config.preset(args.preset, **sizes)
    if path == Path("stories"):
        raise PicoError("stories is the model that comes with pico_tg; choose another PATH")
    try:
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise PicoError(
                f"{path} exists and is not an empty folder; choose another PATH, or delete it"
            )
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PicoError(f"cannot create {path}: {error.strerror}") from error
    config.to_json(path / "model.json")
    changed = ", ".join(f"{name} {value}" for name, value in sizes.items())
    preset = f"{args.preset} ({PURPOSES[args.preset]})" + (f" with {changed}" if changed else "")
    show(f"{path / 'model.json'}: {config.parameters:,} parameters, preset {preset}")
    show(f"next: {command('train', path)} RUN DATASET")
    return 0


def given_sizes(args: argparse.Namespace) -> dict[str, int | float | str]:
    """The sizes of a model that the command line sets."""
    sizes = given(args, Config)
    if sizes.get("router") in ("all", "none") and "latent_capacity_factor" in sizes:
        raise PicoError(
            f"--latent-capacity-factor has no effect with --router {sizes['router']}; leave it out"
        )
    return sizes


def command_train(args: argparse.Namespace) -> int:
    """Train the model in PATH on DATASET; write weights and metrics to PATH/RUN."""
    run_dir, settings = run_folder(args.path, args.run), given(args, TrainSettings)
    spec = named_data(args)
    new = {"--base-weights": args.base_weights, "--from": args.source, "--settings": args.settings}
    for option, value in new.items():
        if args.resume and value:
            raise PicoError(f"{option} is for a new run; leave it out with --resume")
    if args.source and args.base_weights:
        raise PicoError("--from and --base-weights both name the weights to start from; give one")
    if args.force and not args.resume:
        raise PicoError("--force requires --resume")
    if args.source:
        config = load_config(args.source[0], "--from takes PATH and RUN of a trained model")
        args.base_weights = find_checkpoint(existing_run(*args.source))
    else:
        config = load_config(args.path)
    devices = () if args.devices is None else parse_devices(args.devices)
    if args.sample_prompt and len(devices) > 1:
        raise PicoError("--sample-prompt needs one device: several devices print no samples")
    stored = TrainSettings()
    if args.resume:
        stored = stored_settings(read_description(existing_run(args.path, args.run)), run_dir)
    elif args.dataset is None and Path(args.run).is_file():
        raise PicoError(f"{args.run} is a file; a name for the run comes before it")
    elif len(Path(args.run).parts) > 1:
        raise PicoError(f"a new RUN is a name without a folder, not {args.run!r}")
    elif args.dataset is None:
        say("no DATASET given: taking python-docs, the topics of Python's built-in help")
    seed = dataclasses.replace(stored, **settings).seed
    # before the model takes memory; `train` knows the batch
    check_memory(config, TrainSettings(context_len=1, batch_size=1), Device.DEFAULT)
    model, display = Pico(config, seed), TrainingDisplay()
    if args.sample_prompt != "" and len(devices) < 2:
        prompt = os.fsencode(args.sample_prompt or "")
        display.sample = sample_writer(model, prompt, display.stop)
    records = train(
        model, spec, run_dir, devices=devices, resume=args.resume, force=args.force,
        base_weights=args.base_weights, events=display, settings=args.settings, **settings,
    )  # fmt: skip
    say(f"{describe_backend()}; {config.parameters:,} parameters")
    # catch signals only from here on: before the first step, Ctrl-C exits immediately
    with display, contextlib.closing(records):  # an error saves the last step
        checkpoint = display.show(records)
    if display.stop():
        _, saved = list_checkpoints(run_dir)[-1]  # `display` stops after a step, never before one
        say(f"wrote {saved}; continue with: {command('train', args.path, args.run, '--resume')}")
        return 130
    if not checkpoint:  # `train` has said that nothing is left
        return 0
    write = command("run", args.path, args.run, "--prompt", args.sample_prompt or "The")
    say(f"wrote {checkpoint}; write text with: {write}")
    steps = [step for step, _ in list_checkpoints(run_dir)]
    best = next(iter(best_validations(run_dir)), None) if steps else None
    if best in steps[:-1]:
        say(f"step {best} predicted the held-out text better; --checkpoint best takes its weights")
    return 0


def sample_writer(model: Pico, prompt: bytes, stop: Callable[[], bool]) -> Callable[[], str]:
    """A function: the SAMPLE_BYTES that the model now writes after the prompt, in one line.

    `stop` is asked after each byte. The function keeps its decoder, since making one takes seconds.
    """
    decoder: Decoder | None = None

    def one_line(text: bytes) -> str:
        return visible(text.decode(errors="replace")).replace("\n", "\\n")

    def write() -> str:
        nonlocal decoder
        decoder = decoder or Decoder(model)
        # without drafts fewer graphs are compiled
        options = {"max_bytes": SAMPLE_BYTES, "seed": 0, "speculative": False}
        try:
            written = generate(model, prompt, decoder=decoder, **options)
            written = itertools.takewhile(lambda _: not stop(), written)
            text = one_line(bytes(record.byte for record in written))
        except PicoError as error:  # logits that overflow need not end training
            text = str(error)
        return f'sample after "{one_line(prompt)}": {text}' if prompt else f"sample: {text}"

    return write


def named_data(args: argparse.Namespace) -> DataSpec | None:
    """The data that the command line names, or None."""
    options = given(args, DataSpec, "dataset_")
    if args.dataset is None and options:
        raise PicoError(
            "give the DATASET too, or leave out what goes with it: --valid, --dataset-…"
        )
    return None if args.dataset is None else DataSpec(args.dataset, **options)


def command_eval(args: argparse.Namespace) -> int:
    """Measure the model PATH as trained in RUN on a split: bits per byte, and what is routed."""
    load_config(args.path)
    choose_run(args)
    run_dir = existing_run(args.path, args.run)
    checkpoint = find_checkpoint(run_dir, args.checkpoint)
    if args.text is not None:
        return score_text(args, int(checkpoint.stem))
    stored = find_description(run_dir)
    spec = data_to_measure(args, stored)
    trained = stored["settings"] if stored else {}
    chosen = {"context_len": trained.get("context_len", TrainSettings.context_len)}
    chosen |= given(args, EvalSettings)
    if "split" not in chosen:
        spec, chosen["split"] = default_split(args, spec, stored)
    settings = EvalSettings(**chosen)
    if args.html:
        check_writable(args.html)
    data = load_whole(spec) if settings.split == "all" else load_data(spec)
    model = load(args.path, args.run, args.checkpoint)
    say_which_is_best(args)
    for line in (*data.remarks, describe_backend()):
        say(line)
    corpus = data if settings.split == "all" else getattr(data, settings.split)
    for run, known in ancestry(run_dir):
        if line := trained_on(corpus.bytes[: settings.max_bytes], data, known, run):
            say(f"warning: {line}")
    measured = evaluate(model, data, progress=True, **chosen)
    report = router_report(measured)
    facts = {"step": int(checkpoint.stem), "data": spec.dataset, "split": settings.split}
    told = conclusion(measured, report)
    if args.html:  # first: standard output may fail
        shown = passage(measured, PASSAGE)
        write_page(args.html, html_page(b"", shown, title_of(args), facts, "Passage", told))
        say(f"wrote {args.html}")
    if args.json:
        show(json.dumps(facts | measured.as_dict() | report.as_dict(), indent=2))
        return 0
    part = "all" if settings.split == "all" else f"{settings.split} data"
    show(f"{args.path}, run {args.run}, step {facts['step']}: {part} of {spec.dataset}\n\n{told}")
    if args.full:
        show(f"\n{describe_evaluation(measured, report)}")
    return 0


def score_text(args: argparse.Namespace, step: int) -> int:
    """eval --text: the text with marks before routed bytes, and its bits."""
    named = [option_of("dataset_" + name) for name in given(args, DataSpec, "dataset_")]
    named += map(option_of, given(args, EvalSettings))
    named += ["--full"] if args.full else []
    if args.dataset is not None:
        named.insert(0, "DATASET")
    if named:
        raise PicoError(f"--text measures that text alone; leave {' and '.join(named)} out")
    if args.html:
        check_writable(args.html)
    text = os.fsencode(args.text)
    scored = score(load(args.path, args.run, args.checkpoint), text)
    say(describe_backend())
    bits, mean = f"{scored.bits:.2f}", f"{scored.bits_per_byte:.3f}"
    if args.html:  # first: standard output may fail
        facts = {"step": step, "bits": bits, "bits per byte": mean}
        write_page(args.html, html_page(b"", [scored], title_of(args), facts, "Text"))
        say(f"wrote {args.html}")
    if args.json:
        figures = {"step": step, "bits": scored.bits, "bits_per_byte": scored.bits_per_byte}
        show(json.dumps(figures | {"bytes": [*map(dataclasses.asdict, scored)]}, indent=2))
        return 0
    show_samples(scored, b"", marks=True)
    routed = sum(record.router_decision for record in scored)
    show(f"{bits} bits, {mean} bits per byte; {routed} of {len(scored)} bytes routed")
    return 0


def say_which_is_best(args: argparse.Namespace) -> None:
    """Say so if the checkpoint `best` is not that of the best validation."""
    if args.checkpoint != "best":
        return
    run_dir = run_folder(args.path, args.run)
    taken, best = int(find_checkpoint(run_dir, "best").stem), best_validations(run_dir)[0]
    if best != taken:
        say(
            f"the best validation was at step {best}, which has no checkpoint (train --keep-best "
            f"keeps it); taking step {taken}, the best that has one"
        )


def data_to_measure(args: argparse.Namespace, stored: dict[str, Any] | None) -> DataSpec:
    """The data that the options name, or those of the run, from its training.json."""
    if args.split == "all":
        named = given(args, DataSpec, "dataset_").keys()
        if unused := named & {"validation_size", "validation_split"}:
            options = " and ".join(option_of("dataset_" + name) for name in sorted(unused))
            raise PicoError(f"--split all holds nothing out: leave {options} out")
    spec, run_dir = named_data(args), run_folder(args.path, args.run)
    if spec is None and stored is None:
        raise PicoError("give a DATASET or --text: the run does not say what it was trained on")
    return spec or stored_spec(stored, run_dir)


def default_split(
    args: argparse.Namespace, spec: DataSpec, stored: dict[str, Any] | None
) -> tuple[DataSpec, str]:
    """The data and the split to measure where --split is left out.

    The split is `all` for a DATASET without validation data. If DATASET is the data of the run,
    under the same path or another one, the split is the part that the run held out.
    """
    if args.dataset is None or has_validation(spec):
        return spec, "validation"
    if stored:
        size = stored["dataset"].get("validation_size")
        cut = dataclasses.replace(spec, validation_size=size)
        with contextlib.suppress(PicoError):  # too small to hold any of it out
            if describe_data(load_data(cut))["fingerprints"] == stored["fingerprints"]:
                return cut, "validation"
    return spec, "all"


def command_run(args: argparse.Namespace) -> int:
    """Write text with the model PATH as trained in RUN, and print each byte immediately."""
    raw, settings = args.output == "raw", SampleSettings(**given(args, SampleSettings))
    for wrong, reason in (
        (args.show_router_decisions, "go with --show-router-decisions, which adds marks"),
        (settings.num_samples > 1, "go with --num-samples: nothing would separate the samples"),
        (not hasattr(results(), "buffer"), "write to this standard output, which takes text only"),
    ):
        if raw and wrong:
            raise PicoError(f"--output raw cannot {reason}")
    prompt = read_prompt(args)
    if args.html:
        check_writable(args.html)
    if " " in str(args.path):
        load_config(args.path, "a text to continue comes after --prompt")
    choose_run(args)
    model = load(args.path, args.run, args.checkpoint)
    say_which_is_best(args)
    stop = [os.fsencode(text) for text in args.stop or ()]
    stats, chosen = Stats(), dataclasses.asdict(settings)
    records = generate(model, prompt, stop=stop, stats=stats, progress=True, **chosen)
    say(describe_backend())
    kept: list[GeneratedByte] = []
    complete = False
    if args.html:
        records = keep(records, kept)
    try:
        if len(prompt) >= LONG_PROMPT:  # read it before it is printed: its bar would be in the text
            records = itertools.chain([*itertools.islice(records, 1)], records)
        if raw:
            for record in records:
                put(bytes([record.byte]))
        else:
            show_samples(records, prompt, settings.num_samples, args.show_router_decisions)
        complete = True
    finally:  # also after an interrupt or a closed pipe: write the page of the bytes so far
        if args.html and (kept or complete):
            write_page(args.html, sample_page(prompt, kept, args, settings))
            say(f"wrote {args.html}")
        if args.stats:
            say(describe_stats(stats))
    return 0


def read_prompt(args: argparse.Namespace) -> bytes:
    """The bytes to continue; none for a new document."""
    name, option = args.prompt_file, "--prompt-file"
    try:
        if args.prompt_file is not None:
            prompt = args.prompt_file.read_bytes()
        elif args.prompt == "-":
            name, option = "standard input", "--prompt"
            stream = getattr(sys.stdin, "buffer", sys.stdin)  # a notebook's stdin is text only
            prompt = stream.read() if stream else b""
        else:
            prompt, option = args.prompt, None
    except OSError as error:
        raise PicoError(f"cannot read {name}: {error.strerror}") from error
    if not prompt and option:
        raise PicoError(f"{name} is empty; leave {option} out to start a new document")
    given = os.fsencode(prompt)
    if option and (why := odd(codecs.getincrementaldecoder("utf-8")(), given)):
        say(f"{name} is read byte by byte: {why}")
    return given


def keep(records: Iterator[GeneratedByte], kept: list[GeneratedByte]) -> Iterator[GeneratedByte]:
    """Yield the records and append each one to `kept` before."""
    for record in records:
        kept.append(record)
        yield record


def sample_page(
    prompt: bytes, kept: list[GeneratedByte], args: argparse.Namespace, settings: SampleSettings
) -> str:
    """The page of run --html, with the settings that shaped the text."""
    facts = {"checkpoint": args.checkpoint} if args.checkpoint != -1 else {}
    facts["temperature"] = f"{settings.temperature:g}"
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != field.default and ("filter" in field.metadata or field.name == "seed"):
            facts[field.name.replace("_", "-")] = value
    if not settings.latent:
        facts["deep blocks"] = "left out"
    samples = [list(sample) for sample in split_samples(kept, settings.num_samples)]
    return html_page(prompt, samples, title_of(args), facts)


def check_writable(path: Path) -> None:
    """Raise PicoError unless `write_page` could write `path` now; called before long work."""
    with contextlib.suppress(EOFError), atomic_write(path):
        raise EOFError  # an exception leaves `path` as it is


def write_page(path: Path, page: str) -> None:
    """Write an HTML or SVG page."""
    with atomic_write(path) as file:
        file.write(printable(page).encode())


def command_web(args: argparse.Namespace) -> int:
    """Serve a page that shows text as the model writes it. Only this machine can open the page."""
    args.run = args.run or newest_run(args.path)
    existing_run(args.path, args.run)
    say(f"loading {title_of(args)}; {describe_backend()}")
    with Server(load(args.path, args.run), title_of(args), args.port) as server:
        show(f"{server.url}  (Ctrl-C ends)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def command_info(args: argparse.Namespace) -> int:
    """Print the parameters and costs of the model PATH, and the checkpoints of its RUN."""
    facts = describe(args.path, args.run)
    show(json.dumps(facts, indent=2) if args.json else describe_model(facts))
    return 0


def command_plot(args: argparse.Namespace) -> int:
    """Draw the curves of training runs: bits per byte, share of bytes routed, learning rate."""
    pairs = runs_to_plot(args.path, args.runs)
    runs, data, texts = {}, set(), {}  # texts: the first run that was validated on each
    for name, (model, run) in pairs.items():
        folder, shown = existing_run(model, run), {"bytes", "bits_per_byte", "router_rate", "lr"}
        runs[name] = [r for r in read_metrics(folder) if r.keys() >= shown]
        if not runs[name]:
            raise PicoError(f"{folder}/metrics.jsonl holds no step yet")
        if stored := find_description(folder):
            data.add(Path(str(stored["dataset"].get("dataset", ""))).name)
            told = [stored["fingerprints"][1:], stored["settings"].get("validation_bytes")]
            texts.setdefault(json.dumps(told), name)
    notes = []
    if len(texts) > 1:
        notes = [
            f"Not to be compared, since validated on different texts: {', '.join(texts.values())}"
        ]
        say(*notes)
    # a run's name may contain a folder: sub/a
    names = [re.sub(r"[/\\]+", "-", name).strip("-.") for name in pairs]
    folder = next(iter(pairs.values()))[0]
    output = args.output or (Path() if folder == SHIPPED else folder) / f"{'-'.join(names)}.svg"
    write_page(output, training_chart(runs, ", ".join(sorted(filter(None, data))), notes))
    show(str(output))
    return 0


def runs_to_plot(path: Path, names: list[str]) -> dict[str, tuple[Path, Path]]:
    """(model, run) of each run that `plot` names, by its name in the picture.

    Each of path and names is a model, a run of the model before it, or PATH/RUN. A model without a
    run stands for its newest one. A name in the picture is the path from the folder that all models
    share. Raises PicoError on other names.
    """
    chosen: dict[Path, list[Path]] = {}
    model = None
    for name in (model_folder(path), *map(Path, names)):
        above = [folder for folder in (name, *name.parents) if (folder / "model.json").is_file()]
        own = model and not name.is_absolute() and (model / name / "metrics.jsonl").is_file()
        if own or not above:
            load_config(model or name)  # says so if there is no model
            chosen[model].append(name)
        elif above[0] == name:
            model = name
            chosen.setdefault(model, [])
        else:
            chosen.setdefault(above[0], []).append(name.relative_to(above[0]))
    pairs = [(model, run) for model in chosen for run in chosen[model] or [newest_run(model)]]
    common = os.path.commonpath([model.absolute() for model in chosen])
    return {os.path.relpath(run_folder(*pair), common): pair for pair in pairs}


def command_bench(args: argparse.Namespace) -> int:
    """Measure a step of training, or decoding, on this machine: a model of random weights.

    Times are medians. `model` are the GFLOPs that the mathematics requires, `executed` those that
    the kernels execute. MFU and HFU divide the rates of these two by the rate that the line
    above the table names; above 100 %, other processes slowed that measurement down.
    """
    if args.repeats < 1:
        raise PicoError(f"repeats must be at least 1, not {args.repeats}")
    sizes = load_config(args.model) if args.model else Config()
    config = dataclasses.replace(sizes, **given_sizes(args))
    settings = TrainSettings(**BENCH_DEFAULTS | given(args, TrainSettings))
    if args.mode == "decode":
        for name in (*BENCH_TRAIN, "devices"):
            if getattr(args, name) is not None:
                raise PicoError(f"{option_of(name)} belongs to bench train, not to bench decode")
        records = bench_decode(config, settings.context_len, args.repeats)
    else:
        devices = () if args.devices is None else parse_devices(args.devices)
        records = bench_train(config, settings, devices, args.repeats)
    for record in records:
        show(json.dumps(record) if args.json else describe_measured(record))
    return 0


COMMANDS = {
    "init": command_init,
    "train": command_train,
    "eval": command_eval,
    "run": command_run,
    "web": command_web,
    "info": command_info,
    "plot": command_plot,
    "bench": command_bench,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for an error, 130 when interrupted."""
    # a stream that was closed (`>&-`) is None; its descriptor must not go to another file
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # escape characters that the encoding lacks; a notebook's stream accepts all characters
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    parser = build_parser(COMMANDS)
    marked = mark_texts(sys.argv[1:] if arguments is None else arguments, parser)
    args, unknown = parser.parse_known_args(marked)
    if unknown:  # reported by the command's parser, whose help lists the command's options
        options = [name for action in args.parser._actions for name in action.option_strings]
        name = unknown[0].partition("=")[0]
        longer = [option for option in options if name.lstrip("-") in option]
        meant = did_you_mean(name, longer or options)
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
    try:
        with results_alone():
            # a script that calls this function may have replaced others
            enable_compile_cache(training_graphs=arguments is None)
            check_backend()
            return COMMANDS[args.command](args)
    except BrokenPipeError:  # the reader of the output closed it
        drop_output()
        return 0
    except KeyboardInterrupt:
        return 130
    except (PicoError, OSError, MemoryError) as error:  # OSError: a name too long, for example
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            error = "not enough memory; a smaller --batch-size or --context-len needs less"
        say(f"pico_tg: error: {with_options(' '.join(str(error).split()), args.parser)}")
        return 2
