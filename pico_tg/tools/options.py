"""The options of the command line.

An option of the model, of training, evaluation or generation is the field of a dataclass, which
holds its help, limits and default: `add_fields` makes the options, `given` reads them back. Only
options without such a field are written here.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import costs
from ..config import PRESETS, PURPOSES, Config, TrainSettings, field_help, types_of
from ..data import DataSpec
from ..evaluation import EvalSettings
from ..files import did_you_mean
from ..generation import SampleSettings
from ..progress import visible

SAMPLE_BYTES = 200  # of a sample at each validation
PASSAGE = 4000  # bytes of text on the page of eval --html
BENCH_TRAIN = (
    "batch_size", "grad_accumulation_steps", "optimizer", "precision", "checkpoint_activations",
)  # fmt: skip
TEXTS = ("--prompt", "--sample-prompt", "--text", "--stop")  # may begin with a dash
TEXT = "\0"  # before such a text: no argument of a process holds it
TRAIN_GROUPS = {  # of `train --help`; the group "advanced" has all other settings
    "length": ("max_minutes", "max_steps", "epochs"),
    "batch and rate": ("context_len", "batch_size", "learning_rate", "warmup_steps"),
    "validations and checkpoints": (
        "validation_interval", "validation_bytes", "checkpoint_interval", "keep_checkpoints",
        "keep_best",
    ),
}  # fmt: skip
BENCH_DEFAULTS = {"batch_size": 1, "context_len": 1024}


class Parser(argparse.ArgumentParser):
    """Prints an error as one line, without the usage before it."""

    def error(self, message: str) -> None:
        wrong, _, known = message.partition("invalid choice: ")[2].partition(" (choose from ")
        message += did_you_mean(wrong.strip("'"), re.findall(r"[\w-]+", known))
        message = message.replace("--from: expected 2 arguments", "--from: PATH and RUN of a model")
        self.exit(2, visible(f"{self.prog}: error: {message} (see {self.prog} --help)\n"))


class Formatter(argparse.HelpFormatter):
    """Keeps the line breaks of a help text; the usage leaves out the options listed below it."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, [a for a in actions if not a.option_strings], [], prefix)

    def _split_lines(self, text: str, width: int) -> list[str]:
        split = super()._split_lines
        return [part for line in text.split("\n") for part in split(line, width)]


