"""Resuming: bit for bit, from the newest valid checkpoint, whatever happened to the others."""

import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY as CONFIG
from helpers import WINDOWS, flags
from tinygrad import GlobalCounters, Tensor, nn

from pico_tg.checkpoint import (
    checkpoint_path,
    delete_older,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    remove_leftovers,
    save_checkpoint,
)
from pico_tg.config import Config, TrainSettings
from pico_tg.data import DataSpec, Windows, load_data
from pico_tg.decoder import Decoder
from pico_tg.evaluation import Validation
from pico_tg.files import PicoError
from pico_tg.model import Pico
from pico_tg.runs import Run, read_description, read_metrics
from pico_tg.safetensors import read_safetensors
from pico_tg.training import TrainStep, train

QUICK = WINDOWS | {"warmup_steps": 2, "learning_rate": 1e-2, "epochs": 99}
TEXT = "the cat sat on the mat; " * 19  # 11 windows: an epoch ends in the middle of a step


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def make(seed: int = 0) -> Pico:
    return Pico(CONFIG, seed)


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
    assert first == second
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
    # one of the stops is where a validation is due
    settings |= {"max_steps": 13, "validation_interval": 4}
    straight, pieces = tmp_path / "straight", tmp_path / "pieces"
    list(train(make(), text, straight, **settings))
    # asked after each micro-batch, once more after the step, and again after a validation
    list(train(make(), text, pieces, stop=after(4 if accumulation == 1 else 12), **settings))
    # settings: those of the run
    list(train(make(1), text, pieces, resume=True, stop=after(8 if accumulation == 1 else 22)))
    assert len(read_metrics(pieces)) == 11
    list(train(make(2), None, pieces, resume=True))
    assert read_metrics(straight)[-1]["epoch"] >= 2
    compare(straight, pieces)


@pytest.mark.slow
def test_resumed_in_a_new_process(text, tmp_path):
    """The command line, killed without warning between two checkpoints."""
    settings = {"checkpoint_interval": 4, "max_steps": 40, "grad_accumulation_steps": 2}
    options = flags(QUICK | settings)
    pico = [sys.executable, "-m", "pico_tg"]
    model = tmp_path / "model"
    subprocess.run(
        [*pico, "init", model, *flags(CONFIG.to_dict())], check=True, capture_output=True
    )
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps with checkpoints after 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PICO_CACHE", str(folder / "cache"))
        settings = QUICK | {"max_steps": 4, "checkpoint_interval": 2}
        list(train(make(), str(folder / "text.txt"), folder / "run", **settings))
    return folder / "run"


@pytest.fixture
def run(trained, text, tmp_path):
    """A copy of `trained`, on the test's own text."""
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "training.json"
    description = json.loads(path.read_text())
    description["dataset"]["dataset"] = text
    path.write_text(json.dumps(description))
    return tmp_path / "run"


def test_changed_settings_are_refused_by_name(run, text):
    def resume(**changes):
        return list(train(make(), text, run, resume=True, **changes))

    with pytest.raises(PicoError, match=r"learning_rate was 0.01, now 0.5, optimizer was soap"):
        resume(learning_rate=0.5, optimizer="adamw")
    with pytest.raises(PicoError, match=r"batch_size was 2, now 1.*--force"):
        resume(batch_size=1)
    assert resume(context_len=40) == []  # the same as before; nothing is left to do
    said = []
    changes = {"max_steps": 6, "batch_size": 1, "force": True, "validation_interval": 5}
    records = resume(say=said.append, **changes)
    assert "6 steps in all, not 4: from step 5 on the learning rate" in said[-1]
    assert [r["step"] for r in records] == [5, 6]
    assert records[-1]["bytes"] == 4 * 2 * 40 + 2 * 1 * 40
    assert json.loads((run / "training.json").read_text())["settings"]["batch_size"] == 1


