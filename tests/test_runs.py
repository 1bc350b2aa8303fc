"""The folder of a run: what is refused, what is kept, what starts again, which one is the best."""

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from helpers import TINY, WINDOWS, Watch
from tinygrad import Tensor

from pico_tg import load
from pico_tg.checkpoint import checkpoint_path, list_checkpoints, save_checkpoint
from pico_tg.config import Config, TrainSettings
from pico_tg.data import DataSpec, Windows, load_data, stored_spec
from pico_tg.files import PicoError, differences
from pico_tg.model import Pico
from pico_tg.runs import (
    BITS,
    SHIPPED,
    Progress,
    Run,
    ancestry,
    best_validations,
    check_startable,
    find_checkpoint,
    load_config,
    model_folder,
    newest_run,
    read_description,
    read_metrics,
    run_folder,
)
from pico_tg.safetensors import read_safetensors, write_safetensors
from pico_tg.tools.info import describe
from pico_tg.tools.terminal import StopSignals
from pico_tg.training import TrainStep, train

FORMER = Path(__file__).parent / "golden" / "run_5601c96"
GAP = "validation_routing_gap"
QUICK = WINDOWS | {"warmup_steps": 2, "learning_rate": 1e-2, "epochs": 99, "optimizer": "adamw"}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat; " * 19)
    return str(path)


@pytest.fixture
def quick_steps(monkeypatch):
    """Steps and validations that compile nothing: each adds 1 to a weight."""

    def step(self, batches, lr, events, router_warmup=False):
        for done in range(1, len(batches) + (len(batches) > 1)):
            events.part(done, len(batches))
            if done < len(batches) and events.stop():
                return None
        weight = self.model.norm.weight
        weight.assign(Tensor(weight.numpy() + 1)).realize()
        return np.array([2, 0, 2, 0.25, 1], np.float32)

    class Validation:
        bits = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8])
        bytes = 1000

        def __init__(self, *args):
            pass

        def __call__(self, events, top_k=False):
            if events.stop():
                return None
            return {BITS: next(self.bits)} | ({GAP: 0.5} if top_k else {})

    monkeypatch.setattr(TrainStep, "__call__", step)
    monkeypatch.setattr("pico_tg.training.Validation", Validation)
    return Validation


def start(text: str | DataSpec, folder: Path, **settings):
    return train(Pico(TINY, 0), text, folder, **{"settings": "published"} | QUICK | settings)


def steps_of(weights: Path) -> int:
    """How many steps of `quick_steps` weights have seen; they begin at 1."""
    return int(read_safetensors(weights)[0]["norm.weight"][0]) - 1


def steps(records) -> list[int]:
    return [record["step"] for record in records]


# A run of the former commit ------------------------------------------------------------------


@pytest.fixture
def former(tmp_path):
    """A run that commit 5601c96 stopped after 6 of 9 steps (AdamW, TINY)."""
    shutil.copytree(FORMER, tmp_path / "model")
    return tmp_path / "model"


def test_a_run_of_the_former_commit_is_read(former):
    weights = read_safetensors(former / "run" / "00000006.safetensors")[0]
    model = load(former, "run")
    assert all(np.array_equal(value, weights[name]) for name, value in model.weights().items())
    facts = describe(former, "run")["run"]
    assert facts["settings"]["optimizer"] == "adamw"
    assert facts["checkpoints"][0]["bits_per_byte"] == pytest.approx(6.843, abs=1e-3)
    spec = stored_spec(read_description(former / "run"), former / "run")
    assert spec == DataSpec("/home/somebody/text.txt")


def test_a_run_of_the_former_commit_resumes(former):
    """With the losses that the former commit had without a stop."""
    records = list(train(load(former, "run"), former / "text.txt", former / "run", resume=True))
    straight = json.loads((former / "straight.json").read_text())[6:]
    assert len(records) == len(straight) == 3
    for ours, theirs in zip(records, straight, strict=True):
        for key in theirs.keys() - {"bytes_per_second", "validation_seconds"}:
            # to the bit on the machine that made it
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key


# Reading and writing a model -----------------------------------------------------------------


def test_the_newest_run_is_the_default(former):
    """The one whose newest checkpoint was written last, in whatever folder."""
    assert newest_run(former) == "run"
    times = {"sub/b": 2, "run": 1, "a": 0}
    for run, at in times.items():
        shutil.copytree(FORMER / "run", former / run, dirs_exist_ok=True)
        weights = former / run / "00000006.safetensors"
        values, notes = read_safetensors(weights)
        values["norm.weight"][:] = at
        write_safetensors(weights, values, notes)
        os.utime(weights, (10**9 + at, 10**9 + at))
    (former / "empty").mkdir()
    assert newest_run(former) == "sub/b"
    assert load(former).norm.weight.numpy().tolist() == [2] * TINY.dim
    assert load(former, "run").norm.weight.numpy().tolist() == [1] * TINY.dim
    os.utime(former / "run" / "00000006.safetensors")
    assert load(str(former), checkpoint=6).norm.weight.numpy().tolist() == [1] * TINY.dim