def build_parser(functions: dict[str, Callable]) -> Parser:
    """The parser of all commands; the docstring of a command's function is its description."""
    parser = Parser(
        prog="pico_tg",
        description="Pico: a byte-level language model without a tokenizer, on tinygrad.",
        epilog="Start with: init models/small, then train models/small first, "
        "then run models/small first.",
    )
    parser.add_argument("--version", action="version", version=f"pico_tg {version('pico_tg')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, *parents: Parser) -> Parser:
        text = {"help": help, "description": functions[name].__doc__}
        command = commands.add_parser(name, parents=parents, formatter_class=Formatter, **text)
        command.set_defaults(parser=command)
        return command

    path = shared("path", metavar="PATH", type=path_name, help="folder of the model")
    either = shared(
        "path", metavar="PATH", type=path_name, nargs="?", default=Path("stories"),
        help="folder of the model (default: stories, which comes with pico_tg)",
    )  # fmt: skip
    run = shared("run", metavar="RUN", help="name of the training run")
    newest = shared(
        "run", metavar="RUN", nargs="?",
        help="name of the training run (default: the one with the newest checkpoint)",
    )  # fmt: skip
    as_json = shared("--json", action="store_true", help="print JSON instead of text")
    checkpoint = shared(
        "--checkpoint", type=checkpoint_name, default=-1, metavar="N",
        help="step of the checkpoint; or best, the one with the best validation; or a negative "
        "number: -1 the newest, -2 the one before (default: -1)",
    )  # fmt: skip

    init = add("init", "describe a new model in PATH/model.json", path)
    init.add_argument(
        "--preset", choices=PRESETS, default="minutes",
        help="start from these sizes (default: minutes); the other flags change single sizes\n"
        + "\n".join(map(describe_preset, PRESETS)),
    )  # fmt: skip
    add_fields(init, Config, defaults=PRESETS["minutes"])

    training = add("train", "train a model on text", path, run)
    add_train_options(training)

    evaluating = add("eval", "measure a trained model on text", path, newest, checkpoint, as_json)
    add_eval_options(evaluating)

    running = add("run", "write text with a trained model", either, newest, checkpoint)
    add_run_options(running)

    serving = add("web", "serve a page that shows text as the model writes it", either, newest)
    serving.add_argument(
        "--port", type=int, default=8000, metavar="N",
        help="port of this machine; 0: any free one (default: 8000)",
    )  # fmt: skip

    informing = add("info", "sizes and costs of a model, checkpoints of a run", path, as_json)
    informing.add_argument("run", metavar="RUN", nargs="?", help="name of a training run")

    plotting = add("plot", "draw the curves of training runs", path)
    plotting.add_argument(
        "runs", metavar="RUN", nargs="*",
        help="names of training runs (default: the one with the newest checkpoint); to compare "
        "models, give PATH/RUN PATH/RUN",
    )  # fmt: skip
    plotting.add_argument(
        "--output", type=page_name(".svg"), metavar="FILE",
        help="SVG to write (default: PATH/RUN-RUN.svg)",
    )  # fmt: skip

    measuring = add("bench", "measure the speed of this machine", as_json)
    add_bench_options(measuring)
    return parser


def describe_preset(name: str) -> str:
    config, length = Config.preset(name), costs.CPU.context_len
    flops = costs.training_flops(config, length) / length
    parts = f"{config.parameters:,} parameters, {flops / 1e6:.1f} MFLOPs a byte in training"
    return f"{name}: {parts}, {PURPOSES[name]}"


def shared(*names: str, **options: Any) -> Parser:
    """A parser of one argument, as a parent of the commands that take it."""
    parser = Parser(add_help=False)
    parser.add_argument(*names, **options)
    return parser


def add_train_options(parser: Parser) -> None:
    parser.add_argument(
        "dataset", metavar="DATASET", nargs="?",
        help=f"{field_help(DataSpec)['dataset']} (default: python-docs)",
    )  # fmt: skip
    data = parser.add_argument_group("data")
    add_fields(data, DataSpec, without=("dataset",), prefix="dataset_")
    start = parser.add_argument_group("start")
    start.add_argument(
        "--resume", action="store_true",
        help="continue RUN from its newest valid checkpoint, with its settings",
    )  # fmt: skip
    start.add_argument("--force", action="store_true", help="resume with another --batch-size")
    start.add_argument(
        "--base-weights", type=path_name, metavar="FILE",
        help="start from these weights (.safetensors) instead of fresh ones. Defaults then change: "
        "--router-warmup-steps is 0, --learning-rate a quarter of that for fresh weights, and a "
        "short text is read half as often",
    )  # fmt: skip
    start.add_argument(
        "--from", dest="source", nargs=2, metavar=("PATH", "RUN"),
        help="fine-tune: start from the newest checkpoint of another model's RUN; this model's "
        "folder, if new, takes over the sizes; defaults change as for --base-weights",
    )  # fmt: skip
    start.add_argument(
        "--settings", choices=["chosen", "published"],
        help="source of the settings that the command line leaves out: chosen for the device, the "
        "model and the data, or published, for a GPU and hundreds of megabytes (default: chosen)",
    )  # fmt: skip
    defaults = dict.fromkeys(costs.CHOSEN, "see --settings")
    groups = {title: parser.add_argument_group(title) for title in TRAIN_GROUPS}
    for title, names in TRAIN_GROUPS.items():
        add_fields(groups[title], TrainSettings, names, defaults=defaults)
    groups["validations and checkpoints"].add_argument(
        "--sample-prompt", metavar="TEXT", type=plain_text,
        help=f"at each validation, print {SAMPLE_BYTES} bytes that continue TEXT (default: the "
        "start of a document); '' turns this off; not available with several devices",
    )  # fmt: skip
    advanced = parser.add_argument_group("advanced")
    grouped = sum(TRAIN_GROUPS.values(), ())
    add_fields(advanced, TrainSettings, without=grouped, defaults=defaults)
    advanced.add_argument(
        "--devices", metavar="N",
        help="share each batch among N devices, or among named ones: CUDA:0,CUDA:1",
    )  # fmt: skip


def add_eval_options(parser: Parser) -> None:
    parser.add_argument(
        "dataset", metavar="DATASET", nargs="?",
        help="as for train (default: the data that the run was trained on)",
    )  # fmt: skip
    add_fields(parser, DataSpec, without=("dataset",), prefix="dataset_")
    defaults = {
        "split": "validation; all if DATASET is not the run's and has no validation data",
        "context_len": "as in training",
    }
    add_fields(parser, EvalSettings, defaults=defaults)
    parser.add_argument(
        "--text", metavar="TEXT", type=plain_text,
        help="in place of a DATASET: print TEXT with _ before each byte that the router sends "
        "through the deep blocks, and how many bits the model needs for it",
    )  # fmt: skip
    parser.add_argument(
        "--full", action="store_true",
        help="also print tables: heads, what the router selects, word boundaries that it finds",
    )  # fmt: skip
    parser.add_argument(
        "--html", type=page_name(".html", ".htm"), metavar="FILE",
        help=f"also write a page with router weights and surprisal: of TEXT, or of the first "
        f"{PASSAGE:,} bytes of the data",
    )  # fmt: skip


def add_run_options(parser: Parser) -> None:
    prompting = parser.add_argument_group("prompt (default: the beginning of a new document)")
    source = prompting.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", default="", metavar="TEXT", type=plain_text,
        help="text to continue; - reads standard input. The tags <pico:seq> and </pico:seq> in it "
        "begin and end a document",
    )  # fmt: skip
    source.add_argument(
        "--prompt-file", type=path_name, metavar="FILE", help="file with the bytes to continue"
    )
    add_fields(prompting, SampleSettings, ("raw_prompt",))
    sampling = parser.add_argument_group("sampling")
    add_fields(sampling, SampleSettings, without=("raw_prompt",))
    sampling.add_argument(
        "--stop", action="append", metavar="TEXT", type=plain_text,
        help="end the text before TEXT, once the model writes it; give --stop again for another",
    )  # fmt: skip

    showing = parser.add_argument_group("output")
    showing.add_argument(
        "--output", choices=["text", "raw"], default="text",
        help="text: the prompt and its continuation, with U+FFFD for bytes that are not UTF-8, "
        "and a final line break; raw: the generated bytes, unchanged, without the prompt (default: "
        "text)",
    )  # fmt: skip
    showing.add_argument(
        "--show-router-decisions", action="store_true",
        help="put _ before each byte that the router sent through the deep blocks",
    )  # fmt: skip
    showing.add_argument(
        "--html", type=page_name(".html", ".htm"), metavar="FILE",
        help="also write a page: the text, shaded by router weight or surprisal",
    )  # fmt: skip
    showing.add_argument(
        "--stats", action="store_true", help="print the speed on standard error at the end"
    )