def test_a_forced_batch_size_leaves_no_window_out(text, tmp_path, monkeypatch):
    """11 windows an epoch: three steps of 2, then 1 at a time, and each is seen once."""
    seen = []
    batch_at = Windows.batch_at

    def watched(self, position):
        batch = batch_at(self, position)
        seen.extend(bytes(row) for row in batch)
        return batch

    monkeypatch.setattr(Windows, "batch_at", watched)
    settings = QUICK | {"epochs": 1}
    list(train(make(), text, tmp_path / "run", stop=after(3), **settings))
    assert len(seen) == 6
    records = list(train(make(), text, tmp_path / "run", resume=True, batch_size=1, force=True))
    assert [r["step"] for r in records] == [4, 5, 6, 7, 8]
    assert len(seen) == 11
    data = load_data(DataSpec(text), progress=False).train
    whole = Windows(data, 40, CONFIG.next_tokens, 11, 0)
    assert len(whole) == 11
    assert sorted(seen) == sorted(bytes(row) for row in whole.batch(0)[:11])


def test_another_model_is_refused(run, text):
    other = Config(**(vars(CONFIG) | {"fb_att_window_size": 3}))
    with pytest.raises(PicoError, match="fb_att_window_size was 6, now 3"):
        train(Pico(other), text, run, resume=True)


def test_data_may_have_moved(run, text, tmp_path):
    moved = tmp_path / "elsewhere.txt"
    Path(text).rename(moved)
    with pytest.raises(PicoError, match=r"text\.txt"):
        train(make(), None, run, resume=True)
    records = list(train(make(), str(moved), run, resume=True, max_steps=5))
    assert [r["step"] for r in records] == [5]
    assert read_description(run)["dataset"]["dataset"] == str(moved)


def test_a_relative_path_is_found_from_anywhere(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    list(train(make(), "text.txt", tmp_path / "run", max_steps=1, **QUICK))
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    assert len(list(train(make(), None, tmp_path / "run", resume=True, max_steps=2))) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: "[]",
        lambda d: "{",
        lambda d: json.dumps({"settings": {}}),
        lambda d: json.dumps(d | {"settings": d["settings"] | {"depth": 3}}),
        lambda d: json.dumps(d | {"dataset": d["dataset"] | {"color": "red"}}),
    ],
)
def test_a_broken_description(damage, run):
    path = run / "training.json"
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(PicoError, match=r"training\.json"):
        train(make(), None, run, resume=True)


def test_metrics_that_are_none(run):
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'3\n{"step": "x"}\n\xff\xfe\n{"step": 5, "bi')
    assert [r["step"] for r in read_metrics(run)] == [1, 2, 3, 4]


def test_a_run_is_trained_by_one_at_a_time(run, text):
    records = train(make(), text, run, resume=True, max_steps=6)
    next(records)
    with pytest.raises(PicoError, match="another process trains"):
        train(make(), text, run, resume=True, max_steps=6)
    records.close()
    assert [r["step"] for r in train(make(), text, run, resume=True, max_steps=6)] == [6]


def test_leftovers_of_killed_processes_are_removed(run, text):
    left = [".00000004.safetensors.abc.tmp", ".training.json.x.tmp", "00000003.state.safetensors"]
    for name in left:
        (run / name).write_bytes(b"half")
    (run / "notes.tmp").write_bytes(b"mine")
    assert list(train(make(), text, run, resume=True)) == []
    names = {path.name for path in run.iterdir()}
    assert not names & {*left}
    assert "notes.tmp" in names


def test_a_full_log_does_not_lose_the_training(run, text, monkeypatch):
    """What was trained is saved before the error."""

    def full(self, record, durable=False):
        raise PicoError("cannot write metrics.jsonl: No space left on device")

    records = train(make(), text, run, resume=True, max_steps=9)
    next(records)
    monkeypatch.setattr(Run, "log", full)
    with pytest.raises(PicoError, match="No space left"):
        next(records)
    assert list_checkpoints(run)[-1][0] == 6


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_is_one_line(run, text):
    (run / "metrics.jsonl").unlink()
    records = train(make(), text, run, resume=True, max_steps=6)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(PicoError, match=r"cannot write .*metrics\.jsonl: No space left"):
        list(records)


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


def alter_state(run: Path) -> None:
    """A number in the optimizer's state, of the same size."""
    path = run / "00000004.state.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def rename(run: Path) -> None:
    """The pair of step 2 under the name of step 4."""
    for end in ("safetensors", "state.safetensors"):
        (run / f"00000004.{end}").write_bytes((run / f"00000002.{end}").read_bytes())