def test_a_run_that_does_not_exist(former):
    with pytest.raises(PicoError, match=r"model has no run rum; its runs are: run$"):
        load(former, "rum")
    shutil.rmtree(former / "run")
    with pytest.raises(PicoError, match=r"model has no run rum; make one with: .*model rum$"):
        load(former, "rum")


def test_the_name_of_the_model_that_comes_with_the_package(tmp_path, monkeypatch):
    """A folder of that name is meant where there is one; nothing is trained in the package."""
    monkeypatch.chdir(tmp_path)
    assert model_folder("stories") == SHIPPED
    assert newest_run("stories") == "first"
    assert load("stories").config == Config.from_json(SHIPPED / "model.json")
    for folder in (SHIPPED / "new", SHIPPED / "first"):
        with pytest.raises(PicoError, match=r"DATASET --from stories first$"):
            check_startable(folder)
    (tmp_path / "stories").mkdir()  # of texts, say
    assert model_folder("stories") == SHIPPED
    TINY.to_json("stories/model.json")
    assert load_config("stories") == TINY
    check_startable(run_folder("stories", "new"))


def test_a_model_without_weights(former, tmp_path):
    shutil.rmtree(former / "run")
    with pytest.raises(PicoError, match=r"no run of .*model has a checkpoint; .* train .* RUN"):
        load(former)
    shutil.copytree(FORMER / "run", former / "sub" / "live")
    (former / "sub" / "live" / "00000006.safetensors").unlink()
    with pytest.raises(PicoError, match=r"sub/live has no checkpoint; in training"):
        load(former)
    with pytest.raises(PicoError, match=r"nowhere is no model: there is no such folder; to train"):
        load(tmp_path / "nowhere")
    with pytest.raises(PicoError, match=r"model.json is a file; give the folder of a model"):
        load(former / "model.json")


def test_a_model_is_saved(tmp_path):
    model, folder = Pico(TINY, 3), tmp_path / "new" / "mine"
    model.save(folder)
    assert Config.from_json(folder / "model.json") == TINY

    def check(model: Pico) -> None:
        found = load(folder).weights()
        for name, values in model.weights().items():
            np.testing.assert_array_equal(values, found[name])

    check(model)
    assert describe(folder, "saved")["run"]["checkpoints"][0]["step"] == 0
    other = Pico(TINY, 4)
    other.save(str(folder))
    check(other)
    larger = Pico(Config(**(TINY.to_dict() | {"next_tokens": 4})), 4)
    with pytest.raises(PicoError, match=r"model.json describes another model: next_tokens was 3"):
        larger.save(folder)
    check(other)
    (tmp_path / "file").touch()
    with pytest.raises(PicoError, match=r"^cannot write to .*file"):
        model.save(tmp_path / "file")


def test_training_describes_its_model(text, tmp_path, quick_steps):
    list(start(text, tmp_path / "models" / "run", max_steps=1))
    assert Config.from_json(tmp_path / "models" / "model.json") == TINY
    assert steps_of(checkpoint_path(tmp_path / "models" / "run", 1)) == 1
    assert load(tmp_path / "models").config == TINY
    list(start(text, tmp_path / "models" / "another", max_steps=1))
    (tmp_path / "models" / "model.json").write_text(json.dumps(TINY.to_dict() | {"dim": 28}))
    with pytest.raises(PicoError, match=r"model.json describes another model: dim was 28, now 24"):
        start(text, tmp_path / "models" / "third", max_steps=1)
    assert not (tmp_path / "models" / "third").exists()


# What ends a run -----------------------------------------------------------------------------


def test_whoever_leaves_the_loop_saves_the_last_step(text, tmp_path, quick_steps):
    run = tmp_path / "run"
    records = start(text, run, max_steps=20, validation_interval=2)
    assert steps(next(records) for _ in range(3)) == [1, 2, 3]
    with pytest.raises(ZeroDivisionError):
        records.throw(ZeroDivisionError())
    assert [at for at, _ in list_checkpoints(run)] == [3]
    assert steps_of(checkpoint_path(run, 3)) == 3
    for record in train(Pico(TINY, 1), None, run, resume=True):
        if record["step"] == 5:
            break
    assert steps_of(checkpoint_path(run, 5)) == 5
    assert steps(read_metrics(run)) == [1, 2, 3, 4, 5]


def test_a_validation_that_fails_loses_no_step(text, tmp_path, quick_steps):
    run = tmp_path / "run"
    quick_steps.bits = iter(())  # raises StopIteration, which a generator makes a RuntimeError
    with pytest.raises(RuntimeError):
        list(start(text, run, max_steps=20, validation_interval=2))
    assert steps(read_metrics(run)) == [1, 2]
    quick_steps.bits = iter([2.5, 2.0])  # the resumed run makes up for it
    assert steps(train(Pico(TINY, 1), None, run, resume=True, max_steps=3)) == [3]
    assert [record.get(BITS) for record in read_metrics(run)] == [None, 2.5, 2.0]


