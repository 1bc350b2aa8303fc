"""Resuming, bit for bit; and steps, which leak no memory."""

import gc
import itertools
import os
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY as CONFIG
from helpers import WINDOWS, Watch, flags
from tinygrad import GlobalCounters

from pico_tg.checkpoint import checkpoint_path, list_checkpoints
from pico_tg.config import TrainSettings
from pico_tg.data import DataSpec, load_data
from pico_tg.decoder import Decoder
from pico_tg.evaluation import Validation
from pico_tg.model import Pico
from pico_tg.runs import read_metrics
from pico_tg.safetensors import read_safetensors
from pico_tg.training import TrainStep, train

QUICK = WINDOWS | {"warmup_steps": 2, "learning_rate": 1e-2, "epochs": 99}
TEXT = "the cat sat on the mat; " * 19  # 11 windows: an epoch ends in the middle of a step
SLOW = pytest.mark.slow


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def make(seed: int = 0) -> Pico:
    return Pico(CONFIG, seed)


def stop_at(n: int) -> Watch:
    """Stop in the n-th step of the process, or after it."""
    watch = Watch(lambda: sum(name != "validating" for name in watch.phases) >= n)
    return watch


def compare(a: Path, b: Path) -> None:
    """Two runs: the same records but for the clock, the same weights and optimizer, bit for bit."""
    clocks = {"bytes_per_second", "seconds_left", "validation_seconds", "checkpoint"}
    first, second = (
        [{k: v for k, v in r.items() if k not in clocks} for r in read_metrics(run)]
        for run in (a, b)
    )
    assert first == second
    name = list_checkpoints(a)[-1][1].name
    for file in (name, name.replace(".safetensors", ".state.safetensors")):
        ours, theirs = read_safetensors(a / file)[0], read_safetensors(b / file)[0]
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


@pytest.mark.parametrize(
    ("optimizer", "accumulation"),
    [
        ("soap", 1),
        pytest.param("adamw", 2, marks=SLOW),
    ],
)
def test_resumed_twice_is_the_same_bit_for_bit(optimizer, accumulation, text, tmp_path):
    settings = QUICK | {"optimizer": optimizer, "grad_accumulation_steps": accumulation}
    # one of the stops is where a validation is due
    settings |= {"max_steps": 13, "validation_interval": 4, "router_warmup_steps": 5}
    straight, pieces = tmp_path / "straight", tmp_path / "pieces"
    list(train(make(), text, straight, settings="published", **settings))
    # without micro-batches, the first stop leaves a validation out; with them, both discard a step
    list(train(make(), text, pieces, settings="published", events=stop_at(4), **settings))
    # settings: those of the run
    list(train(make(1), text, pieces, resume=True, events=stop_at(7)))
    assert len(read_metrics(pieces)) == (11 if accumulation == 1 else 9)
    list(train(make(2), None, pieces, resume=True))
    assert read_metrics(straight)[-1]["epoch"] >= 2
    compare(straight, pieces)


@SLOW
def test_resumed_in_a_new_process(text, tmp_path):
    """The command line, killed without warning between two checkpoints."""
    settings = {"checkpoint_interval": 4, "max_steps": 40, "grad_accumulation_steps": 2}
    options = flags(QUICK | settings)
    pico = [sys.executable, "-m", "pico_tg"]
    model = tmp_path / "model"
    subprocess.run([*pico, "init", model, *flags(vars(CONFIG))], check=True, capture_output=True)
    subprocess.run([*pico, "train", model, "a", text, *options], check=True, capture_output=True)
    command = [*pico, "train", model, "b", text, *options]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.time() + 600
    while not checkpoint_path(model / "b", 8).exists() and time.time() < deadline:
        time.sleep(0.005)
    child.kill()
    child.wait()
    done = subprocess.run(
        [*pico, "train", model, "b", "--resume"], capture_output=True, text=True, check=True
    )
    resumed = re.search(r"resuming after step (\d+)", done.stderr)
    assert 8 <= int(resumed[1]) < 40, "it had finished before it was killed"
    compare(model / "a", model / "b")


@SLOW
def test_a_script_s_error_saves_the_last_step(text, tmp_path):
    """Although the traceback holds the generator until the interpreter ends."""
    script = Path(__file__).parent / "scripts" / "uncaught.py"
    command = [sys.executable, script, text, tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "SystemError: uncaught" in done.stderr
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [3]


@SLOW
def test_steps_do_not_leak():
    """Memory on the device does not grow in 300 steps, that of the process not in 100 of them."""
    model = make()
    step = TrainStep(model, TrainSettings(**QUICK))
    windows = np.random.default_rng(0).integers(97, 120, (1, 2, 43), dtype=np.uint8)

    def resident() -> int:
        if sys.platform != "linux":
            return 0
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(25):
        step(windows, 1e-3)
    device, process = [], []
    for _ in range(4):
        gc.collect()  # what compiling and other tests left
        device.append(GlobalCounters.mem_used)
        process.append(resident())
        for _ in range(100):
            step(windows, 1e-3)
    assert device[-1] <= device[0]
    # memory that is allocated once, for threads for example, is no leak
    assert min(b - a for a, b in itertools.pairwise(process)) < 1 << 20


@SLOW
def test_graphs_are_freed_immediately(text):
    """Not by the garbage collector: on the CPU device's own thread that would never end."""
    corpus = load_data(DataSpec(text), progress=False).validation
    settings = TrainSettings(**QUICK)
    windows = np.random.default_rng(0).integers(97, 120, (1, 2, 43), dtype=np.uint8)
    gc.collect()
    gc.disable()
    try:
        step, validation, decoder = (
            TrainStep(make(), settings),
            Validation(make(), corpus, settings),
            Decoder(make()),
        )
        for _ in range(3):  # the second call makes a graph, the third replays it
            step(windows, 1e-3)
            validation()
            decoder.forward(b"a")
        jits = [step.whole_step, validation.causal.few_slots, *decoder.graphs.values()]
        graphs = [weakref.ref(jit.captured) for jit in jits if jit.captured is not None]
        assert len(graphs) >= 4
        del step, validation, decoder, jits
        assert [graph() for graph in graphs] == [None] * len(graphs)
    finally:
        gc.enable()
