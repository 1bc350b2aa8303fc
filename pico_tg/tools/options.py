"""The options of the command line."""

import argparse
import dataclasses
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import costs
from ..config import PRECISIONS, PRESETS, Config, TrainSettings, field_help
from ..data import DataSpec
from ..evaluation import SPLITS

SAMPLE_BYTES = 80  # of a sample at each validation
PASSAGE = 4000  # bytes of text on the page of eval --html
BENCH_SETTINGS = (
    "batch_size", "grad_accumulation_steps", "optimizer", "precision", "checkpoint_activations",
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Prints an error as one line, without the usage before it."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == "":
            return action.help
        return super()._get_help_string(action)


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
    run = shared("run", metavar="RUN", help="name of the training run")
    beam = shared(
        "--beam", type=int, metavar="N",
        help="let tinygrad search schedules for its kernels, N candidates at a time: slow the "
        "first time, then cached; by default, no search",
    )  # fmt: skip
    as_json = shared("--json", action="store_true", help="print JSON instead of text")
    checkpoint = shared(
        "--checkpoint", type=checkpoint_name, default=-1, metavar="N",
        help="step of the checkpoint, or best for the best validation; negative numbers count from "
        "the newest checkpoint, -1",
    )  # fmt: skip

    init = add("init", "describe a new model in PATH/model.json", path)
    init.add_argument("--preset", choices=PRESETS, default="xs", help="start from these sizes")
    add_fields(init, Config, defaults=PRESETS["xs"], label="xs")

    training = add("train", "train a model on text", path, run, beam)
    add_train_options(training)

    evaluating = add("eval", "measure a trained model on text", path, run, checkpoint, as_json)
    add_eval_options(evaluating)

    running = add("run", "write text with a trained model", path, run, checkpoint, beam)
    add_run_options(running)

    informing = add("info", "sizes and costs of a model, checkpoints of a run", path, as_json)
    informing.add_argument("run", metavar="RUN", nargs="?", help="name of a training run")

    plotting = add("plot", "draw the curves of training runs", path)
    plotting.add_argument("runs", metavar="RUN", nargs="+", help="names of training runs")
    plotting.add_argument(
        "--output", type=path_name, metavar="FILE", help="SVG to write (default: PATH/RUN-RUN.svg)"
    )

    measuring = add("bench", "measure the speed of this machine", as_json, beam)
    add_bench_options(measuring)
    return parser


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
    add_data_options(parser)
    parser.add_argument(
        "--base-weights", type=path_name, metavar="FILE",
        help="start from these weights (.safetensors) instead of fresh ones, and without "
        "router warm-up unless --router-warmup-steps is given",
    )  # fmt: skip
    add_fields(parser, TrainSettings, defaults=dict.fromkeys(costs.CHOSEN, "see --settings"))
    parser.add_argument(
        "--settings", choices=["chosen", "published"],
        help="source of the settings that the command line leaves out: chosen for the device, the "
        "model and the data, or published, for a GPU and hundreds of megabytes (default: chosen)",
    )  # fmt: skip
    parser.add_argument(
        "--sample-prompt", metavar="TEXT",
        help=f"at each validation, print TEXT and the {SAMPLE_BYTES} bytes that the model writes "
        "after it; '' prints none, several devices none either (default: the start of a document)",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true",
        help="continue RUN from its newest valid checkpoint, with its settings",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="resume with another --batch-size")
    parser.add_argument(
        "--devices", metavar="N",
        help="share each batch among N devices, or among named ones: CUDA:0,CUDA:1",
    )  # fmt: skip


def add_eval_options(parser: Parser) -> None:
    parser.add_argument(
        "dataset", metavar="DATASET", nargs="?",
        help="as for train (default: the data that the run was trained on)",
    )  # fmt: skip
    add_data_options(parser)
    parser.add_argument(
        "--split", choices=SPLITS,
        help="validation or train, the two parts that the command train uses, or all, which holds "
        "nothing out (default: validation; all for a DATASET that has no validation data and that "
        "the run was not trained on)",
    )  # fmt: skip
    parser.add_argument(
        "--max-bytes", type=int, metavar="N", help="measure only the first N bytes (default: all)"
    )
    parser.add_argument(
        "--context-len", type=int, metavar="N",
        help="bytes of context before each predicted byte (default: as in training)",
    )  # fmt: skip
    parser.add_argument(
        "--stride", type=int, metavar="N",
        help="bytes that each window predicts, after context-len of context (default: context-len)",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", type=int, metavar="N",
        help="windows of one pass (default: as many as hold 16,384 bytes)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto",
        help=field_help(TrainSettings)["precision"],
    )  # fmt: skip
    parser.add_argument(
        "--html", type=path_name, metavar="FILE",
        help=f"also write a page of the first {PASSAGE:,} bytes: router weights, surprisal",
    )  # fmt: skip


def add_run_options(parser: Parser) -> None:
    prompting = parser.add_argument_group("prompt (default: the beginning of a new document)")
    source = prompting.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", default="", metavar="TEXT", help="text to continue; - reads standard input"
    )
    source.add_argument(
        "--prompt-file", type=path_name, metavar="FILE", help="file with the bytes to continue"
    )
    prompting.add_argument(
        "--raw-prompt", action="store_true",
        help="feed the model the prompt alone; without this option, the tag that begins a document "
        "precedes the prompt",
    )  # fmt: skip

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature", type=float, default=1.0, metavar="T",
        help="below 1 more predictable, above 1 more varied, 0 always the likeliest byte",
    )  # fmt: skip
    sampling.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="only the K likeliest bytes; 0: all"
    )
    sampling.add_argument(
        "--top-p", type=float, default=1.0, metavar="P",
        help="only the likeliest bytes that together reach the probability P",
    )  # fmt: skip
    sampling.add_argument(
        "--min-p", type=float, default=0.0, metavar="P",
        help="only bytes at least P times as likely as the likeliest one",
    )  # fmt: skip
    sampling.add_argument(
        "--seed", type=int, metavar="N", help="the same seed writes the same text"
    )
    sampling.add_argument(
        "--max-bytes", type=int, default=1024, metavar="N", help="stop after N bytes"
    )
    sampling.add_argument(
        "--ignore-end", action="store_true",
        help="continue where the model would end the document; the end tag is part of the text",
    )  # fmt: skip
    sampling.add_argument(
        "--num-samples", type=int, default=1, metavar="N",
        help="continue the prompt N times; above 1, each sample follows a line "
        "--- sample 1 of N ---",
    )  # fmt: skip
    sampling.add_argument(
        "--no-speculative", action="store_true",
        help="one pass per byte, without the model's own drafts of the next bytes; the text is "
        "the same",
    )  # fmt: skip
    sampling.add_argument("--disable-latent", action="store_true", help="skip the latent blocks")

    showing = parser.add_argument_group("output")
    showing.add_argument(
        "--output", choices=["text", "raw"], default="text",
        help="text: the prompt and its continuation, with U+FFFD for bytes that are not UTF-8, "
        "and a final line break; raw: the generated bytes, unchanged, without the prompt",
    )  # fmt: skip
    showing.add_argument(
        "--show-router-decisions", action="store_true",
        help="put _ before each byte that the router sent through the latent blocks",
    )  # fmt: skip
    showing.add_argument(
        "--color", action="store_true",
        help="shade each character by the highest router weight of its bytes (gray, above 0.5 "
        "orange) and underline accepted drafts; only on a terminal, and not if NO_COLOR is set",
    )  # fmt: skip
    showing.add_argument(
        "--html", type=path_name, metavar="FILE",
        help="also write a page with the same marks and the details of each byte",
    )  # fmt: skip
    showing.add_argument(
        "--stats", action="store_true", help="print the speed on standard error at the end"
    )


