"""The command line end to end; every mistake is one line, status 2, and nothing is written."""

import contextlib
import ctypes
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import helpers
import numpy as np
import pytest
from helpers import FLAGS, FOX, SHORT, Watch, error_line, start, status

from pico_tg.__main__ import repeat_interrupt
from pico_tg.config import PRESETS, Config, TrainSettings, types_of
from pico_tg.costs import CHOSEN, training_flops
from pico_tg.data import DataSpec
from pico_tg.evaluation import EvalSettings, evaluate
from pico_tg.files import PicoError
from pico_tg.generation import GeneratedByte, SampleSettings, Stats, generate
from pico_tg.model import Pico
from pico_tg.runs import SHIPPED, load, load_config
from pico_tg.safetensors import read_safetensors
from pico_tg.scoring import score
from pico_tg.tools import cli
from pico_tg.tools.options import build_parser, given, mark_texts
from pico_tg.tools.router_report import router_report
from pico_tg.training import train

TINY = helpers.TINY.to_dict()


@pytest.fixture(autouse=True)
def gemm_rate(monkeypatch):
    """Not measured by every test; `trained` measures it."""
    monkeypatch.setattr("pico_tg.costs.gemm_rate", lambda precision, device: 50.0)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(FOX)
    return path


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    helpers.TINY.to_json(path / "model.json")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with one run of three steps; tests must leave both as they are."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PICO_CACHE", str(folder / "cache"))
        (folder / "text.txt").write_text(FOX)
        (folder / "model").mkdir()  # an empty folder may hold a new model
        assert cli.main(["init", str(folder / "model"), *FLAGS]) == 0
        train = ["train", str(folder / "model"), "run", str(folder / "text.txt")]
        assert cli.main([*train, *SHORT]) == 0
    return folder / "model"


@pytest.fixture(scope="module")
def measured(trained):
    """What evaluating the run of `trained` gives."""
    text = str(trained.parent / "text.txt")
    return evaluate(load(trained, "run"), text, context_len=40)


@pytest.fixture
def weights(model, trained):
    """`model` with a run of weights alone, without a training.json."""
    (model / "run").mkdir()
    data = (trained / "run" / "00000003.safetensors").read_bytes()
    (model / "run" / "00000003.safetensors").write_bytes(data)
    return model


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------- options and mistakes

# the dataclasses whose fields are options of a command, and what precedes their names
FIELDS = [
    ("init", Config, ""),
    ("train", TrainSettings, ""),
    ("train", DataSpec, "dataset_"),
    ("eval", EvalSettings, ""),
    ("eval", DataSpec, "dataset_"),
    ("run", SampleSettings, ""),
    ("bench", Config, ""),
]
OFF = {"speculative": "--no-speculative", "latent": "--disable-latent"}


def option_of(name: str, prefix: str = "") -> str:
    return OFF.get(name, "--" + (prefix + name).replace("_", "-"))


def allowed(field: dataclasses.Field):
    """A value that is not the default."""
    if field.metadata["choices"]:
        return field.metadata["choices"][-1]
    types = types_of(field)
    return (
        not field.default
        if bool in types
        else 0.5
        if float in types
        else 7
        if int in types
        else "x"
    )


@pytest.mark.parametrize(("command", "cls", "prefix"), FIELDS)
def test_every_field_is_an_option(command, cls, prefix, capsys):
    """With its help and default; `given` reads it, and nothing that was not given."""
    assert status([command, "--help"]) == 0
    shown = re.sub(r"\s", "", capsys.readouterr().out)
    position = {"init": ["m"], "bench": []}.get(command, ["m", "r"])
    for field in dataclasses.fields(cls):
        if field.name == "dataset":  # it has a place, and no option
            continue
        option, value = option_of(field.name, prefix), allowed(field)
        arguments = [option] if isinstance(value, bool) else [option, str(value)]
        parsed = build_parser(cli.COMMANDS).parse_args([command, *position, *arguments])
        assert given(parsed, cls, prefix) == {field.name: value}
        told = field.metadata.get("off", field.metadata["help"])
        help, default = re.sub(r"\s", "", told), field.default
        if command == "init":
            default = PRESETS["minutes"].get(field.name, default)
        named = command in ("init", "run") and default is not None and not isinstance(default, bool)
        assert help + (f"(default:{default})" if named else "") in shown


