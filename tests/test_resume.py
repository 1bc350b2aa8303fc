"""Resuming: bit for bit, from the newest valid checkpoint, whatever happened to the others."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from tinygrad import GlobalCounters, Tensor, nn

from pico_tg.checkpoint import (
    checkpoint_path,
    delete_older,
    list_checkpoints,
    load_newest,
    read_safetensors,
    save_checkpoint,
)
from pico_tg.config import Config
from pico_tg.data import DataSpec, load_data
from pico_tg.files import PicoError
from pico_tg.generate import Decoder
from pico_tg.model import Pico
from pico_tg.train import TrainSettings, TrainStep, Validation, read_metrics, train

CONFIG = Config(
    dim=16,
    next_tokens=2,
    att_q_heads=2,
    att_kv_heads=1,
    fb_num_blocks=1,
    fb_att_window_size=6,
    latent_capacity_factor=0.25,
    latent_num_blocks=1,
    latent_att_window_size=9,
)
# 14 windows of 40 bytes: an epoch ends in the middle of a step
QUICK = {"context_len": 40, "batch_size": 4, "warmup_steps": 2, "learning_rate": 1e-2, "epochs": 99}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat; " * 25)
    return str(path)


def make(seed: int = 0) -> Pico:
    Tensor.manual_seed(seed)
    return Pico(CONFIG)


def after(steps: int):
    """A `stop` that ends training after so many steps."""
    answers = iter([False] * (steps - 1) + [True])
    return lambda: next(answers)


def compare(a: Path, b: Path) -> None:
    """Two runs: the same records but for the clock, the same weights and optimizer, bit for bit."""
    clocks = {"bytes_per_second", "validation_seconds", "checkpoint"}
    first, second = (
        [{k: v for k, v in r.items() if k not in clocks} for r in read_metrics(run)]
        for run in (a, b)
    )
    measured = {"validation_bits_per_byte", "validation_bits_per_byte_top_k"}
    measured |= {"validation_router_rate"}
    for one, other in zip(first, second, strict=True):
        common = one.keys() & other.keys()
        assert common >= one.keys() - measured
        assert {k: one[k] for k in common} == {k: other[k] for k in common}
    name = list_checkpoints(a)[-1][1].name
    for file in (name, name.replace(".safetensors", ".state.safetensors")):
        ours, theirs = read_safetensors(a / file)[0], read_safetensors(b / file)[0]
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


@pytest.mark.parametrize("optimizer", ["soap", "adamw"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_twice_is_the_same_bit_for_bit(optimizer, accumulation, text, tmp_path):
    settings = QUICK | {"optimizer": optimizer, "grad_accumulation_steps": accumulation}
    settings |= {"batch_size": 4 // accumulation, "max_steps": 13}
    straight, pieces = tmp_path / "straight", tmp_path / "pieces"
    list(train(make(), text, straight, **settings))
    list(train(make(), text, pieces, stop=after(4), **settings))
    list(train(make(1), text, pieces, resume=True, stop=after(7)))  # settings: those of the run
    assert len(read_metrics(pieces)) == 11
    list(train(make(2), None, pieces, resume=True))
    assert read_metrics(straight)[-1]["epoch"] > 2
    compare(straight, pieces)


@pytest.mark.slow
def test_resumed_in_a_new_process(text, tmp_path):
    """The command line, killed without warning between two checkpoints."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in QUICK.items()]
    flags += ["--checkpoint-interval=4", "--max-steps=14"]
    CONFIG_FLAGS = [f"--{k.replace('_', '-')}={v}" for k, v in vars(CONFIG).items()]
    pico = [sys.executable, "-m", "pico_tg"]
    model = tmp_path / "model"
    subprocess.run([*pico, "init", model, *CONFIG_FLAGS], check=True, capture_output=True)
    subprocess.run([*pico, "train", model, "a", text, *flags], check=True, capture_output=True)
    child = subprocess.Popen([*pico, "train", model, "b", text, *flags], stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not checkpoint_path(model / "b", 8).exists() and time.time() < deadline:
        time.sleep(0.005)
    child.kill()
    child.wait()
    done = subprocess.run(
        [*pico, "train", model, "b", "--resume"], capture_output=True, text=True, check=True
    )
    assert "resuming after step" in done.stderr
    compare(model / "a", model / "b")


@pytest.fixture
def run(text, tmp_path):
    """A run of four steps with checkpoints after 2 and 4."""
    folder = tmp_path / "run"
    list(train(make(), text, folder, max_steps=4, checkpoint_interval=2, **QUICK))
    return folder


def test_changed_settings_are_refused_by_name(run, text):
    def resume(**changes):
        return list(train(make(), text, run, resume=True, **changes))

    with pytest.raises(PicoError, match=r"learning_rate was 0.01, now 0.5, optimizer was soap"):
        resume(learning_rate=0.5, optimizer="adamw")
    with pytest.raises(PicoError, match=r"batch_size was 4, now 2.*--force"):
        resume(batch_size=2)
    assert resume(context_len=40) == []  # the same as before; nothing is left to do
    records = resume(max_steps=6, batch_size=2, force=True, validation_interval=5)
    assert [r["step"] for r in records] == [5, 6]
    assert records[-1]["bytes"] == 4 * 4 * 40 + 2 * 2 * 40
    assert json.loads((run / "training.json").read_text())["settings"]["batch_size"] == 2


def test_changed_data_are_refused(run, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("something else; " * 60)
    with pytest.raises(PicoError, match="other data: dataset was"):
        train(make(), str(other), run, resume=True)
    Path(text).write_text("the dog sat on the log; " * 25)
    with pytest.raises(PicoError, match="have changed since"):
        train(make(), text, run, resume=True)


def test_nothing_to_resume(tmp_path, text):
    with pytest.raises(PicoError, match="no training run to resume"):
        train(make(), text, tmp_path / "none", resume=True)
    with pytest.raises(PicoError, match="no run was named"):
        train(make(), text, resume=True)
    assert not (tmp_path / "none").exists()


def break_weights(run: Path) -> None:
    path = checkpoint_path(run, 4)
    path.write_bytes(path.read_bytes()[:-5])


def break_state(run: Path) -> None:
    (run / "00000004.state.safetensors").unlink()


def mix(run: Path) -> None:
    checkpoint_path(run, 4).write_bytes(checkpoint_path(run, 2).read_bytes())


@pytest.mark.parametrize("damage", [break_weights, break_state, mix])
def test_broken_checkpoints_are_passed_over(damage, run, text):
    damage(run)
    said = []
    records = list(train(make(), text, run, resume=True, say=said.append))
    assert [r["step"] for r in records] == [3, 4]
    assert "00000004" in said[0]
    assert "resuming after step 2" in said[1]
    assert [r["step"] for r in read_metrics(run)] == [1, 2, 3, 4]
    assert load_newest(make(), run)[0] == checkpoint_path(run, 4)


def test_no_valid_checkpoint(run, text):
    for _, path in list_checkpoints(run):
        path.write_bytes(b"")
    with pytest.raises(PicoError, match="no checkpoint to resume from"):
        train(make(), text, run, resume=True)


def test_keep_checkpoints(text, tmp_path):
    run = tmp_path / "run"
    list(train(make(), text, run, max_steps=5, checkpoint_interval=1, keep_checkpoints=2, **QUICK))
    assert [step for step, _ in list_checkpoints(run)] == [4, 5]
    assert len(list(run.glob("*.state.safetensors"))) == 2
    assert json.loads((run / "training.json").read_text())["checkpoints"] == [
        "00000004.safetensors",
        "00000005.safetensors",
    ]


ARRAYS = {"w": np.arange(40_000, dtype=np.float32)}


def test_keeping_one_never_deletes_the_last_valid_one(tmp_path):
    """A later, broken one does not count."""
    checkpoint_path(tmp_path, 9).write_bytes(b"broken")
    for step in (1, 2):
        save_checkpoint(ARRAYS, {}, {"step": step}, tmp_path, step)
        delete_older(tmp_path, step, 1)
        assert [s for s, _ in list_checkpoints(tmp_path)] == [step, 9]


def valid_steps(folder: Path) -> list[int]:
    """Steps whose pair is whole, checked the way `load_checkpoint` does, without a model."""
    found = []
    for step, path in list_checkpoints(folder):
        weights, _ = read_safetensors(path)
        state, notes = read_safetensors(path.with_suffix(".state.safetensors"))
        assert json.loads(notes["progress"])["step"] == step
        assert weights["w"][0] == state["m"][0] == step
        found.append(step)
    return found


def save_for_ever(folder: Path, step: int, report) -> None:
    while True:
        step += 1
        weights = {"w": ARRAYS["w"].copy()}
        weights["w"][0] = step
        save_checkpoint(weights, {"m": weights["w"]}, {"step": step}, folder, step)
        os.write(report, step.to_bytes(4, "little"))
        delete_older(folder, step, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_thirty_times_while_saving(tmp_path):
    """SIGKILL at random moments: what was reported as saved is there, and nothing is half there."""
    moments = random.Random(0)
    reached = 0
    for _ in range(30):
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            try:
                save_for_ever(tmp_path, reached, writing)
            finally:
                os._exit(1)
        os.close(writing)
        os.read(reading, 4)  # at least one was saved
        time.sleep(moments.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said = os.read(reading, 1 << 16)
        os.close(reading)
        confirmed = int.from_bytes(said[-4:], "little") if said else reached + 1
        steps = valid_steps(tmp_path)  # asserts that each is whole
        assert steps[-1] >= confirmed > reached
        reached = steps[-1]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        weights = {"w": np.ones(1 << 17, np.float32)}  # 0.5 MB, twice
        save_checkpoint(weights, weights, {"step": 1}, disk, 1)
        with pytest.raises(PicoError, match=r"cannot write .*00000002.*No space left"):
            save_checkpoint(weights, weights, {"step": 2}, disk, 2)
        assert [step for step, _ in list_checkpoints(disk)] == [1]
        np.testing.assert_array_equal(
            read_safetensors(checkpoint_path(disk, 1))[0]["w"], weights["w"]
        )
        assert not [path for path in disk.iterdir() if path.name.endswith(".tmp")]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_became_read_only(tmp_path):
    save_checkpoint(ARRAYS, {}, {"step": 1}, tmp_path, 1)
    child = os.fork()
    if child == 0:  # as nobody: root may write anywhere
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            save_checkpoint(ARRAYS, {}, {"step": 2}, tmp_path, 2)
        except PicoError as error:
            os._exit(0 if "cannot write" in str(error) else 2)
        finally:
            os._exit(1)
    if os.geteuid() != 0:
        pytest.skip("needs root to become nobody")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]


def test_saving_over_a_file_that_is_read(tmp_path):
    path = save_checkpoint(ARRAYS, {}, {"step": 1}, tmp_path, 1)
    whole = path.read_bytes()
    with open(path, "rb") as file:
        start = file.read(1000)
        save_checkpoint({"w": -ARRAYS["w"]}, {}, {"step": 1}, tmp_path, 1)
        assert start + file.read() == whole
    assert read_safetensors(path)[0]["w"][1] == -1


def test_steps_do_not_leak():
    """Memory on the device is flat over 200 steps, and the process's as good as."""
    model = make()
    step = TrainStep(model, TrainSettings(**QUICK))
    windows = np.random.default_rng(0).integers(97, 120, (1, 4, 42), dtype=np.uint8)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(25):
        step(windows, 1e-3)
    device, process = GlobalCounters.mem_used, resident() if sys.platform == "linux" else 0
    for _ in range(200):
        step(windows, 1e-3)
    assert GlobalCounters.mem_used == device
    if sys.platform == "linux":
        assert resident() - process < 4 << 20


def test_graphs_are_freed_at_once(text):
    """Not by the garbage collector: on the CPU device's own thread that would never end."""
    corpus = load_data(DataSpec(text), progress=False).validation
    settings = TrainSettings(**QUICK)
    windows = np.random.default_rng(0).integers(97, 120, (1, 4, 42), dtype=np.uint8)
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
            decoder.feed(b"a")
        jits = [step.whole_step, validation.measure, *decoder.jits.values()]
        graphs = [weakref.ref(jit.captured) for jit in jits if jit.captured is not None]
        assert len(graphs) >= 4
        del step, validation, decoder, jits
        assert [graph() for graph in graphs] == [None] * len(graphs)
    finally:
        gc.enable()


def test_weights_stay_those_of_the_model(run):
    """A checkpoint's weights load elsewhere: the state is in a file of its own."""
    names = nn.state.get_state_dict(make()).keys()
    assert read_safetensors(checkpoint_path(run, 4))[0].keys() == names