def add_bench_options(parser: Parser) -> None:
    parser.add_argument(
        "mode", choices=["train", "decode"], nargs="?", default="train",
        help="a training step, or decoding (default: train)",
    )  # fmt: skip
    parser.add_argument(
        "--model", type=path_name, metavar="PATH", help="folder of a model to take the sizes from"
    )
    add_fields(parser, Config)
    parser.add_argument(
        "--context-len", type=int, metavar="N",
        help="bytes of a training window, or of the prompt (default: 1024)",
    )  # fmt: skip
    training = parser.add_argument_group("only of bench train")
    add_fields(training, TrainSettings, BENCH_TRAIN, defaults=BENCH_DEFAULTS)
    training.add_argument(
        "--devices", metavar="N",
        help="share each batch among N devices, or among named ones: CUDA:0,CUDA:1",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N",
        help="repetitions; prints their median (default: 5)",
    )  # fmt: skip


def add_fields(
    parser: Any,
    cls: type,
    names: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    prefix: str = "",
    defaults: dict[str, Any] | None = None,
) -> None:
    """Options for the fields of a dataclass; `given` reads them.

    - parser: a Parser or a group of one
    - names: the fields (default: all of them); without: fields to leave out
    - prefix: precedes the name of each field
    - defaults: shown in place of the fields' own
    """
    for field in dataclasses.fields(cls):
        if field.name in without or (names and field.name not in names):
            continue
        told = field.metadata  # `off` is the help of a flag that switches the field off
        text, choices = told.get("off", told["help"]), told["choices"]
        default = (defaults or {}).get(field.name, field.default)
        kinds = {*types_of(field)} - {type(None)}
        negated = "no_" if default is True else ""
        options = told.get("flag", option_of(prefix + negated + field.name)).split()
        if bool in kinds:
            kind = {"action": "store_false" if negated else "store_true"}
        else:
            metavar = told.get("metavar", "X" if str in kinds else "N")
            kind = {"choices": choices} if choices else {"metavar": metavar}
            kind["type"] = number if len(kinds) > 1 else kinds.pop()
            text += "" if default is None else f" (default: {default})"
        parser.add_argument(*options, dest=prefix + field.name, default=None, help=text, **kind)