MISTAKES = {  # a command line, and what its error names
    "init {new} --dim 3": "error: --dim (3) is smaller than --att-q-heads (4): a head",
    "init {new} --depth 3": "unrecognized arguments: --depth 3 (see pico_tg init --help)",
    "train {model} x --routr learned": "--routr learned (see pico_tg train --help)",
    "run {model} --promt=a": "--promt=a (did you mean --prompt?) (see pico_tg run --help)",
    "init {new} --router all --latent-capacity-factor 1": "--latent-capacity-factor has no effect",
    "init {new} --preset large": "invalid choice: 'large' (choose from",
    "rum stories": "'bench') (did you mean run?) (see pico_tg --help)",
    "init {new} --router lerned": "(did you mean learned?) (see pico_tg init --help)",
    "web {trained} --port 80000": "listen on port 80000: bind(): port must be 0-65535; choose",
    "init {model}": "exists and is not an empty folder",
    "init ''": "the path is empty",  # as an unset variable of the shell gives
    "train {model} r ''": "the dataset has no name",
    "train {model} r {text} {short} --context-len 3": "error: --context-len 3 is too short",
    "train {model} r {text} {short} --context-len 100000": "fewer than one window",
    "train {model} r {text} --base-weights nowhere.safetensors": "nowhere.safetensors",
    "train {model} r {text} --base-weights {truncated}": "{truncated}",
    "train {model} r {text} --dataset-train-split nope": "has no split 'nope'",
    "train {model} r {rows} --dataset-column-name plot": "; name one by --dataset-column-name",
    "train {model} r missing.txt": "missing.txt",
    "train {model} r {tiny}": "221 bytes to train on, from {tiny}, are too few: at least 256",
    "train {model} r {text} --keep-checkpoints -1": "error: --keep-checkpoints must be",
    "train {model} r {text} --max-minutes -1": "error: --max-minutes must be",
    "train {model} r {text} --dataset-validation-size 2.5": "--dataset-validation-size must be",
    "train {model} r max_steps/a.txt": "no file or folder max_steps/a.txt",
    "train {model} r {text} --seed 1.5": "argument --seed: invalid",
    "train {model} r {text} --force": "--force requires --resume",
    "train {model} r {text} --devices 2 --sample-prompt A": "--sample-prompt needs one device",
    "run {model}s run": "{model}s is no model (did you mean {model}?): there is no such folder",
    "run storie": "storie is no model (did you mean stories?): there is no such folder; to train",
    "run 'Once upon'": "there is no such folder; a text to continue comes after --prompt",
    "train '{new} model' r {text}": "init '{new} model'",  # quoted for the shell
    "train {damaged} r {text}": "{damaged}/model.json: att_q_heads must be",
    "bench --model {damaged} --dim 9": "{damaged}/model.json: att_q_heads must be",
    "train {trained} run {text}": "continue it with --resume",
    "train {trained} sub/a {text}": "a new RUN is a name without a folder, not 'sub/a'",
    "train {trained} run --resume --base-weights x": "--base-weights is for a new run",
    "train {trained} run --resume --from {trained} run": "--from is for a new run",
    "train new r {text} --from {trained} run --base-weights x": "both name the weights",
    "train new r {text} --from nowhere run": "nowhere is no model: there is no such folder; --from",
    "train new r {text} --from {trained}/run run": "holds no model.json; --from takes PATH and RUN",
    "train new r {text} --from {trained} none": "{trained} has no run none; its runs are: run",
    "train stories new {text}": "train models/mine new DATASET --from stories first",
    "train stories new {text} --from stories first": "stories stays as it comes with the package",
    "train new r nowhere.txt --from {trained} run": "nowhere.txt",
    "train {trained} run --resume --dataset-train-split a": "give the DATASET too",
    "train {model} r --valid {text}": "give the DATASET too",
    "train {model} r row.jsonl": "no file or folder row.jsonl (did you mean rows.jsonl?)",
    "eval {trained} {text}": "; a DATASET follows the RUN",
    "eval {trained} nothing": "{trained} has no run nothing; its runs are: run",
    "eval {trained} run --checkpoint 77": "checkpoints exist of steps 3",
    "eval {trained} run --dataset-column-name a": "give the DATASET too",
    "eval {trained} run {text} --split all --dataset-validation-size 0.1": "leave --dataset-valid",
    "plot {trained} run --output c.png": "'c.png' would hold SVG; end it in .svg",
    "plot {trained} run --output -": "name a file that ends in .svg, not -",
    "plot {trained}/run {new}/run": "to train one, begin with: python -m pico_tg init {new}/run",
    "plot {trained}/run {trained}/other": "{trained} has no run other; its runs are: run",
    "plot {model}": "no run of {model} has a checkpoint",
    "run {trained} run --html c.pdf": "'c.pdf' would hold HTML; end it in .html",
    "eval {trained} run --html no/where.html": "no folder",
    "eval {trained} run --text a --html no/where.html": "no folder",
    "eval {trained} run --text=": "the text is empty",
    "eval {trained} run {text} --text a --split all": "leave DATASET and --split out",
    "eval {trained} run --text a --dataset-column-name b": "leave --dataset-column-name out",
    "eval {trained} run --text a --full": "leave --full out",
    "info {new}": "to train one, begin with: python -m pico_tg init {new}",
    "plot {trained} missing": "{trained} has no run missing; its runs are: run",
    "plot stories": "stories/first has no metrics.jsonl: only the command train writes it",
    "eval stories first": "error: give a DATASET or --text: the run does not say what",
    "init stories": "stories is the model that comes with pico_tg",
    "run {model} nothing": "make one with: python -m pico_tg train {model} nothing",
    "run {trained} run --top-p 1.5": "error: --top-p must be",
    "run {trained} run --stop ''": "error: --stop is empty",
    "run {trained} run --checkpoint last": "neither a step nor best",
    "run {trained} run --prompt a --prompt-file b": "--prompt-file",
    "run {trained} run --prompt": "expected one argument",
    "run {trained} 'Once upon'": "a text follows --prompt (run) or --text (eval)",
    "eval {trained} --prompt 'The cat'": "error: unrecognized arguments: --prompt (see",
    "run {trained} --text=Hi": "error: unrecognized arguments: --text (see",
    "train {trained} new --prompt x": "--prompt (did you mean --sample-prompt?)",
    "run {trained} run --prompt-file /dev/null": "/dev/null is empty; leave --prompt-file out",
    "run {trained} run --prompt-file nowhere.txt": "nowhere.txt",
    "run {trained} run --prompt-file .": "cannot read",
    "run {trained} run --output pdf": "pdf",
    "run {trained} run --output raw --show-router-decisions": "--show-router-decisions",
    "run {trained} run --output raw --num-samples 2": "--num-samples",
    "run {trained} run --html ''": "the path is empty",
    "run {trained} run --html no/where.html": "no folder",
    "run {trained} run --html .": "not a file",
    "run {trained} run --html /dev/null": "not a file",
    **{
        f"{name} {{model}} ../run": "RUN must name a run"
        for name in ("train", "eval", "run", "info", "plot")
    },
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line(line, model, text, trained, tmp_path, monkeypatch, capsys):
    """Status 2, nothing on standard output, and no file of a model changes."""
    monkeypatch.chdir(tmp_path)
    rows, damaged = tmp_path / "rows.jsonl", tmp_path / "damaged"
    rows.write_text('{"story": "once", "title": "a"}\n')
    damaged.mkdir()
    (damaged / "model.json").write_text(json.dumps(TINY | {"att_q_heads": "many"}))
    places = {"model": model, "text": text, "trained": trained, "rows": rows, "damaged": damaged}
    places |= {"new": tmp_path / "new", "short": shlex.join(SHORT)}
    places["tiny"] = tmp_path / "tiny.txt"
    places["tiny"].write_text(FOX[:211])
    places["truncated"] = tmp_path / "base.safetensors"
    places["truncated"].write_bytes((trained / "run" / "00000003.safetensors").read_bytes()[:-4])
    before = [contents(folder) for folder in (model, trained, damaged, SHIPPED)]
    assert status(shlex.split(line.format(**places))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    # data are read and a model is loaded before some mistakes are noticed
    (error,) = re.findall(r"^(?!backend|caching|loading)(?=.*\S).+$", captured.err, re.MULTILINE)
    assert error.startswith("pico_tg")
    assert MISTAKES[line].format(**places) in error
    assert [contents(folder) for folder in (model, trained, damaged, SHIPPED)] == before
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------- init


@pytest.mark.parametrize(
    ("flags", "expected", "words"),
    [
        ([], Config.preset("minutes"), "preset minutes (for minutes"),
        (["--router", "space"], Config.preset("minutes", router="space"), "with router space"),
        (["--dim", "96"], Config.preset("minutes", dim=96), "with dim 96"),
        (["--preset", "xs", "--dim", "99"], Config.preset("xs", dim=99), "with dim 99"),
        (["--preset", "published"], Config.preset("published"), "10,243,208 parameters"),
    ],
)
def test_init_takes_a_preset(flags, expected, words, tmp_path, capsys):
    """Without one, `minutes`; other flags change single sizes of it."""
    assert cli.main(["init", str(tmp_path / "a" / "b"), *flags]) == 0
    assert load_config(tmp_path / "a" / "b") == expected
    made, following = capsys.readouterr().out.splitlines()
    assert words in made
    assert f"{expected.parameters:,} parameters, preset" in made
    assert following == f"next: python -m pico_tg train {tmp_path}/a/b RUN DATASET"


def test_init_lists_the_presets(capsys):
    assert status(["init", "--help"]) == 0
    shown = re.findall(
        r"^ +(\w+): ([\d,]+) parameters, ([\d.]+) MFLOPs", capsys.readouterr().out, re.MULTILINE
    )
    assert [name for name, _, _ in shown] == list(PRESETS)
    for name, parameters, flops in shown:
        config = Config.preset(name)
        assert parameters == f"{config.parameters:,}"
        assert float(flops) == pytest.approx(training_flops(config, 512) / 512e6, abs=0.05)


# ------------------------------------------------------------------------------------------ train


def test_train_writes_a_run(trained):
    run = trained / "run"
    assert sorted(p.name for p in run.glob("*.safetensors") if ".state" not in p.name) == [
        "00000003.safetensors"
    ]
    description = json.loads((run / "training.json").read_text())
    assert description["settings"]["max_steps"] == 3
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["bits_per_byte"] == pytest.approx(8, abs=1)
    assert lines[-1]["validation_bits_per_byte"] > 0


def test_memory_is_checked_before_the_model_takes_it(model, text, monkeypatch, capsys):
    monkeypatch.setattr("pico_tg.backend.machine.available_memory", lambda: 1000)
    monkeypatch.setattr(cli, "Pico", None)  # not callable
    assert status(["train", str(model), "r", str(text)]) == 2
    assert "take a smaller --context-len, --batch-size or model" in error_line(capsys)


def test_without_a_dataset_train_says_what_it_takes(model, trained, text, monkeypatch, capsys):
    monkeypatch.setattr("pico_tg.backend.machine.available_memory", lambda: 1000)
    for arguments, expected in (
        ([model, "r"], ["no DATASET given: taking python-docs"]),
        ([model, "r", text], []),
        ([trained, "run", "--resume"], []),
    ):
        assert status(["train", *map(str, arguments)]) == 2
        *said, _ = capsys.readouterr().err.splitlines()
        assert [line.partition(",")[0] for line in said] == expected


def test_python_chooses_as_the_command_line_does(trained, tmp_path, capsys):
    text, watch, asked = trained.parent / "text.txt", Watch(), {"max_steps": 2, "context_len": 40}
    assert cli.main(["init", str(tmp_path / "line"), *FLAGS]) == 0
    arguments = ["train", str(tmp_path / "line"), "r", str(text)]
    assert cli.main([*arguments, *helpers.flags(asked)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("  sample: ") for line in said) == 1  # at the validation
    shown = [line for line in said if line.startswith("chosen ")]
    run = tmp_path / "python" / "r"
    first, second = train(Pico(helpers.TINY), str(text), run, events=watch, **asked)
    stored, expected = (
        json.loads((folder / "r" / "training.json").read_text())["settings"]
        for folder in (tmp_path / "python", tmp_path / "line")
    )
    assert stored == expected
    assert stored["batch_size"] < TrainSettings.batch_size
    chosen = first.pop("chosen")
    assert chosen == {name: stored[name] for name in CHOSEN if name not in asked}
    assert first.keys() | {"chosen"} <= second.keys() | {"chosen"}
    listed = [line for line in watch.said if line.startswith("chosen ")]
    assert listed == shown
    assert "max_steps" not in "".join(listed)
    assert all(f" {name} {value}" in "".join(listed) for name, value in chosen.items())
    assert any(line.startswith("training will take about") for line in watch.said)
    assert "chosen" in json.loads((run / "metrics.jsonl").read_text().splitlines()[0])


def test_published_settings(trained, tmp_path):
    text, watch = str(trained.parent / "text.txt"), Watch()
    asked = {"context_len": 40, "batch_size": 2, "warmup_steps": 1}
    records = train(
        Pico(helpers.TINY), text, tmp_path / "r", events=watch, settings="published", **asked
    )
    first = next(records)
    records.close()
    assert "chosen" not in first
    assert cli.main(["init", str(tmp_path / "line"), *FLAGS]) == 0
    line = ["train", str(tmp_path / "line"), "r", text, "--settings", "published"]
    assert cli.main([*line, *SHORT]) == 0
    for folder, steps in ((tmp_path, 3600), (tmp_path / "line", 3)):
        stored = json.loads((folder / "r" / "training.json").read_text())["settings"]
        published = dataclasses.asdict(TrainSettings(max_steps=steps, **asked))
        assert stored | {"precision": "auto"} == published
    assert f"{first['steps']} steps, not max_steps (3600): the data end after 1 epoch; " in "".join(
        watch.said
    )
    with pytest.raises(PicoError, match=r"^settings must be chosen or published, not 'other'"):
        train(Pico(helpers.TINY), text, settings="other")
    with pytest.raises(PicoError, match=r"^settings is for a new run"):
        train(Pico(helpers.TINY), text, tmp_path / "r", resume=True, settings="published")


@pytest.mark.slow
def test_base_weights(weights, text):
    """Training may start from another run's weights."""
    file = weights / "run" / "00000003.safetensors"
    arguments = ["train", str(weights), "more", str(text), *SHORT, "--learning-rate", "1e-30"]
    assert cli.main([*arguments, "--base-weights", str(file)]) == 0
    before, _ = read_safetensors(file)
    after, _ = read_safetensors(weights / "more" / "00000003.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    description = json.loads((weights / "more" / "training.json").read_text())
    assert description["base_weights"] == str(file)
    assert description["settings"]["router_warmup_steps"] == 0  # their router counts as trained
    assert cli.main(["train", str(weights), "more", "--resume", "--max-steps", "3"]) == 0
    assert json.loads((weights / "more" / "training.json").read_text()) == description


def test_fine_tuning(trained, tmp_path, capsys):
    """From the newest checkpoint of another model, whose sizes a new folder takes over."""
    text, new = trained.parent / "text.txt", tmp_path / "models" / "mine"
    arguments = ["train", str(new), "b", str(text), "--from", str(trained), "run", *SHORT]
    assert cli.main([*arguments, "--sample-prompt", "A"]) == 0
    said = capsys.readouterr().err
    assert said.count('\n  sample after "A": ') == 1
    assert said.endswith(" b --prompt A\n")
    last = json.loads((trained / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    before = f"{last['validation_bits_per_byte']:.3f} bits per byte of held-out text"
    assert f"before the first step: {before}\n" in said
    assert load_config(new) == load_config(trained)
    description = json.loads((new / "b" / "training.json").read_text())
    assert description["base_weights"] == str(trained / "run" / "00000003.safetensors")
    chosen = description["settings"]
    fresh = json.loads((trained / "run" / "training.json").read_text())["settings"]
    assert chosen["learning_rate"] == fresh["learning_rate"] / 4
    assert chosen["router_warmup_steps"] == 0
    assert load(new).config == load_config(trained)


def test_fine_tuning_keeps_a_model_of_other_sizes(trained, tmp_path, capsys):
    assert cli.main(["init", str(tmp_path / "other"), *FLAGS, "--dim", "28"]) == 0
    before = (tmp_path / "other" / "model.json").read_bytes()
    capsys.readouterr()
    text = str(trained.parent / "text.txt")
    arguments = ["train", str(tmp_path / "other"), "r", text, "--from", str(trained), "run"]
    assert cli.main(arguments) == 2
    assert "describes another model: dim was 28, now 24" in error_line(capsys)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["model.json"]
    assert (tmp_path / "other" / "model.json").read_bytes() == before


def test_resume_of_a_complete_run(trained, capsys):
    assert cli.main(["train", str(trained), "run", "--resume"]) == 0
    said = capsys.readouterr().err
    assert "nothing left to train; a larger --max-steps continues the run" in said
    assert "compiling" not in said
    assert "trained, step" not in said


def test_a_sample_is_one_line(written, monkeypatch):
    """It names its prompt. All samples of a writer are written by one decoder."""
    decoders, stops = [], []

    class Decoder:
        def __init__(self, model):
            decoders.append(model)

    monkeypatch.setattr(cli, "Decoder", Decoder)
    sample = cli.sample_writer(None, b"a\n", lambda: bool(stops))
    assert decoders == []  # devices are chosen later
    written.add(b"\n\x1b\xff")
    assert sample() == 'sample after "a\\n": \\n\\x1b\ufffd'
    assert cli.sample_writer(None, b"", lambda: False)() == "sample: \\n\\x1b\ufffd"
    written.append(lambda: stops.append(1))  # Ctrl-C
    written.add(b"ab")
    assert sample() == 'sample after "a\\n": \\n\\x1b\ufffd'
    stops.clear()
    written[:] = [PicoError("the logits overflow")]  # training goes on
    assert sample() == 'sample after "a\\n": the logits overflow'
    assert decoders == [None, None]  # one for each writer


@pytest.mark.slow
def test_interrupt_saves(model, text):
    """A signal ends training after the step, with a checkpoint; status 130."""
    arguments = [str(model), "r", str(text), *SHORT, "--max-steps", "100000", "--epochs", "10000"]
    process = start("train", *arguments, stderr=subprocess.PIPE, text=True)
    metrics = model / "r" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=600)[1]
    assert process.returncode == 130, err
    assert "Traceback" not in err
    steps = metrics.read_text().count("\n")
    assert (model / "r" / f"{steps:08d}.safetensors").exists()


# ------------------------------------------------------------------------------------------- eval


def test_eval(trained, measured, tmp_path, capsys):
    """Tables, JSON and a page say what `evaluate` returns."""
    page = tmp_path / "page.html"
    arguments = ["eval", str(trained), "run"]
    assert cli.main([*arguments, "--html", str(page)]) == 0
    short, err = capsys.readouterr()
    assert f"wrote {page}" in err
    assert "model, run run, step 3: validation data of" in short
    assert len(short.splitlines()) == 3
    assert cli.main([*arguments, "--full"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(short)
    own = str(trained.parent / "text.txt")
    flags = ["--json", "--checkpoint", "3", "--split", "validation", "--context-len", "40"]
    assert cli.main([*arguments, own, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    facts = {"step": 3, "data": own, "split": "validation"}
    assert found == json.loads(
        json.dumps(facts | measured.as_dict() | router_report(measured).as_dict())
    )
    for name, value in (
        ("bits per byte", f"{found['bits_per_byte']:.4f}"),
        ("without the deep blocks", f"{found['bits_per_byte_without_latent']:.4f}"),
        ("share of bytes routed", f"{found['router_rate']:.1%}"),
        ("next byte guessed right", f"{found['head_accuracy'][0]:.1%}"),
        ("3 bytes ahead guessed right", f"{found['head_accuracy'][2]:.1%}"),
        ("word start", f"{found['places']['word_start']['share_of_bytes']:.1%}"),
        ("space", f"{found['places']['space']['share_of_bytes']:.1%}"),
        ("causal routing minus top-k, bits per byte", f"{found['routing_gap']:+.4f}"),
        ("surprisal after routed bytes / mean", f"{found['surprisal_ratio']:.2f}"),
        (
            "within one byte of a boundary",
            f"{found['boundaries']['near']['router']['precision']:.3f} "
            f"({found['boundaries']['near']['random']['precision']:.3f})",
        ),
    ):
        assert re.search(rf"^{name} +{re.escape(value)}", out, re.MULTILINE), name
    assert "continuation" not in out  # the text has no such byte
    assert found["places"]["continuation"]["share_of_bytes"] == 0
    sentences = short.splitlines()[-1]
    for figure in (
        f"{found['bits_per_byte']:.3f} bits per byte",
        f"({found['bits_per_byte_without_latent']:.3f} without the deep blocks)",
        f"sends {found['router_rate']:.0%} of the bytes",
        f"{found['places']['space']['rate']:.0%} of the spaces",
        f"{found['places']['word_inside']['rate']:.0%} of the bytes inside words",
        f"{found['surprisal_ratio']:.1f} times as surprising",
    ):
        assert figure in sentences
    written = page.read_text()
    assert "<h2>Passage <small>112 bytes" in written
    assert sentences in written


def test_the_best_validation_without_a_checkpoint_is_named(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "model")
    metrics = tmp_path / "model" / "run" / "metrics.jsonl"
    first, *others = metrics.read_text().splitlines()
    better = json.loads(first) | {"validation_bits_per_byte": 0.1}
    for line, remark in ((first, ""), (json.dumps(better), "best validation was at step 1, which")):
        metrics.write_text("\n".join([line, *others, ""]))
        command = ["run", str(tmp_path / "model"), "run", "--checkpoint", "best"]
        assert cli.main([*command, "--max-bytes", "1"]) == 0
        said = capsys.readouterr().err
        assert remark in said
        assert ("best" in said) == bool(remark)


def test_the_default_split(trained, tmp_path, capsys):
    """All of other data, unless they have a validation part."""
    own, other = str(trained.parent / "text.txt"), tmp_path / "other.txt"
    other.write_text("Another text. " * 20)
    for flags, part in (
        ([str(other)], "data"),
        ([str(other), "--dataset-validation-size", "0.1"], "validation data"),
        ([str(other), "--split", "train"], "train data"),
        ([own], "validation data"),  # the run was trained on the rest
        ([own, "--split", "all"], "data"),
        ([], "validation data"),
    ):
        assert status(["eval", str(trained), "run", *flags, "--max-bytes", "9"]) == 2
        assert f"first 9 bytes of the {part} hold no byte" in capsys.readouterr().err


def test_eval_of_a_text(trained, tmp_path, capsys):
    """The text with its marks, JSON and a page say what `score` returns."""
    text, page = "The fox, é\n\udcff", tmp_path / "page.html"
    scored = score(load(trained, "run"), os.fsencode(text))
    arguments = ["eval", str(trained), "run", "--text", text]
    assert cli.main([*arguments, "--html", str(page)]) == 0
    out = capsys.readouterr().out
    shown, figures = out[: out.rindex("\n", 0, -1)], out.splitlines()[-1]
    assert shown.replace("_", "") == "The fox, é\n\ufffd"
    routed = sum(record.router_decision for record in scored)
    assert 0 < shown.count("_") <= routed
    assert figures == (
        f"{scored.bits:.2f} bits, {scored.bits_per_byte:.3f} bits per byte; "
        f"{routed} of 13 bytes routed"
    )
    assert page.read_text().count(", routed · ") == routed
    assert f"<dt>bits</dt><dd>{scored.bits:.2f}</dd>" in page.read_text()
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [GeneratedByte(**values) for values in found.pop("bytes")] == scored
    figures = {"bits": scored.bits, "bits_per_byte": scored.bits_per_byte}
    assert found == {"step": 3} | figures


def test_text_that_was_trained_on_is_said(trained, tmp_path, capsys):
    """However it is held out and wherever it is; a copy of the data has the held-out part."""
    own, copy = trained.parent / "text.txt", tmp_path / "copy.txt"
    copy.write_bytes(own.read_bytes())
    (tmp_path / "other.txt").write_text("Another text, of another kind, without a fox. " * 20)
    short = ["--max-bytes", "200", "--context-len", "40"]
    for flags, part, said in (
        ([str(tmp_path / "other.txt")], "all", False),
        ([str(copy)], "validation data", True),  # the text repeats one sentence
        ([str(own), "--dataset-validation-size", "0.9"], "validation data", True),
        ([str(tmp_path / "other.txt"), "--valid", str(own)], "validation", True),
    ):
        assert cli.main(["eval", str(trained), "run", *flags, *short]) == 0
        out, err = capsys.readouterr()
        assert f": {part}" in out
        line = f"warning: {trained}/run was trained on about "
        assert any(part.startswith(line) for part in err.splitlines()) == said


def test_eval_says_what_it_leaves_out(trained, tmp_path, capsys):
    """As `train` does: files of another split, rows without text."""
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.jsonl").write_text('{"text": "Another text. Yet more."}\n{"a": 1}\n')
    (tmp_path / "f" / "test.txt").write_text("Some more.")
    short = ["--max-bytes", "20", "--context-len", "40"]
    assert cli.main(["eval", str(trained), "run", str(tmp_path / "f"), *short]) == 0
    said = capsys.readouterr().err.splitlines()
    assert "not used: test.txt (split test)" in said
    assert any(line.startswith("rows left out of") and "1 of 2" in line for line in said)


def test_eval_of_weights_alone(weights, capsys):
    """A run that only has weights, from elsewhere say, needs a DATASET."""
    assert status(["eval", str(weights), "run"]) == 2
    assert "give a DATASET" in error_line(capsys)


# --------------------------------------------------------------------------------- info and plot


def test_info(trained, capsys):
    """Of a model, and of a run; JSON and tables say the same."""
    assert cli.main(["info", str(trained), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["model"] == TINY
    assert "run" not in alone
    assert cli.main(["info", str(trained), "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (checkpoint,) = found["run"]["checkpoints"]
    path = trained / "run" / "00000003.safetensors"
    last = json.loads((trained / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert checkpoint == {
        "step": 3, "file": path.name, "bytes": path.stat().st_size,
        **{k: last[k] for k in ("bits_per_byte", "validation_bits_per_byte", "router_rate")},
    }  # fmt: skip
    assert found["run"]["settings"]["context_len"] == found["operations_a_byte"]["context_len"]
    assert found["run"]["base_weights"] is None
    assert cli.main(["info", str(trained), "run"]) == 0
    out = capsys.readouterr().out
    for text in (
        f"total +{found['parameters']['total']:,}",
        f"step 3 +[\\d.]+ +{last['bits_per_byte']:.4f} +{last['validation_bits_per_byte']:.4f}",
        "context_len +40",
    ):
        assert re.search(text, out), text


def test_plot(trained, weights, tmp_path, capsys):
    """Of runs; also of those in folders of their own, and with a slash from completion."""
    metrics = (trained / "run" / "metrics.jsonl").read_bytes()
    for name in ("run", "sub/a", "sub/b"):
        (weights / name).mkdir(parents=True, exist_ok=True)
        (weights / name / "metrics.jsonl").write_bytes(metrics)
    assert cli.main(["plot", str(weights), "run"]) == 0
    written = Path(capsys.readouterr().out.strip())
    assert written == weights / "run.svg"
    text = written.read_text()
    last = json.loads(metrics.splitlines()[-1])["validation_bits_per_byte"]
    assert f">run {last:.4g}</text>" in text
    assert "Learning rate" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # self-contained
    output = tmp_path / "two.svg"
    assert cli.main(["plot", str(weights), "run", "run", "--output", str(output)]) == 0
    assert output.exists()
    capsys.readouterr()
    for name, told in (("a", "one"), ("b", "another")):
        description = json.loads((trained / "run" / "training.json").read_text())
        description["fingerprints"][1] = told
        (weights / "sub" / name / "training.json").write_text(json.dumps(description))
    assert cli.main(["plot", str(weights), "sub/b", "--output", str(output)]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main(["plot", str(weights), "sub/a", "sub/b/", "--output", str(output)]) == 0
    assert "validated on different texts: sub/a, sub/b" in capsys.readouterr().err
    assert "validated on different texts: sub/a, sub/b<" in output.read_text()
    assert cli.main(["plot", str(weights), "sub/a", "sub/b/"]) == 0
    assert Path(capsys.readouterr().out.strip()) == weights / "sub-a-sub-b.svg"
    assert ">sub/a " in (weights / "sub-a-sub-b.svg").read_text()


def test_plot_of_several_models(trained, tmp_path, monkeypatch, capsys):
    """By PATH/RUN, or one as PATH RUN; the names are what differs between the paths."""
    for name in ("a", "b", "b/c", "c"):
        shutil.copytree(trained, tmp_path / "models" / name)
    monkeypatch.chdir(tmp_path)
    description = json.loads(Path("models/b/run/training.json").read_text())
    description["settings"]["validation_bytes"] //= 2
    Path("models/b/run/training.json").write_text(json.dumps(description))
    for arguments, names, written in (
        ("models/a/run models/b/run", ("a/run", "b/run"), "models/a/a-run-b-run.svg"),
        ("models/a run models/b/run", ("a/run", "b/run"), "models/a/a-run-b-run.svg"),
        ("models/a/run", ("run",), "models/a/run.svg"),
        ("models/a", ("run",), "models/a/run.svg"),
        ("models/a run models/b/c", ("a/run", "b/c/run"), "models/a/a-run-b-c-run.svg"),
        (f"models/a run {tmp_path}/models/c/run", ("a/run", "c/run"), "models/a/a-run-c-run.svg"),
        ("models/b/c/run models/b/run", ("c/run", "run"), "models/b/c/c-run-run.svg"),
    ):
        assert cli.main(["plot", *arguments.split()]) == 0
        out, err = capsys.readouterr()
        assert out == f"{Path(written)}\n"
        picture = Path(written).read_text()
        assert all(f">{name} " in picture for name in names)
        assert "Bits per byte of text.txt:" in picture
        assert ("validated on different texts" in err) == ("models/b/run" in arguments)


# -------------------------------------------------------------------------------------------- run


def test_run_for_real(trained, tmp_path, capsysbinary):
    """The command line's bytes are the library's; page and figures agree with them."""
    options = {
        "max_bytes": 12, "seed": 5, "temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.01,
        "ignore_end": True, "raw_prompt": True,
    }  # fmt: skip
    expected = list(generate(load(trained, "run"), b"The \xff", **options))
    page = tmp_path / "page.html"
    flags = helpers.flags({k: v for k, v in options.items() if v is not True})
    flags += ["--ignore-end", "--raw-prompt", "--no-speculative", "--stats", "--output", "raw"]
    flags += ["--prompt", os.fsdecode(b"The \xff"), "--html", str(page), "--checkpoint", "3"]
    assert cli.main(["run", str(trained), "run", *flags]) == 0
    out, err = capsysbinary.readouterr()
    assert out == bytes(record.byte for record in expected)
    tips = page.read_text()
    assert [int(b, 16) for b in re.findall(r" 0x(\w\w) · router", tips)] == list(out)
    assert tips.count(", routed · ") == sum(record.router_decision for record in expected)
    assert b"bytes: 12\npasses: 12" in re.sub(rb"(?m)^(bytes/s|time).*\n", b"", err)


def test_stops(trained, capsysbinary):
    options = ["run", str(trained), "run", "--seed", "1", "--max-bytes", "40", "--ignore-end"]
    options += ["--output", "raw", "--prompt", "a"]
    assert cli.main(options) == 0
    whole = capsysbinary.readouterr().out
    stop = whole[20:24]
    assert cli.main([*options, "--stop", "absent", "--stop", os.fsdecode(stop)]) == 0
    assert capsysbinary.readouterr().out == whole[: whole.index(stop)]
    assert cli.main([*options, "--stop", ""]) == 2
    assert b"stop is empty" in capsysbinary.readouterr().err


def test_the_newest_run_is_the_default(trained, capsys):
    options = ["--seed", "1", "--max-bytes", "3", "--prompt", "a"]
    assert cli.main(["run", str(trained), "run", *options]) == 0
    named = capsys.readouterr()
    assert cli.main(["run", str(trained), *options]) == 0
    found = capsys.readouterr()
    assert found.out == named.out
    assert found.err == f"{trained}, run run\n" + named.err
    assert cli.main(["eval", str(trained), "--text", "a fox"]) == 0
    assert capsys.readouterr().err.startswith(f"{trained}, run run\n")


def test_a_long_prompt_shows_a_bar(trained, tmp_path, monkeypatch, capsys):
    """Until the prompt is read; then the prompt is printed."""
    monkeypatch.setattr("pico_tg.progress.FIRST_SECONDS", 0.0)
    monkeypatch.setattr("pico_tg.progress.LINE_SECONDS", 0.0)
    order = []
    monkeypatch.setattr(cli, "show_samples", lambda *_: order.append(capsys.readouterr().err))
    for size, shown in ((5000, True), (1000, False)):
        (tmp_path / "prompt").write_text("a" * size)
        arguments = ["--prompt-file", str(tmp_path / "prompt"), "--max-bytes", "1"]
        assert cli.main(["run", str(trained), "run", *arguments]) == 0
        said = re.findall(r"^reading the prompt: \S+/5.01k B ", order.pop(), re.MULTILINE)
        assert bool(said) == shown


@pytest.fixture
def written(monkeypatch):
    """`run` writes what is put in here as (byte, weight, drafted, sample); the prompt it had.

    An exception in here is raised, a function called.
    """

    class Written(list):
        prompt: bytes

        def generate(self, model, prompt, stats=None, **settings):
            stats, self.prompt = stats or Stats(), prompt
            for item in self:
                if isinstance(item, BaseException):
                    raise item
                if callable(item):
                    item()
                    continue
                byte, weight, drafted, sample = item
                stats.bytes += 1
                yield GeneratedByte(byte, weight, weight > 0.5, -1.0, drafted, sample)

        def add(self, data: bytes, weight: float = 0.1, drafted: bool = False, sample: int = 0):
            self.extend((byte, weight, drafted, sample) for byte in data)

    written = Written()
    monkeypatch.setattr(cli, "load", lambda *which: which)
    monkeypatch.setattr(cli, "generate", written.generate)
    return written


def run_it(*flags: str) -> int:
    return cli.main(["run", "models/small", "first", *flags])


def test_samples_are_separated(written, capsys):
    """Also one that ends within a character, and an empty one."""
    written.add(b"a\xc3", 0.9)
    written.add(b"b", sample=2)
    assert run_it("--show-router-decisions", "--num-samples", "3", "--prompt", "> ") == 0
    assert capsys.readouterr().out == (
        "--- sample 1 of 3 ---\n> _a_\ufffd\n"
        "--- sample 2 of 3 ---\n> \n--- sample 3 of 3 ---\n> b\n"
    )


@pytest.mark.parametrize("prompt", ["-Hello,", "--", "--html", "-", "\0", "--prompt=x"])
def test_prompts_that_begin_with_a_dash(prompt, written, monkeypatch, capsys):
    for flags in (["--prompt", prompt], [f"--prompt={prompt}"]):
        monkeypatch.setattr(sys, "stdin", stdin_of(b"-"))
        assert run_it(*flags) == 0
        assert written.prompt == prompt.encode()
    parser = build_parser(cli.COMMANDS)
    marked = mark_texts(["train", "m", "r", "--sample-prompt", "--resume", "--resume"], parser)
    args = parser.parse_args(marked)
    assert (args.sample_prompt, args.resume) == ("--resume", True)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_does_not_obey_names(is_terminal, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    path = str(tmp_path / "a\x1b[31mb")
    assert cli.main(["init", path, *FLAGS]) == 0
    found = capsys.readouterr()
    assert ("\x1b" in found.out) != is_terminal
    assert status(["init", path]) == 2
    assert "\x1b" not in error_line(capsys)
    assert status(["init", path + "c", "--router", "\x1b"]) == 2
    assert "\x1b" not in error_line(capsys)
    assert status(["init", path + "c", "\x1b"]) == 2
    assert "\x1b" not in error_line(capsys)


def test_results_alone_are_on_standard_output(trained, tmp_path):
    """Also with DEBUG, by which tinygrad prints to standard output, from its import on."""
    command = [sys.executable, "-m", "pico_tg"]
    environment = os.environ | {"DEBUG": "2", "CACHEDB": str(tmp_path / "empty.db")}
    options = {"capture_output": True, "check": True, "env": environment}
    info = subprocess.run([*command, "info", trained, "--json"], **options)
    assert json.loads(info.stdout)["model"] == TINY
    assert b"opened device" in info.stderr
    flags = ["--output", "raw", "--max-bytes", "5", "--ignore-end"]
    assert len(subprocess.run([*command, "run", trained, "run", *flags], **options).stdout) == 5


def test_the_command_line_in_a_thread(model, text, capsys):
    """It catches no signals, and leaves standard output to the main thread."""
    command = ["train", str(model), "run", str(text), *SHORT]
    ended = []
    thread = threading.Thread(target=lambda: ended.append(cli.main(command)))
    thread.start()
    while thread.is_alive():
        assert sys.stdout is not sys.stderr
        thread.join(0.2)
    assert ended == [0]
    assert (model / "run" / "00000003.safetensors").exists()
    assert "sample" not in capsys.readouterr().err  # --sample-prompt ''


def stdin_of(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data))


def test_prompts_are_bytes(written, tmp_path, monkeypatch, capsys):
    data = b"\xff\xfe caf\xc3\xa9\r\n"
    (tmp_path / "prompt").write_bytes(data)
    written.add(b"x")
    monkeypatch.setattr(sys, "stdin", stdin_of(data))
    for flags in (
        ["--prompt", os.fsdecode(data)],
        ["--prompt", "-"],
        ["--prompt-file", str(tmp_path / "prompt")],
    ):
        assert run_it(*flags) == 0
        assert written.prompt == data
        out, err = capsys.readouterr()
        assert out == "\ufffd\ufffd café\r\nx\n"
        # a file of another encoding is likely a mistake
        said = "is read byte by byte: byte 0xff is not valid UTF-8; convert the file to UTF-8\n"
        assert (said in err) == (flags[1] != os.fsdecode(data))


@pytest.mark.parametrize("stdin", [stdin_of(b""), None], ids=["empty", "closed"])
def test_no_prompt_on_stdin(stdin, written, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run_it("--prompt", "-") == 2
    assert "standard input is empty; leave --prompt out" in error_line(capsys)


def test_raw_output(written, capsysbinary):
    """The bytes of the model and nothing else."""
    data = bytes(range(256))
    written.add(data)
    assert run_it("--output", "raw", "--prompt", "before") == 0
    assert capsysbinary.readouterr().out == data


def test_output_streams(written, monkeypatch):
    """Each byte is through before the next one is asked for, and the prompt before the first."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(out)))
    seen = []
    for part in (b"a", b"\xc3", b"\xa9"):
        written.append(lambda: seen.append(out.getvalue()))
        written.add(part)
    written.append(lambda: seen.append(out.getvalue()))
    assert run_it("--prompt", "The ") == 0
    assert seen == [b"The ", b"The a", b"The a", "The aé".encode()]
    seen.clear()
    out.truncate(0)
    out.seek(0)
    assert run_it("--output", "raw") == 0
    assert seen == [b"", b"a", b"a\xc3", b"a\xc3\xa9"]


def test_html(written, tmp_path, capsys):
    written.add(b"a<b", 0.9, drafted=True)
    (tmp_path / "link.html").symlink_to("page.html")
    flags = ["--prompt", "The ", "--seed", "3", "--top-p", "0.9", "--num-samples", "2"]
    assert run_it(*flags, "--html", str(tmp_path / "link.html")) == 0
    page = (tmp_path / "page.html").read_text()
    assert (tmp_path / "link.html").is_symlink()
    assert "<h1>small, run first</h1>" in page
    assert "<dt>seed</dt><dd>3</dd>" in page
    assert "<dt>top-p</dt><dd>0.9</dd>" in page
    assert "top-k" not in page
    assert '<span class="prompt">The </span>' in page
    assert page.count("data-tip=") == 3
    assert "Sample 2 of 2 <small>0 bytes" in page
    assert "a<b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "expected"), [(KeyboardInterrupt(), 130), (PicoError("broken"), 2)]
)
def test_an_interrupted_sample_is_kept(error, expected, written, tmp_path, capsys):
    """An interrupt ends the line, and page and figures are written."""
    written.add(b"ab")
    written.append(error)
    assert run_it("--html", str(tmp_path / "page.html"), "--stats") == expected
    out, err = capsys.readouterr()
    assert out == "ab\n"
    assert "bytes: 2\n" in err
    assert (tmp_path / "page.html").read_text().count("data-tip=") == 2
    written[:] = [error]  # before the first byte: the page of last time stays
    assert run_it("--html", str(tmp_path / "page.html")) == expected
    assert (tmp_path / "page.html").read_text().count("data-tip=") == 2
    written.clear()  # but an empty sample is one
    assert run_it("--html", str(tmp_path / "page.html")) == 0
    assert "0 bytes" in (tmp_path / "page.html").read_text()


# ----------------------------------------------------------------------------- names and streams


def test_the_model_of_the_current_folder_has_a_name(weights, written, monkeypatch):
    monkeypatch.chdir(weights)
    assert cli.main(["run", ".", "run", "--html", "page.html"]) == 0
    assert "<title>model, run run</title>" in Path("page.html").read_text()


def test_names_that_are_not_utf8(trained, measured, written, tmp_path, monkeypatch, capsys):
    """Pages, tables and JSON are valid UTF-8 whatever the bytes of a path are."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe8le")
    run, data = f"{path}/r\udcfcn", f"{path}/t\udce9xt.txt"
    os.makedirs(run)
    helpers.TINY.to_json(f"{path}/model.json")
    for file in (trained / "run").iterdir():
        Path(run, file.name).write_bytes(file.read_bytes())
    Path(data).write_text(FOX)
    written.add(b"a")
    page = tmp_path / "page.html"
    monkeypatch.setattr(cli, "evaluate", lambda *_, **__: measured)
    for arguments in (
        ["run", path, "r\udcfcn", "--html", str(page)],
        ["eval", path, "r\udcfcn", data, "--html", str(page)],
    ):
        assert cli.main(arguments) == 0, arguments
        assert "r\ufffdn" in page.read_text("utf-8")
    chart = tmp_path / "chart.svg"
    assert cli.main(["plot", path, "r\udcfcn", "--output", str(chart)]) == 0
    assert "r\ufffdn" in chart.read_text("utf-8")
    assert cli.main(["plot", path, "r\udcfcn"]) == 0
    capsys.readouterr()
    for arguments in (
        ["eval", path, "r\udcfcn", data, "--json"],
        ["info", path, "r\udcfcn", "--json"],
    ):
        assert cli.main(arguments) == 0
        out = capsys.readouterr().out
        assert out.isascii()
        json.loads(out)
    assert cli.main(["info", path, "r\udcfcn"]) == 0
    assert cli.main(["eval", path, "r\udcfcn", data]) == 0


class NotebookStream(io.TextIOBase):
    """As a notebook's kernel replaces standard output: text only, no buffer, no reconfigure."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)


def test_main_in_a_notebook(written, monkeypatch):
    written.add("é\n".encode())
    out, err, text = NotebookStream(), NotebookStream(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert run_it("--prompt", "a") == 0
        assert run_it("--output", "raw") == 2
    assert out.text == "aé\n\n"
    assert "--output raw cannot write to this standard output" in err.text
    monkeypatch.setattr(sys, "stdin", io.StringIO("b"))
    with contextlib.redirect_stdout(text):
        assert run_it("--prompt", "-") == 0
    assert text.getvalue() == "bé\n\n"


def test_the_flags_of_train_are_grouped(capsys):
    """Under "options" there is only --help; a setting is in the group that fits it."""
    assert status(["train", "--help"]) == 0
    shown = re.split(r"^(\S.*):$", capsys.readouterr().out, flags=re.MULTILINE)
    groups = dict(zip(shown[1::2], shown[2::2], strict=True))
    assert re.findall(r"^  (-\S+)", groups["options"], re.MULTILINE) == ["-h,"]
    for flag, group in (
        ("--dataset-revision", "data"), ("--from", "start"), ("--max-minutes", "length"),
        ("--batch-size", "batch and rate"), ("--keep-best", "validations and checkpoints"),
        ("--precision", "advanced"), ("--seed", "advanced"),
    ):  # fmt: skip
        assert f"\n  {flag}" in groups[group]


@pytest.mark.slow
@pytest.mark.parametrize("output", ["text", "raw"])
def test_broken_pipe_is_quiet(output, trained):
    """`run … | head -c 5` ends without a complaint."""
    arguments = ["run", str(trained), "run", "--max-bytes", "500", "--output", output]
    process = start(*arguments, "--ignore-end", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.read(process.stdout.fileno(), 3)
    process.stdout.close()
    with process.stderr as stream:
        err = stream.read().decode()
    assert process.wait(timeout=600) == 0, err
    assert "Traceback" not in err
    assert "Broken" not in err


@pytest.mark.slow
def test_ctrl_c_is_quiet(trained, tmp_path):
    arguments = ["run", str(trained), "run", "--max-bytes", "100000", "--ignore-end"]
    process = start(
        *arguments, "--html", str(tmp_path / "page.html"), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    out = os.read(process.stdout.fileno(), 3)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert (out + rest).endswith(b"\n")
    assert [line.split()[0] for line in err.splitlines()] == [b"backend", b"wrote"], err
    assert "data-tip=" in (tmp_path / "page.html").read_text()


ABSENT = "ModuleNotFoundError('No module named tinygrad')"  # the environment is not activated
INSTALL = (
    b"pico_tg: error: No module named tinygrad; activate the environment "
    b"(.venv/bin/activate), or: pip install -e '.[cpu]'\n"
)


@pytest.mark.parametrize(
    ("program", "imported", "error", "expected"),
    [
        (["-m", "pico_tg"], "tinygrad", "KeyboardInterrupt", (130, b"", b"")),
        (["-m", "pico_tg"], "argparse", "KeyboardInterrupt", (130, b"", b"")),  # by cli.py alone
        (["pico_tg"], "tinygrad", "KeyboardInterrupt", (130, b"", b"")),
        (["own.py"], "tinygrad", "KeyboardInterrupt", (0, b"caught KeyboardInterrupt\n", b"")),
        (["-m", "pico_tg"], "tinygrad", ABSENT, (2, b"", INSTALL)),
        (["pico_tg"], "tinygrad", ABSENT, (2, b"", INSTALL)),
        (["own.py"], "tinygrad", ABSENT, (0, b"caught ModuleNotFoundError\n", b"")),
    ],
)
def test_imports_that_fail(program, imported, error, expected, tmp_path):
    """The command line ends without a traceback; a script may catch the error.

    Ctrl-C is quiet, with status 130; a missing module is one line that says how to install it.
    """
    (tmp_path / "pico_tg").write_text("from pico_tg.__main__ import main\nmain()\n")
    own = "except BaseException as error:\n    print('caught', type(error).__name__)\n"
    (tmp_path / "own.py").write_text(f"try:\n    import pico_tg\n{own}")
    (tmp_path / f"{imported}.py").write_text(f"raise {error}\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{helpers.TESTS.parent}"}
    done = subprocess.run(
        [sys.executable, *program], cwd=tmp_path, env=env, capture_output=True, timeout=100
    )
    assert (done.returncode, done.stdout, done.stderr) == expected


def test_an_ignored_interrupt_is_repeated(monkeypatch, capsys):
    """Ctrl-C in a `__del__`, or in a function that C calls."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "unraisablehook", repeat_interrupt)
    called = ctypes.CFUNCTYPE(None)(interrupted)
    deleted = type("Deleted", (), {"__del__": interrupted})

    def compute(ignore):
        ignore()
        end = time.monotonic() + 10
        while time.monotonic() < end:  # unlike `sleep`, which would end before Ctrl-C is handled
            pass

    for ignore in (called, deleted):
        with pytest.raises(KeyboardInterrupt):
            compute(ignore)

    class HalfMade:
        def __del__(self):
            print(self.attribute)

    class Wrong:
        def __del__(self):
            print(1 / 0)

    HalfMade()
    assert capsys.readouterr().err == ""
    Wrong()
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "expected"), [(">&-", 0), (">&- 2>&-", 0), ("> /dev/full", 2)]
)
def test_output_that_goes_nowhere(redirection, expected, trained):
    """Closed streams are like /dev/null; a full disk is an error of one line."""
    if "/dev/full" in redirection and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    command = f'"$0" -m pico_tg run "$1" run --max-bytes 3 {redirection}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, str(trained)], capture_output=True, text=True
    )
    assert done.returncode == expected, done.stderr
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if not line.startswith("backend")]
    assert len(errors) == (expected == 2), done.stderr


@pytest.mark.slow
def test_a_better_checkpoint_is_named(model, text, capsys, monkeypatch):
    """Where an earlier validation was better than the last, as when a text is learned by heart."""
    monkeypatch.setattr(cli, "best_validations", lambda run: [2, 4])
    options = ["--max-steps", "4", "--validation-interval", "2", "--checkpoint-interval", "2"]
    assert status(["train", str(model), "r", str(text), *SHORT, *options]) == 0
    assert "step 2 predicted the held-out text better; --checkpoint best" in capsys.readouterr().err