def test_a_validation_that_is_not_finite_is_not_saved(text, tmp_path, quick_steps):
    """Nor logged: the good checkpoint stays the newest one, and the file JSON."""
    run = tmp_path / "run"
    quick_steps.bits = iter([3.0, math.nan])
    settings = {"keep_checkpoints": 1, "checkpoint_interval": 2, "validation_interval": 2}
    with pytest.raises(PicoError, match="validation of step 4 is not finite"):
        list(start(text, run, max_steps=8, **settings))
    assert [at for at, _ in list_checkpoints(run)] == [2]
    assert steps(read_metrics(run)) == [1, 2, 3]
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    quick_steps.bits = iter([2.5])
    assert steps(train(Pico(TINY, 1), None, run, resume=True, max_steps=4)) == [3, 4]


def test_a_step_that_fails_saves_nothing(text, tmp_path, quick_steps, monkeypatch):
    """The weights may be half updated."""
    records = start(text, tmp_path / "run", max_steps=20)
    next(records)

    def fail(self, *args, **options):
        self.consistent = False
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainStep, "__call__", fail)
    with pytest.raises(KeyboardInterrupt):
        next(records)
    assert list_checkpoints(tmp_path / "run") == []


def test_ctrl_c_in_a_script_that_watches_signals(text, tmp_path, quick_steps):
    """The step in progress ends, and is the last one saved."""
    run, seen = tmp_path / "run", []
    with StopSignals() as events:
        for record in start(text, run, max_steps=20, events=events):
            seen.append(record["step"])
            if record["step"] == 3:
                signal.raise_signal(signal.SIGINT)
    assert seen == steps(read_metrics(run)) == [1, 2, 3, 4]
    assert [at for at, _ in list_checkpoints(run)] == [4]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_trained_meanwhile_is_not_overwritten(text, tmp_path, quick_steps):
    """Another process trains the run after the check and before the lock."""
    run = tmp_path / "run"
    assert steps(start(text, run, max_steps=2)) == [1, 2]
    with pytest.raises(PicoError, match="exists"):
        Run(run, resumed=False)
    assert steps(read_metrics(run)) == [1, 2]


def test_more_epochs_continue_a_run(text, tmp_path, quick_steps):
    run = tmp_path / "run"
    few = len(list(start(text, run, max_steps=500, epochs=1)))
    resumed = train(Pico(TINY, 1), None, run, resume=True, epochs=2, max_steps=few + 2)
    assert steps(resumed) == [few + 1, few + 2]


def test_more_epochs_than_chosen_continue_a_run(text, tmp_path, quick_steps):
    """The epochs alone end the run of a short text, so that --resume --epochs is enough."""
    run, asked = tmp_path / "run", {"context_len": 40, "batch_size": 2, "max_minutes": 60}
    asked |= {"validation_interval": 10**6, "checkpoint_interval": 10**6}
    *_, last = train(Pico(TINY, 0), text, run, **asked)
    chosen = read_description(run)["settings"]
    assert last["step"] == last["steps"] < chosen["max_steps"]
    more = chosen["epochs"] + 1
    resumed = train(Pico(TINY, 1), None, run, resume=True, epochs=more)
    assert next(resumed)["step"] == last["step"] + 1
    resumed.close()


def test_a_stop_leaves_out_the_validation_of_its_step(text, tmp_path, quick_steps):
    """The resumed run makes up for it."""
    run, watch = tmp_path / "run", Watch(lambda: len(watch.phases) >= 4)
    settings = {"max_steps": 9, "validation_interval": 4}
    assert steps(start(text, run, events=watch, **settings)) == [1, 2, 3, 4]
    assert [record.get(BITS) for record in read_metrics(run)] == [None] * 4
    assert steps_of(checkpoint_path(run, 4)) == 4
    assert next(train(Pico(TINY, 1), None, run, resume=True))["step"] == 5
    assert [record.get(BITS) for record in read_metrics(run)] == [None, None, None, 3.0, None]


def test_a_stop_takes_effect_after_the_micro_batch(text, tmp_path, quick_steps):
    """The step in progress is discarded, and the one before it is saved."""
    run = tmp_path / "run"
    watch = Watch(lambda: len(watch.seen) == 6)
    settings = {"grad_accumulation_steps": 4, "batch_size": 1}
    assert steps(start(text, run, max_steps=20, events=watch, **settings)) == [1]
    assert watch.seen == [(1, 4), (2, 4), (3, 4), (4, 4), (1, 4), (2, 4)]
    assert steps_of(find_checkpoint(run)) == 1
    assert steps(train(Pico(TINY, 1), None, run, resume=True, max_steps=3)) == [2, 3]
    assert steps_of(find_checkpoint(run)) == 3


