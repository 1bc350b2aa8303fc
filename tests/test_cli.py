"""The command line end to end, and every mistake: one line, status 2, nothing written."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import numpy as np
import pytest

from pico_tg.checkpoint import load
from pico_tg.config import Config
from pico_tg.evaluation import evaluate
from pico_tg.files import PicoError
from pico_tg.generation import GeneratedByte, generate
from pico_tg.model import Pico
from pico_tg.safetensors import read_safetensors, write_safetensors
from pico_tg.tools import cli

TINY = helpers.TINY.to_dict()
FLAGS = helpers.flags(TINY)
SHORT = helpers.flags(helpers.WINDOWS | {"max_steps": 3, "warmup_steps": 1})


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 50)
    return path


@pytest.fixture
def model(tmp_path):
    assert cli.main(["init", str(tmp_path / "model"), *FLAGS]) == 0
    return tmp_path / "model"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PICO_CACHE", str(folder / "cache"))
        (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 50)
        assert cli.main(["init", str(folder / "model"), *FLAGS]) == 0
        assert (
            cli.main(["train", str(folder / "model"), "run", str(folder / "text.txt"), *SHORT]) == 0
        )
    return folder / "model"


def test_init_describes_the_model(tmp_path, capsys):
    assert cli.main(["init", str(tmp_path / "a" / "b"), "--dim", "372"]) == 0
    written = json.loads((tmp_path / "a" / "b" / "model.json").read_text())
    assert written["dim"] == 372
    assert set(written) == set(TINY)
    config = Config.preset("xs", dim=372)
    assert f"{config.parameters:,} parameters" in capsys.readouterr().out


def test_parameter_count_is_the_model_s():
    from tinygrad import nn

    config = Config(**TINY)
    assert config.parameters == sum(p.numel() for p in nn.state.get_parameters(Pico(config)))


def test_train_writes_a_run(trained):
    run = trained / "run"
    assert sorted(p.name for p in run.glob("*.safetensors") if ".state" not in p.name) == [
        "00000003.safetensors"
    ]
    description = json.loads((run / "training.json").read_text())
    assert description["settings"]["max_steps"] == 3
    assert description["checkpoints"] == ["00000003.safetensors"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["bits_per_byte"] == pytest.approx(8, abs=1)
    assert lines[-1]["validation_bits_per_byte"] > 0


def test_checkpoint_activations_change_no_loss(trained, text):
    """The same weights and windows as those of `trained`."""
    assert (
        cli.main(["train", str(trained), "again", str(text), *SHORT, "--checkpoint-activations"])
        == 0
    )
    again = trained / "again"
    assert json.loads((again / "training.json").read_text())["settings"]["checkpoint_activations"]
    losses = []
    for run in (trained / "run", again):
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines])
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=1e-6)
    # SOAP's first update also moves where the gradient is but rounding
    assert losses[0][2] == pytest.approx(losses[1][2], rel=1e-2)
    shutil.rmtree(again)


def test_base_weights(trained, text):
    """Training may start from another run's weights."""
    weights = trained / "run" / "00000003.safetensors"
    arguments = ["train", str(trained), "more", str(text), *SHORT, "--learning-rate", "0"]
    assert cli.main([*arguments, "--base-weights", str(weights)]) == 0
    before, _ = read_safetensors(weights)
    after, _ = read_safetensors(trained / "more" / "00000003.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    description = json.loads((trained / "more" / "training.json").read_text())
    assert description["base_weights"] == str(weights)
    more = ["train", str(trained), "more", "--resume", "--max-steps", "3"]
    assert cli.main(more) == 0
    assert json.loads((trained / "more" / "training.json").read_text()) == description
    shutil.rmtree(trained / "more")


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_broken_base_weights(damage, model, trained, text, tmp_path, capsys):
    path = tmp_path / "base.safetensors"
    if damage == "truncated":
        path.write_bytes((trained / "run" / "00000003.safetensors").read_bytes()[:-4])
    else:
        write_safetensors(path, {"other.weight": np.zeros((2, 2), np.float32)})
    arguments = ["train", str(model), "r", str(text), *SHORT, "--base-weights", str(path)]
    assert status(arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert "base.safetensors" in line
    assert ("sound" if damage == "truncated" else "does not fit the model") in line
    assert not (model / "r").exists()


def test_a_column_that_is_not_there(model, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"story": "once", "title": "a"}\n')
    flags = ["--dataset-column-name", "plot"]
    assert status(["train", str(model), "r", str(path), *SHORT, *flags]) == 2
    line = one_line(capsys)
    assert all(name in line for name in ("plot", "story", "title"))
    assert not (model / "r").exists()


def test_eval(trained, tmp_path, monkeypatch, capsys):
    """Tables, JSON and a page, which say the same of one evaluation; and what of the data it is."""
    calls, measured = [], []

    def once(model, data, **options):
        whole = options["split"] == "all"
        calls.append((data.bytes.tobytes() if whole else data.spec.dataset, options))
        measured.append(measured[0] if measured else evaluate(model, data, **options))
        return measured[0]

    monkeypatch.setattr(cli, "evaluate", once)
    page = tmp_path / "page.html"
    arguments = ["eval", str(trained), "run"]
    assert cli.main([*arguments, "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "model, run run, step 3: validation data of" in out
    own = str(trained.parent / "text.txt")
    default = {
        "split": "validation", "context_len": 40, "stride": None, "batch_size": None,
        "max_bytes": None, "precision": "auto", "passage": 4000, "progress": True,
    }  # fmt: skip
    assert calls == [(own, default)]
    other = tmp_path / "other.txt"
    other.write_text("Another text. " * 20)
    flags = [str(other), "--json", "--checkpoint", "3", "--split", "train", "--stride", "9"]
    flags += ["--max-bytes", "70", "--context-len", "8", "--batch-size", "4"]
    assert cli.main([*arguments, *flags, "--precision", "fp32"]) == 0
    changed = {
        "split": "train", "context_len": 8, "stride": 9, "batch_size": 4, "max_bytes": 70,
        "precision": "fp32", "passage": 0,
    }  # fmt: skip
    assert calls[1] == (str(other), default | changed)
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["split"], found["data"]) == (3, "train", str(other))
    assert found["bytes"] == 112  # 5 % of 2,250
    assert found["context_len"] == found["stride"] == 40
    for name, value in (
        ("bits per byte", f"{found['bits_per_byte']:.4f}"),
        ("without the latent blocks", f"{found['bits_per_byte_without_latent']:.4f}"),
        ("router rate", f"{found['router_rate']:.1%}"),
        ("1 ahead", f"{found['head_accuracy'][0]:.1%}"),
        ("after whitespace", f"{found['places']['after_whitespace']['share_of_bytes']:.1%}"),
        ("router", f"{found['boundaries']['precision']:.3f}"),
    ):
        assert re.search(rf"^{name} +{re.escape(value)}", out, re.MULTILINE), name
    for flags, split in (
        ([str(other)], "all"),  # without validation data of its own
        ([str(other), "--dataset-validation-size", "0.1"], "validation"),
        ([own], "validation"),  # the run was trained on the rest
        ([own, "--split", "all"], "all"),
    ):
        assert cli.main([*arguments, *flags]) == 0
        part = "all" if split == "all" else "validation data"
        assert f"step 3: {part} of {flags[0]}" in capsys.readouterr().out
        assert calls[-1][1]["split"] == split
        if split == "all":
            text = Path(flags[0]).read_bytes()
            assert calls[-1][0] == b"<pico:seq>" + text + b"</pico:seq>"
    written = page.read_text()
    assert "<h2>Passage <small>112 bytes" in written
    assert f"<dd>{found['bits_per_byte']:.3f}</dd>" in written


BAD_EVAL = {
    "no run": (["nothing"], "train"),
    "no checkpoint": (["run", "--checkpoint", "77"], "3"),
    "no dataset": (["run", "nowhere.txt"], "nowhere.txt"),
    "empty": (["run", "empty.txt"], "empty.txt holds no text"),
    "flags without data": (["run", "--dataset-column-name", "a"], "DATASET"),
    "column": (["run", "rows.jsonl", "--dataset-column-name", "plot"], "story"),
    "split": (["run", "--split", "test"], "test"),
    "max bytes": (["run", "--max-bytes", "0"], "max_bytes"),
    "stride": (["run", "--stride", "0"], "stride"),
    "nothing to predict": (["run", "--max-bytes", "9"], "9 bytes"),
    "page in no folder": (["run", "--html", "no/where.html"], "no folder"),
}


@pytest.mark.parametrize(("flags", "named"), BAD_EVAL.values(), ids=BAD_EVAL)
def test_bad_eval(flags, named, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"story": "once"}\n' * 3)
    (tmp_path / "empty.txt").write_text("")
    monkeypatch.setattr(cli, "describe_backend", lambda: "backend")
    assert status(["eval", str(trained), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert named in lines[0]
    assert "Traceback" not in captured.err


def test_eval_of_weights_alone(model, trained, text, capsys):
    """A run that only has weights, from elsewhere say, needs a DATASET."""
    (model / "r").mkdir()
    weights = (trained / "run" / "00000003.safetensors").read_bytes()
    (model / "r" / "00000001.safetensors").write_bytes(weights)
    assert status(["eval", str(model), "r"]) == 2
    assert "give a DATASET" in one_line(capsys)


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
    for flags, named in ((["none"], "train"), (["../model"], "no name of a run")):
        assert status(["info", str(trained), *flags]) == 2
        assert named in one_line(capsys)
    assert status(["info", str(trained / "none")]) == 2
    assert "init" in one_line(capsys)


def one_line(capsys) -> str:
    """The one line on stderr that names the mistake, without what was said before it."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    # but for the bar of the cache, which is built before the data are known to be too short, say
    lines = [line for line in err.splitlines() if line.strip() and "caching" not in line]
    assert len(lines) == 1, err
    return lines[0]


def status(arguments: list[str]) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as done:  # argparse's own
        return done.code


BAD_INIT = {
    "dim < heads": (["--dim", "3"], "att_q_heads"),
    "heads no multiple": (["--att-q-heads", "5"], "multiple"),
    "capacity 0": (["--latent-capacity-factor", "0"], "latent_capacity_factor"),
    "capacity > 1": (["--latent-capacity-factor", "1.5"], "latent_capacity_factor"),
    "capacity nan": (["--latent-capacity-factor", "nan"], "latent_capacity_factor"),
    "no number": (["--dim", "many"], "--dim"),
    "zero": (["--next-tokens", "0"], "next_tokens"),
    "unknown flag": (["--depth", "3"], "--depth"),
    "unknown preset": (["--preset", "huge"], "huge"),
}


@pytest.mark.parametrize(("flags", "named"), BAD_INIT.values(), ids=BAD_INIT)
def test_bad_init(flags, named, tmp_path, capsys):
    assert status(["init", str(tmp_path / "m"), *FLAGS, *flags]) == 2
    assert named in one_line(capsys)
    assert not (tmp_path / "m").exists()


def test_init_refuses_an_existing_path(model, capsys):
    before = (model / "model.json").read_bytes()
    assert status(["init", str(model)]) == 2
    assert "exists" in one_line(capsys)
    assert (model / "model.json").read_bytes() == before


def broken_model(model: Path, content: str) -> None:
    (model / "model.json").write_text(content)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        (json.dumps(TINY | {"depth": 3}), "depth"),
        (json.dumps({k: v for k, v in TINY.items() if k != "dim"}), "dim"),
        (json.dumps(TINY | {"dim": "wide"}), "dim"),
    ],
)
@pytest.mark.parametrize("command", ["train", "run"])
def test_bad_model_json(command, content, named, model, text, capsys):
    (model / "model.json").write_text(content)
    extra = [str(text)] if command == "train" else []
    assert status([command, str(model), "r", *extra]) == 2
    assert named in one_line(capsys)
    assert not (model / "r").exists()


BAD_TRAIN = {
    "context too short": (["--context-len", "3"], "context_len"),
    "data shorter than one window": (["--context-len", "100000"], "window"),
    "batch size": (["--batch-size", "0"], "batch_size"),
    "learning rate": (["--learning-rate", "-1"], "learning_rate"),
    "learning rate nan": (["--learning-rate", "nan"], "learning_rate"),
    "no number": (["--max-steps", "x"], "--max-steps"),
    "missing weights": (["--base-weights", "nowhere.safetensors"], "nowhere.safetensors"),
    "split": (["--dataset-train-split", "nope"], "nope"),
    "validation size": (["--dataset-validation-size", "-0.5"], "validation"),
}


@pytest.mark.parametrize(("flags", "named"), BAD_TRAIN.values(), ids=BAD_TRAIN)
def test_bad_train(flags, named, model, text, capsys):
    assert status(["train", str(model), "r", str(text), *SHORT, *flags]) == 2
    assert named in one_line(capsys)
    assert not (model / "r").exists()


def bad_data(folder: Path, kind: str) -> Path:
    if kind == "empty":
        path = folder / "empty.txt"
        path.write_text("")
    elif kind == "column":
        path = folder / "rows.jsonl"
        path.write_text('{"story": "once", "title": "a"}\n')
    elif kind == "json":
        path = folder / "rows.jsonl"
        path.write_text('{"text": \n')
    elif kind == "parquet":
        path = folder / "rows.parquet"
        path.write_bytes(b"not parquet")
    else:
        path = folder / "missing.txt"
    return path


@pytest.mark.parametrize("kind", ["empty", "column", "json", "parquet", "missing"])
def test_bad_data(kind, model, tmp_path, capsys):
    path = bad_data(tmp_path, kind)
    assert status(["train", str(model), "r", str(path), *SHORT]) == 2
    line = one_line(capsys)
    assert path.name in line
    if kind == "column":
        assert "story" in line
        assert "title" in line
    assert not (model / "r").exists()


def test_train_without_a_model(tmp_path, text, capsys):
    assert status(["train", str(tmp_path / "none"), "r", str(text)]) == 2
    assert "init" in one_line(capsys)
    assert not (tmp_path / "none").exists()


def test_train_refuses_an_existing_run(trained, text, capsys):
    before = sorted((p.name, p.read_bytes()) for p in (trained / "run").iterdir())
    assert status(["train", str(trained), "run", str(text), *SHORT]) == 2
    assert "exists" in one_line(capsys)
    assert sorted((p.name, p.read_bytes()) for p in (trained / "run").iterdir()) == before


def test_run_without_a_run(model, capsys):
    assert status(["run", str(model), "nothing"]) == 2
    assert "train" in one_line(capsys)


def test_run_with_a_wrong_checkpoint(trained, capsys):
    assert status(["run", str(trained), "run", "--checkpoint", "77"]) == 2
    assert "3" in one_line(capsys)


BAD_RUN = {
    "temperature": (["--temperature", "-1"], "temperature"),
    "temperature nan": (["--temperature", "nan"], "temperature"),
    "max bytes": (["--max-bytes", "-1"], "max_bytes"),
    "top k": (["--top-k", "-1"], "top_k"),
    "top p 0": (["--top-p", "0"], "top_p"),
    "top p > 1": (["--top-p", "1.5"], "top_p"),
    "min p": (["--min-p", "2"], "min_p"),
    "seed": (["--seed", "-1"], "seed"),
    "no samples": (["--num-samples", "0"], "num_samples"),
    "no number": (["--top-k", "few"], "--top-k"),
    "nothing to continue": (["--raw-prompt"], "raw prompt"),
    "two prompts": (["--prompt", "a", "--prompt-file", "b"], "--prompt-file"),
    "empty prompt file": (["--prompt-file", os.devnull], os.devnull + " is empty; leave"),
    "no prompt file": (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
    "prompt file a folder": (["--prompt-file", "."], "cannot read"),
    "unknown output": (["--output", "pdf"], "pdf"),
    "raw in color": (["--output", "raw", "--color"], "--color"),
    "raw with marks": (["--output", "raw", "--show-router-decisions"], "--show-router"),
    "raw of several": (["--output", "raw", "--num-samples", "2"], "--num-samples"),
    "page in no folder": (["--html", "no/where.html"], "no folder"),
    "page over a folder": (["--html", "."], "not a file"),
    "page over a device": (["--html", os.devnull], "not a file"),
}


@pytest.mark.parametrize(("flags", "named"), BAD_RUN.values(), ids=BAD_RUN)
def test_bad_run(flags, named, trained, capsys):
    assert status(["run", str(trained), "run", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert named in line
    assert "error" in line


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_run_with_broken_weights(damage, model, trained, capsys):
    run = model / "r"
    run.mkdir()
    data = (trained / "run" / "00000003.safetensors").read_bytes()
    path = run / "00000003.safetensors"
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        write_safetensors(path, {"other.weight": np.zeros((2, 2), np.float32)})
    assert status(["run", str(model), "r"]) == 2
    assert "00000003.safetensors" in one_line(capsys)


def test_help_and_version(capsys):
    for arguments in (
        ["--help"],
        *([c, "--help"] for c in ("init", "train", "run", "eval", "info")),
    ):
        assert status(arguments) == 0
        assert "usage" in capsys.readouterr().out
    assert status(["--version"]) == 0
    assert "pico_tg 0" in capsys.readouterr().out


@pytest.fixture
def written(monkeypatch):
    """`run` writes what is put in here as (byte, weight, drafted, sample); the options it had."""

    class Written(list):
        options: dict

        def generate(self, model, prompt, stats, **options):
            self.options = {"model": model, "prompt": prompt} | options
            for item in self:
                if isinstance(item, BaseException):
                    raise item
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


def test_options_of_run(written, capsys):
    assert run_it() == 0
    default = written.options
    assert default == {
        "model": (Path("models/small"), "first", -1), "prompt": b"", "max_bytes": 1024,
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": None,
        "num_samples": 1, "speculative": True, "ignore_end": False, "raw_prompt": False,
        "latent": True,
    }  # fmt: skip
    for flags, changed in {
        "--checkpoint 5": {"model": (Path("models/small"), "first", 5)},
        "--prompt a": {"prompt": b"a"},
        "--max-bytes 7": {"max_bytes": 7},
        "--temperature 0.5": {"temperature": 0.5},
        "--top-k 3": {"top_k": 3},
        "--top-p 0.25": {"top_p": 0.25},
        "--min-p 0.125": {"min_p": 0.125},
        "--seed 4": {"seed": 4},
        "--num-samples 2": {"num_samples": 2},
        "--no-speculative": {"speculative": False},
        "--ignore-end": {"ignore_end": True},
        "--raw-prompt": {"raw_prompt": True},
        "--disable-latent": {"latent": False},
    }.items():
        assert run_it(*flags.split()) == 0
        assert written.options == default | changed
    capsys.readouterr()


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
        assert written.options["prompt"] == data
        assert capsys.readouterr().out == "\ufffd\ufffd café\r\nx\n"


@pytest.mark.parametrize("stdin", [stdin_of(b""), None], ids=["empty", "closed"])
def test_no_prompt_on_stdin(stdin, written, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run_it("--prompt", "-") == 2
    assert "standard input is empty; leave --prompt out" in one_line(capsys)


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

    def spying(model, prompt, **options):
        for byte in "aé".encode():
            seen.append(out.getvalue())
            yield GeneratedByte(byte, 0.1, False, -1.0)
        seen.append(out.getvalue())

    monkeypatch.setattr(cli, "generate", spying)
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
def test_what_there_is_is_kept(error, expected, written, tmp_path, monkeypatch, capsys):
    """An interrupt ends the line, leaves no color behind, and page and figures are written."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    written.add(b"ab")
    written.append(error)
    assert run_it("--html", str(tmp_path / "page.html"), "--stats", "--color") == expected
    out, err = capsys.readouterr()
    assert out == "ab\x1b[0m\n"
    assert "bytes: 2\n" in err
    assert (tmp_path / "page.html").read_text().count("data-tip=") == 2
    written[:] = [error]  # before the first byte: the page of last time stays
    assert run_it("--html", str(tmp_path / "page.html")) == expected
    assert (tmp_path / "page.html").read_text().count("data-tip=") == 2
    written.clear()  # but an empty sample is one
    assert run_it("--html", str(tmp_path / "page.html")) == 0
    assert "0 bytes" in (tmp_path / "page.html").read_text()


def test_run_for_real(trained, tmp_path, capsysbinary):
    """The command line's bytes are the library's; page and figures agree with them."""
    options = {"max_bytes": 12, "seed": 5, "top_k": 50, "ignore_end": True}
    expected = list(generate(load(trained, "run"), b"The \xff", **options))
    page = tmp_path / "page.html"
    arguments = ["--max-bytes", "12", "--seed", "5", "--top-k", "50", "--ignore-end", "--stats"]
    arguments += ["--prompt", os.fsdecode(b"The \xff"), "--html", str(page), "--output", "raw"]
    assert cli.main(["run", str(trained), "run", *arguments]) == 0
    out, err = capsysbinary.readouterr()
    assert out == bytes(record.byte for record in expected)
    tips = page.read_text()
    assert [int(b, 16) for b in re.findall(r" 0x(\w\w) · router", tips)] == list(out)
    assert tips.count(", routed · ") == sum(record.router_decision for record in expected)
    assert b"bytes: 12\n" in err


def start(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "pico_tg", *arguments], **options)


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


@pytest.mark.parametrize("module", ["pico_tg.model", "pico_tg.tools.cli"])
def test_ctrl_c_during_the_imports(module, tmp_path):
    """A finder of modules presses it when `module` is looked for."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder:\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    paths = [str(tmp_path), str(Path(cli.__file__).parent.parent)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-m", "pico_tg", "--version"], env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


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
    assert len(err.splitlines()) == 1, err  # the backend
    assert "data-tip=" in (tmp_path / "page.html").read_text()


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


RESUME = {
    "fresh weights": (["--resume", "--base-weights", "x"], "--base-weights"),
    "forced for nothing": (["--force"], "--resume"),
    "data options alone": (["--resume", "--dataset-train-split", "a"], "DATASET"),
    "another learning rate": (["--resume", "--learning-rate", "0.5"], "learning_rate was"),
}


@pytest.mark.parametrize(("flags", "named"), RESUME.values(), ids=RESUME)
def test_bad_resume(flags, named, trained, capsys):
    before = sorted((p.name, p.read_bytes()) for p in (trained / "run").iterdir())
    assert status(["train", str(trained), "run", *flags]) == 2
    assert named in one_line(capsys)
    assert sorted((p.name, p.read_bytes()) for p in (trained / "run").iterdir()) == before


def test_resume_of_a_complete_run(trained, capsys):
    assert cli.main(["train", str(trained), "run", "--resume"]) == 0
    assert "nothing left to train" in capsys.readouterr().err
    assert cli.main(["train", str(trained), "nothing", "--resume"]) == 2
    assert "no training run to resume" in capsys.readouterr().err
    assert not (trained / "nothing").exists()


def test_plot(trained, tmp_path, capsys):
    assert cli.main(["plot", str(trained), "run"]) == 0
    written = Path(capsys.readouterr().out.strip())
    assert written == trained / "run.svg"
    text = written.read_text()
    assert ">run</text>" in text
    assert "Learning rate" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # self-contained
    output = tmp_path / "two.svg"
    assert cli.main(["plot", str(trained), "run", "run", "--output", str(output)]) == 0
    assert output.exists()
    capsys.readouterr()
    # runs in folders of their own; a slash at the end comes with completion by the shell
    for name in ("a", "b"):
        (trained / "sub" / name).mkdir(parents=True)
        metrics = (trained / "run" / "metrics.jsonl").read_bytes()
        (trained / "sub" / name / "metrics.jsonl").write_bytes(metrics)
    assert cli.main(["plot", str(trained), "sub/a", "sub/b/"]) == 0
    assert Path(capsys.readouterr().out.strip()) == trained / "sub-a-sub-b.svg"
    assert ">sub/a</text>" in (trained / "sub-a-sub-b.svg").read_text()
    assert status(["plot", str(trained), "missing"]) == 2
    assert "metrics.jsonl" in one_line(capsys)
    assert status(["plot", str(tmp_path / "none"), "run"]) == 2
    assert "init" in one_line(capsys)


def test_tracker(trained, text, tmp_path, monkeypatch, capsys):
    """A package of that name gets every record; without one, how to install it is said."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    arguments = ["train", str(trained), "tracked", str(text), *SHORT, "--tracker", "wandb"]
    assert status(arguments) == 2
    assert "pip install wandb" in one_line(capsys)
    assert not (trained / "tracked").exists()

    (tmp_path / "wandb.py").write_text(
        "calls = []\n"
        "class Run:\n"
        "    id = 'x7'\n"
        "    def log(self, record, step): calls.append((step, record['loss']))\n"
        "    def finish(self): calls.append('finished')\n"
        "def init(**options): calls.append(options); return Run()\n"
    )
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main(arguments) == 0
    calls = sys.modules["wandb"].calls
    first, *logs = calls
    assert (first["project"], first["name"]) == ("pico_tg", "model/tracked")
    assert first["config"]["dim"] == TINY["dim"]
    assert first["config"]["max_steps"] == 3
    assert "id" not in first
    assert [step for step, _ in logs[:-1]] == [1, 2, 3]
    assert logs[-1] == "finished"

    # resumed, it is the same run there, which is also remembered while nothing is tracked
    calls.clear()
    again = ["train", str(trained), "tracked", "--resume"]
    assert cli.main(again) == 0
    assert cli.main([*again, "--tracker", "wandb"]) == 0
    first, last = calls
    assert (first["id"], first["resume"], last) == ("x7", "allow", "finished")
    monkeypatch.delitem(sys.modules, "wandb")