def option_of(field: str) -> str:
    return "--" + field.replace("_", "-")


def given(args: argparse.Namespace, cls: type, prefix: str = "") -> dict[str, Any]:
    """The fields of a dataclass that the command line sets, by name."""
    values = {name: getattr(args, prefix + name, None) for name in field_help(cls)}
    return {name: value for name, value in values.items() if value is not None}


def with_options(error: str, parser: Parser) -> str:
    """An error's text in which the options of a command replace the names of settings.

    A name that is an ordinary word (dim, stop) is replaced only where the text begins with it. The
    keys of model.json and training.json keep their names.
    """
    if re.search(r"\b(model|training)\.json", error):
        return error
    error, *lists = re.split(r"(are: |python -m )", error, maxsplit=1)  # of names, or a command
    for action in parser._actions:
        name = action.dest.removeprefix("dataset_")
        anywhere, first = rf"(?<![\w/.'-]){name}(?![\w/.'-])", rf"^{name}(?= must| is empty| \()"
        if action.option_strings:
            error = re.sub(anywhere if "_" in name else first, action.option_strings[0], error)
    return error + "".join(lists)


def checkpoint_name(text: str) -> int | str:
    if text != "best" and not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor best")
    return text if text == "best" else int(text)


def mark_texts(arguments: list[str], parser: Parser) -> list[str]:
    """The arguments, each text of TEXTS joined to its option: argparse takes -Hello for an option.

    TEXT precedes it, since argparse of Python 3.11 loses the text `--` also when it is joined. The
    text of an option that the command does not have is dropped: argparse would take it for a RUN.
    """
    commands = parser._subparsers._group_actions[0].choices
    known = next((commands[a]._option_string_actions for a in arguments if a in commands), {})
    marked, rest = [], iter(arguments)
    for argument in rest:
        option, joined, text = argument.partition("=")
        if option in TEXTS and (joined or (text := next(rest, None)) is not None):
            argument = f"{option}={TEXT}{text}" if option in known else option
        marked.append(argument)
    return marked


def plain_text(text: str) -> str:
    return text.removeprefix(TEXT)


def path_name(text: str) -> Path:
    if not text:  # an unset variable of the shell is not the current folder
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def page_name(*endings: str) -> Callable[[str], Path]:
    """The type of a path to write to: it ends in one of `endings`, or has no ending."""

    def page_path(text: str) -> Path:
        path = path_name(text)
        if text == "-":
            raise argparse.ArgumentTypeError(f"name a file that ends in {endings[0]}, not -")
        if path.suffix and path.suffix.lower() not in endings:
            kind = endings[0][1:].upper()
            raise argparse.ArgumentTypeError(f"{text!r} would hold {kind}; end it in {endings[0]}")
        return path

    return page_path


def number(text: str) -> int | float:
    return float(text) if "." in text or "e" in text.lower() else int(text)