def test_a_run_without_a_checkpoint_starts_again(text, tmp_path, quick_steps):
    run = tmp_path / "run"
    weights = tmp_path / "base.safetensors"
    write_safetensors(weights, Pico(TINY, 9).weights())
    stopping = Watch(lambda: True)
    records = start(text, run, max_steps=3, events=stopping, grad_accumulation_steps=2)
    assert list(records) == []  # stopped within the first step
    assert list_checkpoints(run) == []
    watch = Watch()
    records = start(text, run, max_steps=2, base_weights=weights, events=watch)
    assert steps(records) == [1, 2]
    assert watch.said[-1] == "before the first step: 3.000 bits per byte of held-out text"
    with pytest.raises(PicoError, match="exists; continue it with --resume"):
        start(text, run)
    for path in run.glob("0*"):
        path.unlink()
    watch, resumed = Watch(), Pico(TINY, 1)
    assert steps(train(resumed, None, run, resume=True, events=watch)) == [1, 2]
    assert "ended before its first checkpoint" in watch.said[0]
    expected = read_safetensors(weights)[0]["embedding.weight"]
    np.testing.assert_array_equal(resumed.embedding.weight.numpy(), expected)
    assert steps(read_metrics(run)) == [1, 2]


@pytest.mark.parametrize(("bits", "said"), [(7.9, False), (25.2, True)])
def test_weights_that_know_nothing_of_the_text(bits, said, text, tmp_path, quick_steps):
    quick_steps.bits, watch = iter([bits, 3.0]), Watch()
    weights = tmp_path / "base.safetensors"
    write_safetensors(weights, Pico(TINY, 9).weights())
    steps(start(text, tmp_path / "run", max_steps=1, base_weights=weights, events=watch))
    before = watch.said.index(f"before the first step: {bits:.3f} bits per byte of held-out text")
    assert ("know nothing of this text" in "".join(watch.said[before + 1 :])) == said


@pytest.mark.parametrize("left", [".training.json.x.tmp", "00000002.state.safetensors"])
def test_what_a_crash_before_the_first_checkpoint_leaves(left, text, tmp_path, quick_steps):
    """The run can be started again, and the leftovers go."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / left).write_bytes(b"")
    assert len(list(start(text, tmp_path / "run", max_steps=1))) == 1
    assert not (tmp_path / "run" / left).exists()


@pytest.mark.parametrize("left", ["notes.txt", "00000002.safetensors"])
def test_a_folder_with_anything_else_is_no_new_run(left, text, tmp_path, quick_steps):
    (tmp_path / "run").mkdir()
    assert len(list(start(text, tmp_path / "run", max_steps=1))) == 1  # an empty one is
    other = tmp_path / "other"
    other.mkdir()
    (other / left).write_bytes(b"")
    with pytest.raises(PicoError, match="other exists"):
        start(text, other)


def test_max_minutes(text, tmp_path, quick_steps, monkeypatch):
    """10 s a step, 60 s in all; the first two steps of a process compile, which is left out."""
    clock = iter(range(0, 10**6, 10))
    time = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr("pico_tg.training.time", time)
    run = tmp_path / "run"
    settings = {"max_minutes": 1.0, "max_steps": 1000, "warmup_steps": 0, "learning_rate": 1.0}
    records = list(start(text, run, **settings))
    assert len(records) == 8
    assert [round(record["minutes"] * 60) for record in records] == [0, 0, 10, 20, 30, 40, 50, 60]
    assert BITS in records[-1]
    assert steps_of(find_checkpoint(run)) == 8
    # a cosine over the time: half way down after 30 of 60 s
    assert records[5]["lr"] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 2)), abs=2e-3)
    assert records[-1]["lr"] < 0.2
    resumed = list(train(Pico(TINY, 1), None, run, resume=True, max_minutes=1.5))
    assert resumed[0]["minutes"] == pytest.approx(1 + 1 / 8)  # compiles: as long as the mean
    assert resumed[-1]["minutes"] >= 1.5


def test_a_pause_is_no_training_time():
    """Nor at a step that is longer than the others for good; the first two steps compile."""
    progress = Progress()
    for seconds in (60, 50, 2, 2, 2):
        progress.took(seconds, 1, 1)
    assert progress.seconds == 6
    progress.took(3600, 1, 1)  # Ctrl-Z
    assert progress.seconds == 6 + 10 * 6 / 5
    progress.took(5, 1, 1)
    assert progress.seconds == 6 + 10 * 6 / 5 + 5


def test_other_minutes_move_the_learning_rate(text, tmp_path, quick_steps):
    """The seam is said, like that of another number of steps."""
    run = tmp_path / "run"
    list(start(text, run, max_steps=3, max_minutes=1.0))
    watch = Watch()
    list(train(Pico(TINY, 1), None, run, resume=True, events=watch))
    assert not any("max_minutes" in said for said in watch.said)
    changes = {"max_minutes": 2.0, "max_steps": 4}
    list(train(Pico(TINY, 1), None, run, resume=True, events=watch, **changes))
    assert any("max_minutes was 1.0, now 2.0: from step 4 on" in said for said in watch.said)


def test_a_run_is_trained_by_one_at_a_time(text, tmp_path, quick_steps, monkeypatch):
    """A notebook's cell that runs again learns how to go on."""
    records = start(text, tmp_path / "run", max_steps=9)
    next(records)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PicoError, match=r"run is being trained; .*records\.close"):
        train(Pico(TINY, 1), None, "run", resume=True)
    records.close()
    assert steps(train(Pico(TINY, 1), None, "run", resume=True, max_steps=2)) == [2]
    with (
        FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(PicoError, match="is being trained; wait"),
    ):
        train(Pico(TINY, 1), None, "run", resume=True)


