"""Run the commands and the script of both READMEs, and check the files and flags they name."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, WINDOWS, flags

from pico_tg import Pico, save_weights
from pico_tg.safetensors import read_safetensors
from pico_tg.tools import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
CODE = (ROOT / "pico_tg" / "README.md").read_text("utf-8")
STUDIES = (ROOT / "examples" / "studies" / "README.md").read_text("utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return [block.strip() for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def command_of(script: str) -> str:
    """The first command of the studies' README that runs this script."""
    lines = [line for block in blocks("bash", STUDIES) for line in block.splitlines()]
    return next(line for line in lines if f"examples/studies/{script}" in line)


def run(command: str, folder: Path) -> str:
    """Run one command of a README in `folder`, with this interpreter as `python`."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    python = bin_folder / "python"
    if not python.exists():
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
    env = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    command = command.replace("python examples/", f"python {ROOT}/examples/")
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def test_set_up_is_two_commands():
    setup, *_, tests = blocks("bash")
    assert len(setup.splitlines()) == 2
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip install -q -e '.[cpu,dev]'" in ci
    assert "pip install -q -e '.[cpu]'" in setup
    assert tests == "pip install -q -e '.[dev]' && python -m pytest"
    # .ci/run adds the tests that the default run deselects
    assert re.search(r"^python -m pytest -q.* -m ''$", ci, re.MULTILINE)


@pytest.mark.slow
def test_quickstart(tmp_path):
    """Three steps of its 500. What a trained model writes is tested with the one that is here."""
    assert "DEV=METAL python examples/quickstart.py" in README
    script = (ROOT / "examples" / "quickstart.py").read_text()
    assert script.count("=500") == 2
    (tmp_path / "quickstart.py").write_text(script.replace("=500", "=3"))
    out = run("python quickstart.py 2>&1", tmp_path)
    assert 1 <= out.count("training: ") < 6  # in a log, not a line for each change
    assert "The class statement" in out
    assert re.search(r"step 3: \d\.\d\d bits per byte", out)


@pytest.mark.slow
def test_the_model_that_comes_with_the_package(tmp_path):
    """It is small, writes English words, and predicts unseen prose in less than 3 bits per byte."""
    (weights,) = (ROOT / "pico_tg" / "stories" / "first").iterdir()
    assert weights.stat().st_size <= 2_000_000
    assert {a.dtype for a in read_safetensors(weights)[0].values()} == {np.dtype(np.float16)}
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    setup, _, _, see, _ = blocks("bash")
    sample = run(setup.splitlines()[1], tmp_path)
    assert sample.startswith("Once upon a time")
    assert len(re.findall(r"\b(?:the|and|of|to|a|he|she|was|his|her|in|that)\b", sample)) > 5
    known = {*re.findall(r"[a-z]+", (ROOT / "examples" / "passage.txt").read_text().lower())}
    written = re.findall(r"[a-z]+", sample.lower())
    assert sum(word in known for word in written) > len(written) / 3, sample
    marked, page = see.splitlines()
    assert "upon_ a_ time_" in run(marked, tmp_path)
    assert float(re.search(r"([\d.]+) bits per byte", run(page, tmp_path))[1]) < 1.5
    assert "Once" in re.sub(r"<[^>]*>", "", (tmp_path / "passage.html").read_text())


@pytest.mark.slow
def test_command_line_of_the_readme(tmp_path):
    """The quick tour, with a tiny model, few steps and another text."""
    init, train, sample, plot = blocks("bash")[1].splitlines()
    assert init.endswith(" models/small")  # no other flag
    assert train.endswith(" models/small first tinyshakespeare.txt --max-minutes 5")
    (tmp_path / "tinyshakespeare.txt").write_text("To be, or not to be: that is the question." * 99)
    run(f"{init} {' '.join(flags(vars(TINY)))}", tmp_path)
    run(f"{train} {' '.join(flags(WINDOWS))} --max-steps 3", tmp_path)
    assert (tmp_path / run(plot, tmp_path).strip()).read_text().startswith("<svg")
    assert run(sample + " --max-bytes 20", tmp_path).startswith("ROMEO:")


@pytest.mark.slow
def test_fine_tuning(tmp_path):
    """The command, for two steps of small windows."""
    (tmp_path / "my.txt").write_text("Once there was a dog who could sing. He sang all day." * 99)
    run(f"{blocks('bash')[2]} --max-steps 2 --context-len 64 --batch-size 2", tmp_path)
    assert run("python -m pico_tg run models/tuned --max-bytes 9 --prompt A", tmp_path)[0] == "A"


def test_flags_in_the_table_exist(capsys):
    rows = re.findall(r"^\| `(\w+) ?[^`]*` \|.*\| (.*) \|$", README, re.MULTILINE)
    assert {name for name, _ in rows} == cli.COMMANDS.keys()
    for name, cell in rows:
        with pytest.raises(SystemExit, match="0"):
            cli.main([name, "--help"])
        described = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        assert set(re.findall(r"--[\w-]+", cell)) <= described, name


@pytest.mark.slow
def test_script_of_the_readme(tmp_path):
    """As it is, but for the length of training."""
    (script,) = blocks("python")
    assert script.count("max_minutes=5") == 1
    short = "max_steps=2, context_len=64, batch_size=2"
    (tmp_path / "script.py").write_text(script.replace("max_minutes=5", short))
    (tmp_path / "tinyshakespeare.txt").write_text("To be, or not to be: that is the question." * 99)
    said, *scores, first, second = run("python script.py", tmp_path).splitlines()
    assert re.match(r" \w+ ", said)
    right, wrong = (float(line.split(" bits: ")[0]) for line in scores)
    assert right < wrong
    assert (first[:4], second[:4]) == ("1 8.", "2 8.")
    assert run("python -m pico_tg run models/mine --max-bytes 9 --prompt A", tmp_path)[0] == "A"


@pytest.mark.slow
def test_benchmarks_of_the_readme(tmp_path):
    """The benchmarks, with small sizes."""
    sizes = " ".join(flags(vars(TINY)))
    lines = [line for block in blocks("bash", STUDIES) for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("python -m pico_tg bench")]
    assert len(commands) == 2
    for command in commands:
        batch = " --batch-size 2" if "bench train" in command else ""
        out = run(f"{command} {sizes} --context-len 40 --repeats 1{batch}", tmp_path)
        assert "since the start of the process" in out


@pytest.mark.slow
def test_comparison_of_optimizers(tmp_path):
    """The study, with a tiny model, 2 steps and one learning rate each."""
    TINY.to_json(tmp_path / "model.json")
    command = command_of("compare_optimizers.py") + " --model model.json"
    out = run(f"{command} --steps 2 --rates 1 --svg {tmp_path}/optimizers.svg", tmp_path)
    assert len(re.findall(r"^\| (?:adamw|soap) \| [\d.]+ \| [\d.]+ \|$", out, re.MULTILINE)) == 2
    assert "AdamW ends at" in out
    assert (tmp_path / "optimizers.svg").read_text().startswith("<svg")


@pytest.mark.slow
def test_comparison_of_routers(tmp_path):
    """The study, with one router, small sizes and 2 steps; stored results are not trained again."""
    (tmp_path / "tiny").mkdir()
    TINY.to_json(tmp_path / "tiny" / "model.json")
    files = f"--results {tmp_path}/r.jsonl --svg {tmp_path}/r.svg"
    command = command_of("compare_routers.py") + " --routers none --steps 2 --seeds 0 "
    command += "--sizes tiny/model.json --sample-bytes 9 --evaluation-bytes 600 " + files
    out = run(command, tmp_path)
    row = r"^\| tiny \| (.+?) \| 1 \| (\d+)( \| [\d.-]+){11} \|$"
    ((name, steps, _),) = re.findall(row, out, re.MULTILINE)
    assert name == "none"
    assert int(steps) >= 2
    assert (tmp_path / "r.svg").read_text().startswith("<svg")
    results = (tmp_path / "r.jsonl").read_text()
    assert len(results.splitlines()) == 2  # one of training, one of decoding speed
    table = out[out.index("\n| size") :]
    assert run(command, tmp_path).endswith(table)
    assert (tmp_path / "r.jsonl").read_text() == results
    # without the result and the last checkpoint, the training is continued
    run_dir = tmp_path / "r" / "tiny-none" / f"{steps}-steps-seed-0"
    (tmp_path / "r.jsonl").unlink()
    (run_dir / f"{int(steps):08}.safetensors").unlink()
    run(command, tmp_path)
    before, after = (
        json.loads(text.splitlines()[0]) | {"minutes": 0, "commit": ""}  # these may change
        for text in (results, (tmp_path / "r.jsonl").read_text())
    )
    assert after == before


def test_stories(tmp_path):
    """The corpus has no license, headings, verse or footnotes; whole books are held out."""
    script = (ROOT / "examples" / "studies" / "make_stories.py").read_text()
    novels = re.findall(r"\w+_\w+_(?:18|19)\d\d", script.split("NOVELS = [")[1].split("]")[0])
    assert len(novels) == 21
    sentence = "\u201cIt is _here_,\u201d said\r\nthe caf\u00e9\u2019s cat.[1]\r\n\r\n"
    verse = "  One line,\r\n  another line.\r\n\r\n"
    license = "*** END OF THE PROJECT GUTENBERG EBOOK A ***\r\n\r\nA license.\r\n"
    book = "A header.\r\n*** START OF THE PROJECT GUTENBERG EBOOK A ***\r\n\r\nTHE CAT\r\n\r\n"
    for name in (*novels, "48", "80", "82", "89"):
        folder = tmp_path / ("novels" if name in novels else "tales")
        folder.mkdir(exist_ok=True)
        text = book + f"Book {name.replace('_', ' ')}.\r\n\r\n" + verse + sentence * 3 + license
        (folder / f"{name}.txt").write_text(text, "utf-8-sig", newline="")
    run("python examples/studies/make_stories.py tales novels stories", tmp_path)
    found = {
        split: (tmp_path / "stories" / f"{split}.txt").read_text().split("<|endoftext|>")
        for split in ("train", "valid")
    }
    kept = '"It is here," said the cafe\'s cat.\n' * 3
    assert found["train"] == ["Book 48.\n" + kept] + [
        f"Book {name.replace('_', ' ')}.\n{kept}"
        for name in novels
        if name not in script.split("HELD_OUT =")[1]
    ]
    assert found["valid"][:2] == [f"Book {name}.\n{kept}" for name in ("82", "89")]
    assert len(found["valid"]) == 4


@pytest.mark.slow
def test_comparison_of_settings(tmp_path):
    """The study, with one rule, one data set and a step of a tiny model."""
    command = command_of("compare_settings.py").replace(" tinyshakespeare.txt", "")
    TINY.to_json(tmp_path / "model.json")
    command = command.replace("models/sample/model.json", "model.json")
    command += " --flops 1 --rules 1 --evaluation-bytes 600 --results s.jsonl"
    out = run(command, tmp_path)
    assert re.search(r"^\| rate 0.001, .* \| 1 \| [\d.]+ \|$", out, re.MULTILINE)
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 1
    assert run(command, tmp_path) in out  # the stored result is not measured again


@pytest.mark.slow
def test_soap_elsewhere(tmp_path):
    out = run("python examples/soap_elsewhere.py", tmp_path)
    errors = [float(error) for error in re.findall(r"error ([\d.]+)", out)]
    assert len(errors) == 4
    assert errors[-1] < errors[0] / 50


@pytest.fixture
def trained(tmp_path) -> Path:
    """A folder that holds `model` with the run `a`, of random weights."""
    (tmp_path / "model" / "a").mkdir(parents=True)
    TINY.to_json(tmp_path / "model" / "model.json")
    save_weights(Pico(TINY), tmp_path / "model" / "a" / "00000001.safetensors")
    return tmp_path


@pytest.mark.slow
def test_sample(trained):
    """Random weights write arbitrary bytes, which are no valid UTF-8."""
    out = run("python examples/sample.py model", trained)
    assert out.startswith("The ")
    assert len(out) > 50


@pytest.mark.slow
def test_an_error_of_sample(trained):
    command = [sys.executable, ROOT / "examples" / "sample.py", "model", "b"]
    done = subprocess.run(command, cwd=trained, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "no run b" in line


@pytest.mark.parametrize(
    ("text", "folder"),
    [(README, ROOT), (STUDIES, ROOT / "examples/studies"), (CODE, ROOT / "pico_tg")],
)
def test_files_and_links_exist(text, folder):
    for name in re.findall(r"`([\w/]+\.py|[a-z_/]+/)`", text):
        assert any((base / name).exists() for base in (ROOT, ROOT / "pico_tg", folder)), name
    for link, heading in re.findall(r"\]\(([^)#]*)#?([\w-]*)\)", text):
        if link.startswith("https://"):
            continue
        assert (folder / link).exists(), link
        target = (folder / link).read_text() if link.endswith(".md") else text
        titles = [re.sub(r"[^\w -]", "", line) for line in re.findall(r"^#+ (.*)", target, re.M)]
        assert not heading or heading in [title.lower().replace(" ", "-") for title in titles]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.svg")), ids=lambda p: p.name)
def test_pictures_are_svg(path):
    """They are well-formed, and load nothing from elsewhere."""
    root = ET.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "href" not in path.read_text()