@pytest.mark.parametrize("damage", [break_weights, break_state, mix, alter_state, rename])
def test_broken_checkpoints_are_passed_over(damage, run):
    damage(run)
    path, _, progress, refused = load_newest(make(), run)
    assert path == checkpoint_path(run, 2)
    assert progress["step"] == 2
    assert "00000004" in refused[0]


def test_training_goes_on_from_the_newest_whole_one(run, text):
    break_weights(run)
    said = []
    records = list(train(make(), text, run, resume=True, say=said.append))
    assert [r["step"] for r in records] == [3, 4]
    assert (run / "00000004.safetensors.broken").exists()
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
        save_checkpoint(ARRAYS, {}, {"step": step}, tmp_path)
        delete_older(tmp_path, step, 1)
        assert [s for s, _ in list_checkpoints(tmp_path)] == [step, 9]


ENDS = (".safetensors", ".state.safetensors")


def valid_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints, each of which must load, into a model of one array."""
    found = []
    for step, path in list_checkpoints(folder):
        model = Array()
        state, progress = load_checkpoint(model, path)
        assert progress["step"] == step
        assert model.w.numpy()[0] == state["m"][0] == step
        found.append(step)
    return found


class Array:
    def __init__(self) -> None:
        self.w = Tensor(ARRAYS["w"]).clone().realize()


def save_for_ever(folder: Path, step: int, report) -> None:
    while True:
        step += 1
        weights = {"w": ARRAYS["w"].copy()}
        weights["w"][0] = step
        save_checkpoint(weights, {"m": weights["w"]}, {"step": step}, folder)
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
        remove_leftovers(tmp_path)  # as a resumed run does
        whole = {f"{step:08d}{end}" for step, _ in list_checkpoints(tmp_path) for end in ENDS}
        assert {path.name for path in tmp_path.iterdir()} == whole
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
        save_checkpoint(weights, weights, {"step": 1}, disk)
        with pytest.raises(PicoError, match=r"cannot write .*00000002.*No space left"):
            save_checkpoint(weights, weights, {"step": 2}, disk)
        assert [step for step, _ in list_checkpoints(disk)] == [1]
        np.testing.assert_array_equal(
            read_safetensors(checkpoint_path(disk, 1))[0]["w"], weights["w"]
        )
        assert {path.name for path in disk.iterdir()} == {f"00000001{end}" for end in ENDS}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_became_read_only(tmp_path):
    """As nobody, since root may write anywhere; once it may, then it may not."""
    with tempfile.TemporaryDirectory() as name:  # whose parents anybody may enter
        folder = Path(name)
        for step, mode, status in ((1, 0o777, 0), (2, 0o555, 3)):
            folder.chmod(mode)
            child = os.fork()
            if child == 0:
                try:
                    if os.geteuid() == 0:
                        os.setuid(65534)
                    save_checkpoint(ARRAYS, {}, {"step": step}, folder)
                    os._exit(0)
                except PicoError as error:
                    os._exit(3 if "Permission denied" in str(error) else 4)
                finally:
                    os._exit(5)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
            folder.chmod(0o777)
        assert [step for step, _ in list_checkpoints(folder)] == [1]
        assert len(list(folder.iterdir())) == 2


def test_saving_over_a_file_that_is_read(tmp_path):
    path = save_checkpoint(ARRAYS, {}, {"step": 1}, tmp_path)
    whole = path.read_bytes()
    with open(path, "rb") as file:
        start = file.read(1000)
        save_checkpoint({"w": -ARRAYS["w"]}, {}, {"step": 1}, tmp_path)
        assert start + file.read() == whole
    assert read_safetensors(path)[0]["w"][1] == -1


def test_steps_do_not_leak():
    """Memory on the device is flat over 200 steps, and the process's as good as."""
    model = make()
    step = TrainStep(model, TrainSettings(**QUICK))
    windows = np.random.default_rng(0).integers(97, 120, (1, 2, 43), dtype=np.uint8)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(25):
        step(windows, 1e-3)
    gc.collect()  # what compiling and other tests left
    process = resident() if sys.platform == "linux" else 0
    device = GlobalCounters.mem_used
    for _ in range(200):
        step(windows, 1e-3)
    assert GlobalCounters.mem_used == device
    if sys.platform == "linux":
        gc.collect()
        assert resident() - process < 4 << 20


def test_graphs_are_freed_at_once(text):
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
        jits = [step.whole_step, validation.few_slots, *decoder.graphs.values()]
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