@pytest.mark.parametrize(
    ("limit", "value"), [("max_steps", 3), ("epochs", 1), ("max_minutes", 1e-9)]
)
def test_nothing_is_left(limit, value, text, tmp_path, quick_steps):
    """The message names the setting that ended the run."""
    run = tmp_path / "run"
    assert list(start(text, run, **{"max_steps": 99, limit: value}))
    watch, before = Watch(), (run / "training.json").read_bytes()
    changed = {} if limit == "max_steps" else {"max_steps": 50}
    changed |= {"max_minutes": 2.0} if limit == "epochs" else {}
    records = train(Pico(TINY, 1), None, run, resume=True, events=watch, **changed)
    assert list(records) == watch.phases == []
    expected = f"a larger --{limit.replace('_', '-')} continues the run"
    assert f"nothing left to train; {expected}" in watch.said
    assert "learning rate" not in "".join(watch.said)
    assert (run / "training.json").read_bytes() == before  # nothing was trained with the change


@pytest.mark.parametrize(("limit", "said"), [({"epochs": 1}, True), ({"max_steps": 2}, False)])
def test_epochs_that_end_before_the_minutes_are_said(limit, said, text, tmp_path, quick_steps):
    watch = Watch()
    assert list(start(text, tmp_path / "run", max_minutes=99.0, events=watch, **limit))
    last = "the epochs end before max_minutes; a larger --epochs continues the run"
    assert (last in watch.said) == said


def test_validations(text, tmp_path, quick_steps):
    """Each interval and after the last step, not shortly before it; the gap is measured once."""
    for last, expected in ((9, [4, 8, 9]), (8, [4, 8]), (24, [10, 20, 24]), (22, [10, 22])):
        quick_steps.bits, interval = iter([3.0] * 9), expected[0]
        settings = {"max_steps": last, "validation_interval": interval}
        records = list(start(text, tmp_path / f"{last}", **settings))
        assert [r["step"] for r in records if BITS in r] == expected
        assert [r["step"] for r in records if GAP in r] == [last]


def test_the_time_that_is_left(monkeypatch):
    """By the medians of steps and validations; the ones that compile do not count.

    The last validation counts twice, since it also measures top-k routing.
    """
    progress = Progress(steps=100)
    settings = TrainSettings(validation_interval=10, batch_size=1, context_len=100)
    for seconds in (60, 50, 2, 2, 9, 2):
        progress.took(seconds, 1, 1)
        assert progress.seconds_left(settings, 1000) is None
    progress.took(2, 1, 1)  # 93 steps; validations of 1000 bytes at 10, 20, … 90, and 100
    assert progress.seconds_left(settings, 1000) == pytest.approx(93 * 2 + 11 * 10 / 3 * 2)
    progress.validation_times += [70]  # it compiled
    assert progress.seconds_left(settings, 1000) == pytest.approx(93 * 2 + 11 * 10 / 3 * 2)
    progress.validation_times += [5, 5, 11]
    assert progress.seconds_left(settings, 1000) == pytest.approx(93 * 2 + 11 * 5)
    timed = dataclasses.replace(settings, max_minutes=1.0)  # of which 21 s are used
    assert progress.seconds == pytest.approx(17)
    assert progress.seconds_left(timed, 1000) == pytest.approx(43 + 4 * 5)
    for _ in range(93):
        progress.took(2, 1, 1)
    assert progress.seconds_left(settings, 1000) == 0
    assert progress.seconds_left(timed, 1000) == 0


def test_records_tell_the_time_that_is_left(text, tmp_path, quick_steps):
    """From the fifth step on after two that compile; with max_minutes, that time too."""
    records = list(start(text, tmp_path / "run", max_steps=12, max_minutes=5.0))
    assert [r["step"] for r in records if "seconds_left" in r] == [7, 8, 9, 10, 11, 12]
    assert records[-1]["seconds_left"] == 0
    assert records[-1]["max_minutes"] == 5


# Which checkpoints are kept, and found -----------------------------------------------------------


def test_keep_best(text, tmp_path, quick_steps):
    """Validations after 3, 6, 9, … steps; that of 6 is the best."""
    run = tmp_path / "run"
    settings = {"keep_checkpoints": 1, "checkpoint_interval": 4, "validation_interval": 3}
    list(start(text, run, max_steps=14, keep_best=True, **settings))
    assert [at for at, _ in list_checkpoints(run)] == [6, 14]
    assert find_checkpoint(run, "best") == checkpoint_path(run, 6)
    quick_steps.bits = iter([9.0, 9.0, 9.0])
    list(train(Pico(TINY, 1), None, run, resume=True, max_steps=16))
    assert [at for at, _ in list_checkpoints(run)] == [6, 16]


