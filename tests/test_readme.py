"""The README is the product's face: its commands are run, its script too."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TINY, flags

from pico_tg import Pico, save_weights

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(command: str, folder: Path) -> str:
    """Run one line of the README in `folder`, with this Python as `python`."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    python = bin_folder / "python"
    if not python.exists():
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
    env = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def test_set_up_is_two_commands():
    setup, tests = blocks("bash")[:2]
    assert len(setup.splitlines()) == len(tests.splitlines()) == 1
    # what .ci/run does is what the README says
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip install -q -e '.[cpu,dev]'" in ci
    assert "pip install -e '.[cpu,dev]'" in setup
    assert "python -m pytest" in ci
    assert tests.strip() == ".venv/bin/python -m pytest"


@pytest.mark.slow
def test_quickstart_writes_words(tmp_path):
    """Shortened by nothing: what the first command runs, and recognisable words come out."""
    assert "examples/quickstart.py" in blocks("bash")[0]
    out = run(f"python {ROOT / 'examples' / 'quickstart.py'}", tmp_path)
    words = re.findall(r"[a-z]+", out.split("seconds in all")[0].lower())
    from pydoc_data.topics import topics

    known = set(re.findall(r"[a-z]+", " ".join(topics.values()).lower()))
    real = [word for word in words if word in known]
    assert len(words) > 30
    assert len(real) / len(words) > 0.6, out


@pytest.mark.slow
def test_command_line_of_the_readme(tmp_path):
    """As written but for the number of steps, which would take minutes."""
    init, train, plot, sample = blocks("bash")[2].strip().splitlines()
    run(init, tmp_path)
    run(train + " --max-steps 3", tmp_path)
    assert (tmp_path / run(plot, tmp_path).strip()).read_text().startswith("<svg")
    out = run(sample + " --max-bytes 20", tmp_path)
    assert out.startswith("The import statement")


@pytest.mark.slow
def test_script_of_the_readme(tmp_path):
    script = blocks("python")[0].replace("max_steps=100", "max_steps=3")
    (tmp_path / "script.py").write_text(script)
    out = run("python script.py", tmp_path)
    assert re.match(r"1 [\d.]+\n2 [\d.]+\n3 [\d.]+\n", out)


@pytest.mark.slow
def test_benchmarks_of_the_readme(tmp_path):
    """As written but for sizes."""
    sizes = " ".join(flags(TINY.to_dict()))
    for command in blocks("bash")[3].strip().splitlines():
        batch = " --batch-size 2" if "bench train" in command else ""
        out = run(f"{command} {sizes} --context-len 40 --repeats 1{batch}", tmp_path)
        assert "from the start of the process" in out


@pytest.mark.slow
def test_comparison_of_optimizers(tmp_path):
    """As written but for fewer steps and learning rates, and where the picture goes."""
    command = blocks("bash")[4].strip().replace("examples/", f"{ROOT}/examples/")
    out = run(f"{command} --steps 2 --rates 1 --svg {tmp_path}/optimizers.svg", tmp_path)
    assert len(re.findall(r"^\| (?:adamw|soap) \| [\d.]+ \| [\d.]+ \|$", out, re.MULTILINE)) == 2
    assert "AdamW ends at" in out
    assert (tmp_path / "optimizers.svg").read_text().startswith("<svg")


@pytest.mark.slow
def test_comparison_of_routers(tmp_path):
    """As written but for one router, sizes and steps; what is there is not trained again."""
    command = blocks("bash")[5].strip().replace("examples/", f"{ROOT}/examples/")
    command = command.replace("--positions --next-tokens 1,2,4,8", "--routers none")
    sizes = "--dim 12 --latent-blocks 1 --sample-bytes 9 --evaluation-bytes 600"
    files = f"--results {tmp_path}/r.jsonl --svg {tmp_path}/r.svg"
    command += f" --steps 2 --seeds 0 {sizes} {files}"
    out = run(command, tmp_path)
    row = r"^\| (.+?) \| 1 \| (\d+) \| [\d.]+ \| [\d.]+ \| [\d.]+ \| \d+ \| [\d.]+ \|$"
    rows = re.findall(row, out, re.MULTILINE)
    assert [name for name, _ in rows] == ["none"]
    assert int(rows[0][1]) >= 2
    assert (tmp_path / "r.svg").read_text().startswith("<svg")
    results = (tmp_path / "r.jsonl").read_text()
    assert len(results.splitlines()) == 2  # what training gave, and the speed of decoding
    shutil.rmtree(tmp_path / "r")  # the weights
    assert run(command, tmp_path) == out
    assert (tmp_path / "r.jsonl").read_text() == results


def test_soap_elsewhere(tmp_path):
    out = run(f"python {ROOT / 'examples' / 'soap_elsewhere.py'}", tmp_path)
    errors = [float(error) for error in re.findall(r"error ([\d.]+)", out)]
    assert len(errors) == 4
    assert errors[-1] < errors[0] / 50


@pytest.mark.slow
def test_examples_that_write(tmp_path):
    """With a model of random weights, which write bytes of any kind."""
    (tmp_path / "model" / "a").mkdir(parents=True)
    TINY.to_json(tmp_path / "model" / "model.json")
    save_weights(Pico(TINY), tmp_path / "model" / "a" / "00000001.safetensors")
    out = run(f"python {ROOT / 'examples' / 'sample.py'} model a", tmp_path)
    assert out.startswith("The ")
    assert len(out) > 50
    chat = f"printf 'One\\n\\377two' | python {ROOT / 'examples' / 'chat.py'} model a"
    out = run(chat, tmp_path)
    assert out.startswith("> ")
    assert out.endswith("\n> \n")
    assert len(out) > 200
    for example in ("sample.py", "chat.py"):
        command = [sys.executable, ROOT / "examples" / example]
        for arguments, named in (([], "PATH RUN"), (["model", "b"], "b")):
            done = subprocess.run(
                [*command, *arguments], cwd=tmp_path, capture_output=True, text=True
            )
            assert done.returncode == 1
            (line,) = done.stderr.splitlines()
            assert named in line


def test_files_named_exist():
    for name in re.findall(r"`([\w/]+\.py)`", README):
        assert (ROOT / name).exists() or (ROOT / "pico_tg" / name).exists(), name