def add_bench_options(parser: Parser) -> None:
    parser.add_argument(
        "mode", choices=["train", "decode"], nargs="?", default="train",
        help="a training step, or decoding",
    )  # fmt: skip
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--preset", choices=PRESETS, default="xs", help="sizes of the model")
    sizes.add_argument(
        "--model", type=path_name, metavar="PATH", help="folder of a model to take the sizes from"
    )
    add_fields(parser, Config, defaults=PRESETS["xs"], label="xs")
    parser.add_argument(
        "--context-len", type=int, default=1024, metavar="N",
        help="bytes of a training window, or of the prompt",
    )  # fmt: skip
    add_fields(parser, TrainSettings, BENCH_SETTINGS, "train: ", defaults={"batch_size": 1})
    parser.add_argument(
        "--devices", metavar="N",
        help="train: share each batch among N devices, or among named ones: CUDA:0,CUDA:1",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="repetitions; prints their median"
    )


def add_fields(
    parser: Parser,
    cls: type,
    names: tuple[str, ...] = (),
    note: str = "",
    defaults: dict[str, Any] | None = None,
    label: str = "default",
) -> None:
    """Options for the fields of Config or TrainSettings, all or some; `given` reads them.

    `defaults` are shown in place of the fields' own, after `label`.
    """
    for field in dataclasses.fields(cls):
        if names and field.name not in names:
            continue
        text, choices = note + field.metadata["help"], field.metadata["choices"]
        default = (defaults or {}).get(field.name, field.default)
        if field.type is bool:
            kind = {"action": "store_true", "default": None}
        else:
            kind = {"type": field.type, **({"choices": choices} if choices else {"metavar": "N"})}
            text += f" ({label}: {default})"
        parser.add_argument(option_of(field.name), help=text, **kind)


def add_data_options(parser: Parser) -> None:
    for name, text in field_help(DataSpec).items():
        if name == "dataset":
            continue
        kind = number if name == "validation_size" else str
        parser.add_argument(option_of("dataset_" + name), type=kind, metavar="X", help=text)


def option_of(field: str) -> str:
    return "--" + field.replace("_", "-")


def given(args: argparse.Namespace, cls: type, prefix: str = "") -> dict[str, Any]:
    """The fields of a dataclass that the command line sets, by name."""
    names = [field.name for field in dataclasses.fields(cls)]
    values = {name: getattr(args, prefix + name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def checkpoint_name(text: str) -> int | str:
    if text != "best" and not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor best")
    return text if text == "best" else int(text)


def path_name(text: str) -> Path:
    if not text:  # an unset variable of the shell is not the current folder
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def number(text: str) -> int | float:
    return float(text) if "." in text or "e" in text.lower() else int(text)