def test_finding_checkpoints(tmp_path):
    run = tmp_path / "model" / "run"
    run.mkdir(parents=True)
    with pytest.raises(PicoError, match=r"pico_tg train .*model run"):
        find_checkpoint(run)
    shutil.copy(FORMER / "run" / "training.json", run)
    with pytest.raises(PicoError, match=r"in training .* after step 500; .*model run --resume"):
        find_checkpoint(run)
    (run / "training.json").unlink()
    for step in (5, 100, 20):
        write_safetensors(run / f"{step:08d}.safetensors", {})
    (run / ".00000900.safetensors.x.tmp").write_bytes(b"")
    (run / "notes.safetensors").write_bytes(b"")
    assert [step for step, _ in list_checkpoints(run)] == [5, 20, 100]
    names = [find_checkpoint(run, i).name for i in (-1, -3, 20)]
    assert names == ["00000100.safetensors", "00000005.safetensors", "00000020.safetensors"]
    for missing in (-4, 0, 7):
        with pytest.raises(PicoError, match="5, 20, 100"):
            find_checkpoint(run, missing)
    (run / "metrics.jsonl").write_text('{"step": 5}\n')
    with pytest.raises(PicoError, match="was validated"):
        find_checkpoint(run, "best")


def test_the_best_is_finite(text, tmp_path, quick_steps):
    """Also where an earlier version logged NaN; `best_validations` needs no checkpoints."""
    run = tmp_path / "run"
    list(start(text, run, max_steps=6, validation_interval=2, checkpoint_interval=2))
    logged = (run / "metrics.jsonl").read_text()  # validations of 3, 2 and 2.5 bits
    (run / "metrics.jsonl").write_text(logged.replace(f'"{BITS}": 3.0', f'"{BITS}": NaN'))
    assert find_checkpoint(run, "best") == checkpoint_path(run, 4)
    assert BITS not in read_metrics(run)[1]
    checkpoint_path(run, 4).unlink()
    assert find_checkpoint(run, "best") == checkpoint_path(run, 6)
    assert best_validations(run) == [4, 6]


@pytest.mark.parametrize("name", ["", ".", "..", "../other/run", "/tmp", "a/../../b"])
def test_a_run_is_within_its_model(name, tmp_path):
    with pytest.raises(PicoError, match="RUN must name a run of"):
        run_folder(tmp_path, name)
    assert run_folder(tmp_path, "sub/a") == tmp_path / "sub" / "a"


def test_differences():
    assert differences({"a": 1, "b": 2, "c": 3}, {"b": 5, "c": 3, "d": 4}) == "b was 2, now 5"
    assert (
        differences({"a": "x", "b": None}, {"a": "y", "b": 0})
        == "a was x, now y, b was None, now 0"
    )


def test_training_goes_on_from_the_newest_valid_checkpoint(run, text):
    path = checkpoint_path(run, 4)
    path.write_bytes(path.read_bytes()[:-5])
    watch = Watch()
    assert steps(train(Pico(TINY), text, run, resume=True, events=watch)) == [3, 4]
    assert (run / "00000004.safetensors.broken").exists()
    assert "00000004" in watch.said[0]
    assert "resuming after step 2" in watch.said[1]
    assert steps(read_metrics(run)) == [1, 2, 3, 4]
    assert steps_of(path) == 4


def test_a_forced_batch_size_leaves_no_window_out(text, tmp_path, quick_steps, monkeypatch):
    """11 windows an epoch: three steps of 2, then 1 at a time, and each is seen once."""
    seen = []
    batch_of = Windows.batch

    def watched(self, position):
        batch = batch_of(self, position)
        seen.extend(bytes(row) for row in batch)
        return batch

    monkeypatch.setattr(Windows, "batch", watched)
    list(start(text, tmp_path / "run", epochs=1, events=Watch(lambda: len(seen) == 6)))
    resumed = train(Pico(TINY), text, tmp_path / "run", resume=True, batch_size=1, force=True)
    assert steps(resumed) == [4, 5, 6, 7, 8]
    whole = Windows(load_data(DataSpec(text)).train, 40, TINY.next_tokens, 11, 0)
    assert len(whole) == len(seen) == 11
    assert sorted(seen) == sorted(bytes(row) for row in whole.batch(0))


# training.json and metrics.jsonl -----------------------------------------------------------------


@pytest.fixture
def run(text, tmp_path, quick_steps):
    """Four steps, with checkpoints after 2 and 4."""
    list(start(text, tmp_path / "run", max_steps=4, checkpoint_interval=2))
    return tmp_path / "run"


def test_changed_settings_are_refused_by_name(run, text):
    def resume(**changes):
        return list(train(Pico(TINY, 0), text, run, resume=True, **changes))

    with pytest.raises(PicoError, match=r"learning_rate was 0.01, now 0.5, optimizer was adamw"):
        resume(learning_rate=0.5, optimizer="soap")
    with pytest.raises(PicoError, match=r"batch_size was 2, now 1.*--force"):
        resume(batch_size=1)
    assert resume(context_len=40) == []  # the same as before; nothing is left to do
    watch = Watch()
    records = resume(events=watch, max_steps=6, batch_size=1, force=True)
    assert "the last step was 4, now 6: from step 5 on the learning rate" in watch.said[-1]
    assert steps(records) == [5, 6]
    assert records[-1]["bytes"] == 4 * 2 * 40 + 2 * 1 * 40
    assert read_description(run)["settings"]["batch_size"] == 1


def test_another_model_is_refused(run, text):
    other = Config(**(vars(TINY) | {"fb_att_window_size": 3, "router": "space"}))
    named = "fb_att_window_size was 6, now 3, router was learned, now space"
    with pytest.raises(PicoError, match=named):
        train(Pico(other), text, run, resume=True)


@pytest.mark.parametrize("edit", [{"router": "space"}, {"position": "rope"}])
def test_an_edited_model_is_said(edit, run, text, tmp_path, capsys):
    """Wherever its weights are taken that fit the shapes: in the words of --resume."""
    model = run.parent
    TINY.to_json(model / "model.json")
    load(model, run.name)
    assert capsys.readouterr().err == ""
    edited = Config(**(vars(TINY) | edit))
    (name, value), watch = *edit.items(), Watch()
    edited.to_json(model / "model.json")
    load(model, run.name)
    said = capsys.readouterr().err
    assert said.startswith(f"{run} was trained with another model.json: {name} was ")
    assert f"now {value}; restore it, or train a new RUN\n" in said
    weights = dict(list_checkpoints(run))[4]
    settings = {"router_warmup_steps": 0, "context_len": 40, "batch_size": 1}
    train(Pico(edited), text, base_weights=weights, events=watch, **settings).close()
    assert said.strip() in watch.said
    (run / "training.json").unlink()  # weights from elsewhere
    load(model, run.name)
    assert capsys.readouterr().err == ""


def test_what_the_weights_to_start_from_have_seen(tmp_path, quick_steps):
    """Of the text to validate on; also if two runs started from each other, one of them again."""
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    for seed, path in enumerate((text, other)):
        path.write_bytes(np.random.default_rng(seed).integers(97, 123, 4000, np.uint8))
    first, second = tmp_path / "m" / "first", tmp_path / "m" / "second"
    list(start(text, first, max_steps=1))
    assert [run for run, _ in ancestry(first)] == [first]
    for validation, said in ((text, True), (None, False)):
        spec, watch = DataSpec(other, validation_file=validation), Watch()
        shutil.rmtree(second, ignore_errors=True)
        weights = checkpoint_path(first, 1)
        list(start(spec, second, max_steps=1, base_weights=weights, events=watch))
        line = f"warning: text to validate on: {first} was trained on about "
        assert any(part.startswith(line) for part in watch.said) == said
    path = first / "training.json"
    description = json.loads(path.read_text()) | {"base_weights": f"{second}/00000001.safetensors"}
    path.write_text(json.dumps(description))
    assert [run for run, _ in ancestry(second)] == [second, first]


def test_bytes_in_no_window_are_said(tmp_path):
    (tmp_path / "t.txt").write_bytes(bytes(range(97, 123)) * 20)
    for length, said in ((300, True), (32, False)):
        watch = Watch()
        settings = {"context_len": length, "batch_size": 1}
        train(Pico(TINY), tmp_path / "t.txt", events=watch, **settings).close()
        assert any("bytes are in no window" in line for line in watch.said) == said


def test_data_may_have_moved(run, text, tmp_path):
    moved = tmp_path / "elsewhere.txt"
    Path(text).rename(moved)
    with pytest.raises(PicoError, match=r"text\.txt"):
        train(Pico(TINY), None, run, resume=True)
    assert steps(train(Pico(TINY), moved, run, resume=True, max_steps=5)) == [5]
    assert read_description(run)["dataset"]["dataset"] == str(moved)


def test_changed_data_are_refused(run, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("something else; " * 60)
    with pytest.raises(PicoError, match="other data: dataset was"):
        train(Pico(TINY), str(other), run, resume=True)
    Path(text).write_text("the dog sat on the log; " * 25)
    with pytest.raises(PicoError, match="have changed since"):
        train(Pico(TINY), text, run, resume=True)


def test_a_relative_path_is_found_from_anywhere(text, tmp_path, monkeypatch, quick_steps):
    monkeypatch.chdir(tmp_path)
    list(train(Pico(TINY), "text.txt", "run", max_steps=1, settings="published", **QUICK))
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    assert steps(train(Pico(TINY), None, "../run", resume=True, max_steps=2)) == [2]


def test_the_revision_of_a_run_is_kept(run, monkeypatch):
    """A data set on the hub may have a newer one, also when its name is given again."""
    path = run / "training.json"
    description = json.loads(path.read_text())
    description["dataset"] |= {"dataset": "owner/name", "revision": "0123abc"}
    path.write_text(json.dumps(description))
    asked = []

    def load_data(spec, progress=True):
        asked.append((spec.dataset, spec.revision))
        raise PicoError("enough")

    monkeypatch.setattr("pico_tg.data.load_data", load_data)
    for dataset in (None, "owner/name", DataSpec("owner/name", revision="fff"), "owner/other"):
        with pytest.raises(PicoError, match="enough"):
            train(Pico(TINY), dataset, run, resume=True)
    assert [revision for _, revision in asked] == ["0123abc", "0123abc", "fff", None]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: "[]",
        lambda d: "{",
        lambda d: "[" * 100_000,
        lambda d: json.dumps({"settings": {}}),
        lambda d: json.dumps(d | {"model": []}),
        lambda d: json.dumps(d | {"settings": d["settings"] | {"depth": 3}}),
        lambda d: json.dumps(d | {"dataset": d["dataset"] | {"color": "red"}}),
    ],
)
def test_a_broken_description(damage, run):
    path = run / "training.json"
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(PicoError, match=r"training\.json"):
        train(Pico(TINY), None, run, resume=True)


def test_metrics_are_appended(run, text):
    """What is no record is skipped; the last record of a step counts, also after a killed run."""
    path = run / "metrics.jsonl"
    with open(path, "ab") as file:
        file.write(b'3\n{"step": "x"}\n\xff\xfe\n{"step": 5, "loss": 9}\n{"step": 6, "loss": 9}\n')
        file.write(b'{"step": 7, "bi')
    before = path.read_bytes()
    assert steps(read_metrics(run)) == [1, 2, 3, 4, 5, 6]
    records = list(train(Pico(TINY), text, run, resume=True, max_steps=5))
    assert read_metrics(run)[4:] == records
    assert path.read_bytes().startswith(before)


def test_leftovers_of_killed_processes_are_removed(run, text):
    left = [".00000004.safetensors.abc.tmp", ".training.json.x.tmp", "00000003.state.safetensors"]
    for name in left:
        (run / name).write_bytes(b"half")
    (run / "notes.tmp").write_bytes(b"mine")
    assert list(train(Pico(TINY), text, run, resume=True)) == []
    names = {path.name for path in run.iterdir()}
    assert not names & {*left}
    assert "notes.tmp" in names


def test_a_full_log_does_not_lose_the_training(run, text, monkeypatch):
    """What was trained is saved before the error."""

    def full(self, record):
        raise PicoError("cannot write metrics.jsonl: No space left on device")

    records = train(Pico(TINY), text, run, resume=True, max_steps=9)
    next(records)
    monkeypatch.setattr(Run, "log", full)
    with pytest.raises(PicoError, match="No space left"):
        next(records)
    assert list_checkpoints(run)[-1][0] == 6


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_is_one_line(run, text):
    records = train(Pico(TINY), text, run, resume=True, max_steps=6)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(PicoError, match=r"cannot write .*metrics\.jsonl: No space left"):
        list(records)


def test_nothing_to_resume(tmp_path, text):
    with pytest.raises(PicoError, match="no training run to resume"):
        train(Pico(TINY), text, tmp_path / "none", resume=True)
    with pytest.raises(PicoError, match="no run was named"):
        train(Pico(TINY), text, resume=True)
    assert not (tmp_path / "none").exists()


def test_no_valid_checkpoint(run, text):
    for _, path in list_checkpoints(run):
        path.write_bytes(b"")
    with pytest.raises(PicoError, match="no checkpoint to resume from"):
        train(Pico(TINY), text, run, resume=True)


def test_weights_stay_those_of_the_model(run):
    """A checkpoint's weights load elsewhere: the optimizer's state is in a file of its own."""
    found = read_safetensors(checkpoint_path(run, 4))[0]
    assert found.keys() == Pico(TINY).weights().keys()


def test_load(tmp_path):
    TINY.to_json(tmp_path / "model.json")
    (tmp_path / "first").mkdir()
    for seed in (1, 2):
        save_checkpoint(Pico(TINY, seed).weights(), {}, {"step": seed}, tmp_path / "first")
    expected = Pico(TINY, 2).embedding.weight.numpy()
    assert np.array_equal(load(tmp_path, "first").embedding.weight.numpy(), expected)
    assert np.array_equal(load(str(tmp_path), "first", 2).embedding.weight.numpy(), expected)
    with pytest.raises(PicoError, match=r"first is a run, not a model; write .* first$"):
        load(tmp_path / "first", "first")


def test_a_run_of_broken_base_weights(tmp_path):
    described = {key: {} for key in ("settings", "dataset", "model")} | {"base_weights": 5}
    described |= {"devices": [], "fingerprints": []}
    (tmp_path / "training.json").write_text(json.dumps(described))
    with pytest.raises(PicoError, match="base_weights must be a path"):
        list(ancestry(tmp_path))
